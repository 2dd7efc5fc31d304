"""How near `medray ingest` comes to a plain loop that does the same work.

In one run, interleaved, over the same slides:

    loop     two processes, without Ray: plan, decode, tissue, labels, both pyramids,
             digests, zarr, by the same functions; its processes are there and warm
    ray      `medray ingest --executor ray`, a new process each time, with Ray's start
    here     the same with `--executor processes`, without Ray
    other    `medray ingest` of another checkout, such as an earlier version

`busy` is the time from the first region to the last commit; `whole` that of the
command. Without `other` only the first three are compared.

Run: python -m benchmarks.throughput.ingest flat --slides 48 --rounds 3
     python -m benchmarks.throughput.ingest pyramid --side 20480 --rounds 3
"""

import functools
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import harness
from medray.annotations.matching import match_annotations
from medray.classes import Classes
from medray.datasets.dataset import DatasetSettings, open_dataset
from medray.datasets.ingest_slides import ingest_stage
from medray.datasets.synthetic import generate, write_pyramid, write_svg
from medray.datasets.synthetic_scene import draw_scene
from medray.execution.stage import do_region, finish_slide, plan_slide
from medray.execution.tasks import FinishTask, Plan, SlideInput, SlideTask, Stored
from medray.slides.discovery import find_slides
from medray.slides.fingerprint import fingerprint_of
from medray.storage.files import read_table

SETTINGS = DatasetSettings(classes=Classes(("background", "tumour")))


@functools.lru_cache(maxsize=1)
def _stage(out: str) -> Any:
    return ingest_stage(SETTINGS, out)


def _plan(job: tuple[str, SlideTask]) -> Any:
    out, task = job
    plan = plan_slide(_stage(out), task)
    assert isinstance(plan, Plan), plan
    if plan.slide.regions == 1:  # done at once, with its pyramids
        return plan, [_region((out, plan.todo[0]))]
    return plan, []


def _region(job: tuple[str, Any]) -> Any:
    out, task = job
    stored = do_region(_stage(out), task)
    assert isinstance(stored, Stored), stored
    return task, stored.record


def _finish(job: tuple[str, Any]) -> Any:
    out, task = job
    return finish_slide(_stage(out), task)


def loop(pool: Any, data: Path, out: Path) -> dict[str, float]:
    """Ingest in two processes that are there."""
    start = time.perf_counter()
    slides = find_slides([str(data / "slides")])
    annotations = match_annotations(slides, str(data / "annotations"))
    open_dataset(str(out), SETTINGS)
    tasks = []
    for file in slides:
        annotation = annotations.get(file.slide, "")
        fingerprint = fingerprint_of(file.uri, annotation)
        tasks.append(SlideTask(SlideInput(file, annotation, fingerprint)))
    jobs = [(str(out), task) for task in tasks]
    for plan, done in pool.imap_unordered(_plan, jobs):
        if done:
            continue
        regions = [(str(out), task) for task in plan.todo]
        records = {task.index: r for task, r in pool.imap_unordered(_region, regions)}
        pool.apply(_finish, ((str(out), FinishTask(plan.slide, records)),))
    return {"busy": time.perf_counter() - start}


def command(tree: Path, data: Path, out: Path, *more: str) -> dict[str, float]:
    """Run `medray ingest` of a checkout."""
    start = time.perf_counter()
    words = ["ingest", str(data / "slides"), "--out", str(out)]
    words += ["--annotations", str(data / "annotations"), "--json", *more]
    subprocess.run(
        [sys.executable, "-m", "medray.cli", *words],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    whole = time.perf_counter() - start
    rows = read_table(str(out / "slides.parquet")).to_pylist()
    first = min(row["first_cut_at"] for row in rows)
    last = max(row["committed_at"] for row in rows)
    return {"busy": last - first, "whole": whole}


def _compare(data: Path, rounds: int, other: str, **facts: Any) -> harness.Rounds:
    commands: dict[str, tuple[Any, ...]] = {
        "ray": (harness.ROOT, "--executor", "ray"),
        "here": (harness.ROOT, "--executor", "processes"),
    }
    if other:
        commands["other"] = (Path(other).absolute(),)
    with (
        multiprocessing.get_context("spawn").Pool(2) as pool,
        tempfile.TemporaryDirectory() as name,
    ):
        count = iter(range(1000))

        def out() -> Path:
            return Path(name) / f"{next(count)}"

        variants = {"loop": lambda: loop(pool, data, out())}
        for variant, (tree, *more) in commands.items():
            variants[variant] = functools.partial(
                lambda tree, more: command(tree, data, out(), *more), tree, more
            )
        return harness.interleaved(variants, rounds, **facts)


def flat(slides: int = 48, rounds: int = 3, other: str = "") -> Iterator[Any]:
    """Compare on flat slides of 2048 px.

    Args:
        slides: Number of generated slides.
        rounds: Number of rounds.
        other: Another checkout to compare with.
    """
    with tempfile.TemporaryDirectory() as name:
        data = Path(name)
        generate(data, slides=slides, seed=1)
        yield _compare(data, rounds, other, slides=slides)


def pyramid(side: int = 20480, rounds: int = 3, other: str = "") -> Iterator[Any]:
    """Compare on one slide with pyramid levels.

    Args:
        side: Of the slide in pixels.
        rounds: Number of rounds.
        other: Another checkout to compare with.
    """
    with tempfile.TemporaryDirectory() as name:
        data = Path(name)
        (data / "slides").mkdir()
        write_pyramid(data / "slides" / "large.tif", side, side)
        (data / "annotations").mkdir()
        write_svg(data / "annotations", "large", draw_scene(0))  # of its first field
        yield _compare(data, rounds, other, side=side)


if __name__ == "__main__":
    harness.run(flat, pyramid)
