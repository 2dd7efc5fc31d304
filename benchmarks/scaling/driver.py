"""What the driver costs: with many slides, and with many GPU workers.

    slides    time and memory of the driver by slide, and a run that is done again
    workers   how many GPU workers one driver can keep busy

GPU workers only sleep. Everything but reading, predicting and writing is real: batches,
actors, outcomes, the ledger. Slides of 50 regions; a region takes as long as one of
3072 px (64 windows) would on the accelerator.

Run: python -m benchmarks.scaling.driver slides --count 10000
     python -m benchmarks.scaling.driver workers --counts 1 4 16 64 --ms 60
"""

import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import ray

from benchmarks import harness
from benchmarks.random_model import random_model
from medray.datasets.synthetic import write_slide
from medray.datasets.synthetic_scene import draw_scene
from medray.execution import memory
from medray.execution.actor_pool import Pool, poll
from medray.execution.commit import Commit
from medray.execution.progress import Progress
from medray.execution.scheduler import schedule
from medray.execution.stage import HEADER
from medray.inference.infer_run import settings_of
from medray.inference.run import Options, open_run
from medray.inference.slide_rows import WORKING, slide_row
from medray.slides.discovery import find_slides
from medray.slides.fingerprint import slide_fingerprint
from medray.storage.ledger import Ledger

REGIONS = 50


class SleepingPlanner:
    def work(self, rows):
        for row in rows:
            if "todo" in row:
                yield [{}]
                continue
            facts = dict.fromkeys(WORKING)
            facts |= {"height": 1, "width": REGIONS, "regions": REGIONS, "note": ""}
            header = row | facts | {"index": HEADER, "digest": "d", "todo": REGIONS}
            header |= {"classes": ["background", "tumour"]}
            del header["before"]
            blocks = np.ones((6, 6), bool).tolist()
            regions = [
                {"index": i, "region": [0, 3072 * i, 3072, 3072], "blocks": blocks}
                for i in range(REGIONS)
            ]
            yield [(header, regions)]


class SleepingGpuWorker:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.device = threading.Lock()  # as two batches share one

    def work(self, rows):
        outcomes = []
        for _ in rows:
            with self.device:
                time.sleep(self.seconds)
            now = time.time()
            record = {"class_px": [1, 0], "predicted_px": 1, "windows": 64}
            record |= {"read_at": now - self.seconds, "written_at": now}
            record |= {"predict_s": self.seconds, "waited_s": 0.0, "write_s": 0.0}
            outcomes.append({"record": record})
            if len(outcomes) == 8:
                yield outcomes
                outcomes = []
        if outcomes:
            yield outcomes


class Clock(Progress):
    """Notes when each region was committed."""

    def __init__(self, slides: int) -> None:
        super().__init__("simulated", slides)
        self.times: list[float] = []

    def region(self, pixels: int) -> None:
        super().region(pixels)
        self.times.append(time.perf_counter())


def measure_workers(count: int, seconds: float, duration: float) -> dict:
    slides = max(count, round(duration * count / seconds / REGIONS))
    todo = [
        {
            "slide": f"s{i:06d}",
            "uri": "",
            "fingerprint": "",
            "annotation": "",
            "before": "",
        }
        for i in range(slides)
    ]
    worker = ray.remote(SleepingGpuWorker).options(
        num_cpus=0, max_concurrency=memory.BATCHES
    )
    planner = ray.remote(SleepingPlanner).options(num_cpus=0)
    with (
        tempfile.TemporaryDirectory() as out,
        Clock(slides) as clock,
        Pool(planner.remote, "work", max(1, count // 16)) as planners,
        Pool(
            functools.partial(worker.remote, seconds),
            "work",
            count,
            calls=memory.BATCHES,
        ) as pool,
    ):
        while pool.room < count * memory.BATCHES:
            poll(pool)
        commit = Commit(Ledger(out), slide_row)
        cpu = time.process_time()
        schedule(todo, planners, pool, commit, clock, 16, lambda: None)
        cpu = time.process_time() - cpu
    assert commit.done == slides
    # Without the first batches and the tail.
    times = clock.times
    first, last = len(times) // 10, len(times) * 9 // 10
    rate = (last - first) / (times[last] - times[first])
    return {
        "workers": count,
        "regions": len(times),
        "regions/s": round(rate, 1),
        "of ideal": round(rate * seconds / count, 3),
        "driver's CPU, ms per region": round(cpu / len(times) * 1e3, 3),
    }


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def slides(count: int = 10_000) -> Iterator[harness.Result]:
    """Measure the driver's time and memory by slide, and a finished run again.

    Args:
        count: Number of slides.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = write_slide(folder, "one", draw_scene(0, height=256, width=256))
        inbox = folder / "inbox"
        inbox.mkdir()
        for index in range(count):
            os.link(first, inbox / f"s{index:06d}.tif")
        model = random_model(folder / "model")
        out = str(folder / "run")
        settings = settings_of([model], Options())
        open_run(out, settings)

        start = time.perf_counter()
        wanted = find_slides([str(inbox)])
        listing = time.perf_counter() - start
        ledger = Ledger(out)
        commit = Commit(ledger, slide_row)
        marks = []
        start, cpu = time.perf_counter(), time.process_time()
        with Progress("driver", len(wanted)) as progress:
            for index, file in enumerate(wanted):
                facts = dict.fromkeys(WORKING) | {"height": 256, "width": 256}
                facts |= {"regions": 1, "note": ""}
                row = facts | {"slide": file.slide, "uri": file.uri, "annotation": ""}
                row |= {
                    "fingerprint": slide_fingerprint(file.uri),
                    "digest": "d",
                    "todo": 1,
                }
                row |= {"classes": ["background", "tumour"], "index": 0}
                row["region"] = [0, 0, 256, 256]
                record = {"class_px": [65536, 0], "predicted_px": 65536, "windows": 1}
                record |= {"read_at": time.time(), "written_at": time.time()}
                commit.take(row | {"record": record}, progress)
                if index % max(1, count // 10) == 0:
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
    yield {
        "slides": count,
        "listing, s": round(listing, 2),
        "driver, ms per slide": round(elapsed / count * 1e3, 3),
        "of it CPU": round(cpu / count * 1e3, 3),
        "driver's memory, MiB, at each tenth": marks,
        "peak, MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        "finished run again, s": round(again, 2),
        "skipped": result["skipped"],
    }


def workers(
    counts: tuple[int, ...] = (1, 4, 16, 64),
    ms: float = 60.0,
    duration: float = 30.0,
) -> Iterator[harness.Result]:
    """Measure how many GPU workers one driver keeps busy.

    Args:
        counts: Numbers of GPU workers.
        ms: Time that a region takes, milliseconds.
        duration: Of each measurement at best, seconds.
    """
    ray.init(logging_level="ERROR")
    for count in counts:
        yield measure_workers(count, ms / 1e3, duration)
    ray.shutdown()


if __name__ == "__main__":
    harness.run(slides, workers)
