"""How many accelerators one driver can keep busy: lanes that only sleep.

Everything but reading, predicting and writing is real: packets through Ray Data,
actors, outcomes, the ledger. Slides of 50 regions; a region takes as long as one of
3072 px (64 windows) would on the accelerator.

Run: python benchmarks/control.py --lanes 1 4 16 64 --region-ms 60
"""

import argparse
import json
import tempfile
import threading
import time

import numpy as np
import ray

import medray.infer as stage
from medray import cluster
from medray.classes import Classes
from medray.commit import Commit
from medray.grid import Windows
from medray.infer import _chain, _slide_row
from medray.progress import Progress
from medray.run import Options, RunSettings
from medray.store.ledger import Ledger

REGIONS = 50


class SleepingPlanner:
    def __init__(self, settings, out, committed, packet):
        self.packet = packet

    def __call__(self, batch):
        for slide in json.loads(batch["json"][0]):
            facts = dict.fromkeys(stage._FACTS)
            facts |= {"height": 1, "width": REGIONS, "regions": REGIONS, "note": ""}
            header = slide | facts | {"digest": "d", "todo": REGIONS}
            header |= {"classes": ["background", "tumour"]}
            del header["before"]
            blocks = np.ones((6, 6), bool).tolist()
            rows = [
                header
                | {"index": i, "region": [0, 3072 * i, 3072, 3072], "blocks": blocks}
                for i in range(REGIONS)
            ]
            for first in range(0, len(rows), self.packet):
                yield {"json": [json.dumps(rows[first : first + self.packet])]}


class SleepingLane:
    seconds = 0.0

    def __init__(self, settings, out):
        self.device = threading.Lock()  # as two packets share one

    def __call__(self, batch):
        outcomes = []
        for row in json.loads(batch["json"][0]):
            with self.device:
                time.sleep(self.seconds)
            now = time.time()
            record = {"class_px": [1, 0], "predicted_px": 1, "windows": 64}
            record |= {"read_at": now - self.seconds, "written_at": now}
            outcomes.append(row | {"record": record})
            if len(outcomes) == 8:
                yield {"json": [json.dumps(outcomes)]}
                outcomes = []
        if outcomes:
            yield {"json": [json.dumps(outcomes)]}


def measure(lanes: int, seconds: float, duration: float) -> dict:
    SleepingLane.seconds = seconds
    stage.Lane, stage.Planner = SleepingLane, SleepingPlanner
    cluster.gpus = lambda: lanes
    stage.lane_resources = lambda: {"num_cpus": 1}
    slides = max(lanes, round(duration * lanes / seconds / REGIONS))
    settings = RunSettings(
        models=("",),
        model_digest="",
        classes=Classes(),
        windows=Windows(512, 384),
        model_mpp=None,
        options=Options(region=3072),
    )
    todo = [
        {"slide": f"s{i:06d}", "uri": "", "stamp": "", "annotation": "", "before": ""}
        for i in range(slides)
    ]
    with tempfile.TemporaryDirectory() as out:
        ledger = Ledger(out)
        commit = Commit(ledger, no_finish, _slide_row)
        times, cpu = [], time.process_time()
        with Progress("simulated", slides) as progress:
            for row in _chain(todo, settings, out, ledger):
                commit.take(row, progress)
                times.append(time.perf_counter())
            commit.finish(progress)
        cpu = time.process_time() - cpu
    # Without the lanes' start and the tail.
    first, last = len(times) // 5, len(times) * 4 // 5
    rate = (last - first) / (times[last] - times[first])
    return {
        "lanes": lanes,
        "regions": len(times),
        "regions/s": round(rate, 1),
        "of ideal": round(rate * seconds / lanes, 3),
        "driver CPU, ms a region": round(cpu / len(times) * 1e3, 3),
    }


def no_finish(slide: str) -> None:
    return None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--region-ms", type=float, default=60.0)
    parser.add_argument("--duration", type=float, default=20.0, help="s, at best")
    args = parser.parse_args()
    ray.init(num_cpus=max(args.lanes) * 2 + 16, logging_level="ERROR")
    for lanes in args.lanes:
        print(json.dumps(measure(lanes, args.region_ms / 1e3, args.duration)))
    ray.shutdown()


if __name__ == "__main__":
    main()
