"""How many accelerators one driver can keep busy: lanes that only sleep.

Everything but reading, predicting and writing is real: packets, actors, outcomes, the
ledger. Slides of 50 regions; a region takes as long as one of 3072 px (64 windows)
would on the accelerator.

Run: python benchmarks/control.py --lanes 1 4 16 64 --region-ms 60
"""

import argparse
import functools
import json
import tempfile
import threading
import time

import numpy as np
import ray

from medray.execution import memory
from medray.execution.actor_pool import Pool, poll
from medray.execution.commit import HEADER, WORKING, Commit
from medray.execution.progress import Progress
from medray.execution.scheduler import drive
from medray.inference.infer import _slide_row
from medray.storage.ledger import Ledger

REGIONS = 50


class SleepingWorker:
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


class SleepingLane:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.device = threading.Lock()  # as two packets share one

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


def measure(lanes: int, seconds: float, duration: float) -> dict:
    slides = max(lanes, round(duration * lanes / seconds / REGIONS))
    todo = [
        {"slide": f"s{i:06d}", "uri": "", "stamp": "", "annotation": "", "before": ""}
        for i in range(slides)
    ]
    lane = ray.remote(SleepingLane).options(num_cpus=0, max_concurrency=memory.PACKETS)
    worker = ray.remote(SleepingWorker).options(num_cpus=0)
    with (
        tempfile.TemporaryDirectory() as out,
        Clock(slides) as clock,
        Pool(worker.remote, "work", max(1, lanes // 16)) as workers,
        Pool(
            functools.partial(lane.remote, seconds), "work", lanes, calls=memory.PACKETS
        ) as pool,
    ):
        while pool.room < lanes * memory.PACKETS:
            poll(pool)
        commit = Commit(Ledger(out), _slide_row)
        cpu = time.process_time()
        drive(todo, workers, pool, commit, clock, 16, lambda: None)
        cpu = time.process_time() - cpu
    assert commit.done == slides
    # Without the first packets and the tail.
    times = clock.times
    first, last = len(times) // 10, len(times) * 9 // 10
    rate = (last - first) / (times[last] - times[first])
    return {
        "lanes": lanes,
        "regions": len(times),
        "regions/s": round(rate, 1),
        "of ideal": round(rate * seconds / lanes, 3),
        "driver CPU, ms a region": round(cpu / len(times) * 1e3, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--region-ms", type=float, default=60.0)
    parser.add_argument("--duration", type=float, default=30.0, help="s, at best")
    args = parser.parse_args()
    ray.init(logging_level="ERROR")
    for lanes in args.lanes:
        print(
            json.dumps(measure(lanes, args.region_ms / 1e3, args.duration)), flush=True
        )
    ray.shutdown()


if __name__ == "__main__":
    main()
