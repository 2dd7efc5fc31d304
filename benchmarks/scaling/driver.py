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
from medray.execution.tasks import (
    Finish,
    FinishTask,
    Plan,
    PlannedRegion,
    PlannedSlide,
    RegionTask,
    SlideInput,
    SlideTask,
    Stored,
)
from medray.geometry import Rectangle
from medray.inference.infer_run import settings_of, stage_of
from medray.inference.regions import FinishedMask, RegionRecord, SlideFacts
from medray.inference.run import Options, open_run
from medray.slides.discovery import SlideFile, find_slides
from medray.slides.fingerprint import slide_fingerprint
from medray.slides.resolution import Working
from medray.storage.ledger import Ledger

REGIONS = 50


WORKING = Working(0, 1.0, 3072, 3072 * REGIONS, 1.0, 0.5)
FACTS = SlideFacts(WORKING, None, 3072, 3072 * REGIONS)


def record(seconds: float) -> RegionRecord:
    now = time.time()
    return RegionRecord(
        read_at=now - seconds,
        read_s=0.0,
        predict_s=seconds,
        waited_s=0.0,
        windows=64,
        class_px=[1, 0],
        predicted_px=1,
        files={},
        write_s=0.0,
        written_at=now,
    )


class SleepingPlanner:
    def work(self, tasks):
        for task in tasks:
            if isinstance(task, FinishTask):
                yield [Finish(FinishedMask(""))]
                continue
            slide = PlannedSlide(task.input, "d", FACTS, REGIONS, REGIONS)
            blocks = np.ones((6, 6), bool)
            places = [Rectangle(0, 3072 * i, 3072, 3072) for i in range(REGIONS)]
            regions = [PlannedRegion(i, at, blocks) for i, at in enumerate(places)]
            yield [Plan(slide, tuple(RegionTask(slide, one) for one in regions))]


class SleepingGpuWorker:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.device = threading.Lock()  # as two batches share one

    def work(self, tasks):
        outcomes = []
        for _ in tasks:
            with self.device:
                time.sleep(self.seconds)
            outcomes.append(Stored(record(self.seconds)))
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
    files = [SlideFile(f"s{index:06d}", "") for index in range(slides)]
    todo = [SlideTask(SlideInput(file)) for file in files]
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
        model = random_model(Path(out) / "model")
        stage = stage_of(settings_of([model], Options()), out)
        commit = Commit(Ledger(out), stage, clock)
        cpu = time.process_time()
        schedule(todo, planners, pool, commit, 16, lambda: None)
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
        marks = []
        facts = SlideFacts(Working(0, 1.0, 256, 256, 1.0, 0.5), None, 256, 256)
        region = PlannedRegion(0, Rectangle(0, 0, 256, 256), np.ones((1, 1), bool))
        start, cpu = time.perf_counter(), time.process_time()
        with Progress("driver", len(wanted)) as progress:
            commit = Commit(ledger, stage_of(settings, out), progress)
            for index, file in enumerate(wanted):
                source = SlideInput(file, "", slide_fingerprint(file.uri))
                slide = PlannedSlide(source, "d", facts, 1, 1)
                task = RegionTask(slide, region)
                commit.plan(SlideTask(source), Plan(slide, (task,)))
                finish = Finish(FinishedMask(""))
                commit.region(task, Stored(record(0.0), finish))
                if index % max(1, count // 10) == 0:
                    marks.append(round(resident_mib(), 1))
            commit.close()
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
