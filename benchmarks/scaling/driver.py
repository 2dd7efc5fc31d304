"""What the driver costs with many slides: time and memory each, and a run that is done.

Run: python benchmarks/driver.py --slides 10000
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from infer import random_model

from medray.datasets.synthetic import draw_scene, write_slide
from medray.execution.commit import WORKING, Commit
from medray.execution.progress import Progress
from medray.inference.infer import _slide_row, settings_of
from medray.inference.run import Options, open_run
from medray.slides.discovery import find_slides
from medray.slides.fingerprint import slide_stamp
from medray.storage.ledger import Ledger


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--slides", type=int, default=10_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = write_slide(folder, "one", draw_scene(0, height=256, width=256))
        inbox = folder / "inbox"
        inbox.mkdir()
        for index in range(args.slides):
            os.link(first, inbox / f"s{index:06d}.tif")
        model = random_model(folder / "model", "resnet18")
        out = str(folder / "run")
        settings = settings_of([model], Options())
        open_run(out, settings)

        start = time.perf_counter()
        wanted = find_slides([str(inbox)])
        listing = time.perf_counter() - start
        ledger = Ledger(out)
        commit = Commit(ledger, _slide_row)
        marks = []
        start, cpu = time.perf_counter(), time.process_time()
        with Progress("driver", len(wanted)) as progress:
            for index, file in enumerate(wanted):
                facts = dict.fromkeys(WORKING) | {"height": 256, "width": 256}
                facts |= {"regions": 1, "note": ""}
                row = facts | {"slide": file.slide, "uri": file.uri, "annotation": ""}
                row |= {"stamp": slide_stamp(file.uri), "digest": "d", "todo": 1}
                row |= {"classes": ["background", "tumour"], "index": 0}
                row["region"] = [0, 0, 256, 256]
                record = {"class_px": [65536, 0], "predicted_px": 65536, "windows": 1}
                record |= {"read_at": time.time(), "written_at": time.time()}
                commit.take(row | {"record": record}, progress)
                if index % (args.slides // 10) == 0:
                    marks.append(round(resident_mib(), 1))
            commit.close(progress)
        cpu = time.process_time() - cpu
        elapsed = time.perf_counter() - start
        ledger.close()
        start = time.perf_counter()
        command = [sys.executable, "-m", "medray.cli", "infer", str(inbox), "--json"]
        command += ["--model", model, "--out", out]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        again = time.perf_counter() - start
        result = json.loads(done.stdout.splitlines()[-1])
    print(
        json.dumps(
            {
                "slides": args.slides,
                "listing, s": round(listing, 2),
                "driver, ms a slide": round(elapsed / args.slides * 1e3, 3),
                "of it CPU": round(cpu / args.slides * 1e3, 3),
                "driver memory, MiB, at each tenth": marks,
                "peak, MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
                "finished run again, s": round(again, 2),
                "skipped": result["skipped"],
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
