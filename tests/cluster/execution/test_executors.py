"""Where a stage runs does not show: on Ray, in processes and in this one it writes the same."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import safetensors.torch
import timm
import torch
from stages import empty_stage

import medray
from medray.apps.convert import convert
from medray.cli import main
from medray.datasets.image_folder import ingest_images
from medray.datasets.synthetic_cells import generate_cells
from medray.errors import ConfigError
from medray.execution.run import run_stage
from medray.inference.estimate_run import estimate
from medray.inference.postprocess import Cleaning
from medray.inference.run import Options
from medray.mil.embed_slides import embed
from medray.models.config import Prediction
from medray.slides.discovery import find_slides
from medray.storage.ledger import Ledger
from medray.types import Executor, Row

EXECUTORS: tuple[Executor, ...] = ("local", "processes", "ray")
TIMES = ("_at", "_s", "seconds")


def contents(folder: Path, *patterns: str) -> dict[str, bytes]:
    paths = {p for one in patterns for p in folder.glob(one) if p.is_file()}
    assert paths
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(paths)}


def table(path: Path) -> list[Row]:
    """Rows without what tells when and how fast."""
    rows = pq.read_table(path).to_pylist()
    return [{k: v for k, v in row.items() if not k.endswith(TIMES)} for row in rows]


def of_each(folder: Path, make: Callable[[Path, Executor], object]) -> list[Path]:
    for executor in EXECUTORS:
        make(folder / executor, executor)
    return [folder / executor for executor in EXECUTORS]


@pytest.fixture(scope="module")
def inbox(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides, and one that is none."""
    folder = tmp_path_factory.mktemp("inbox")
    shutil.copytree(slides / "slides", folder, dirs_exist_ok=True)
    (folder / "wreck.tif").write_bytes(b"II*\0no slide")
    return folder


def test_ingest(cluster: None, inbox: Path, slides: Path, tmp_path: Path) -> None:
    here, *others = of_each(
        tmp_path,
        lambda out, executor: medray.ingest(
            [str(inbox)],
            out=str(out),
            annotations=str(slides / "annotations"),
            executor=executor,
        ),
    )
    for there in others:
        assert contents(here, "slides/**/*") == contents(there, "slides/**/*")
    for name, there in itertools.product(("slides.parquet", "patches.parquet"), others):
        assert table(here / name) == table(there / name)
    rows = {row["slide"]: row for row in table(here / "slides.parquet")}
    assert rows["wreck"]["status"] == "failed"
    assert sum(row["status"] == "done" for row in rows.values()) == 4


def test_images(cluster: None, tmp_path: Path) -> None:
    generate_cells(tmp_path / "cells", clusters=2, each=4)
    here, *others = of_each(
        tmp_path,
        lambda out, executor: ingest_images(
            str(tmp_path / "cells"), out=str(out), side=64, executor=executor
        ),
    )
    for there in others:
        assert contents(here, "slides/**/*") == contents(there, "slides/**/*")
    for name, there in itertools.product(
        ("slides.parquet", "patches.parquet", "images.parquet"), others
    ):
        assert table(here / name) == table(there / name)


def test_infer_evaluate_and_convert(
    cluster: None, inbox: Path, slides: Path, model: Path, tmp_path: Path
) -> None:
    options = Options(
        prediction=Prediction(precision="float32", quality=True),
        clean=Cleaning(smooth=2),
        outlines=True,
        coarse=2,
    )
    here, *others = of_each(
        tmp_path,
        lambda out, executor: medray.infer(
            [str(inbox)],
            model=str(model),
            out=str(out / "run"),
            options=options,
            executor=executor,
        ),
    )
    made = ("run/masks/**/*", "run/outlines/*", "run/coarse/masks/**/*")
    for there in others:
        assert contents(here, *made) == contents(there, *made)
    name = "run/slides.parquet"
    for there in others:
        assert table(here / name) == table(there / name)

    def look(out: Path, executor: Executor) -> None:
        truth = str(slides / "annotations")
        medray.evaluate(
            str(out / "run"), truth=truth, out=str(out / "report"), executor=executor
        )
        convert(str(out / "run"), to="tiff", out=str(out / "copies"), executor=executor)

    of_each(tmp_path, look)
    for there in others:
        assert contents(here, "copies/*.tif") == contents(there, "copies/*.tif")
    name = "report/per_slide.parquet"
    for there in others:
        assert table(here / name) == table(there / name)


def test_plan(cluster: None, inbox: Path, model: Path, tmp_path: Path) -> None:
    """What does not depend on the machine; the rest is `test_estimate`'s."""
    options = Options(prediction=Prediction(quality=True), region=512)
    here, *others = (
        dataclasses.asdict(
            estimate([str(inbox)], model=str(model), options=options, executor=executor)
        )
        for executor in EXECUTORS
    )
    assert set(here["failed"]) == {"wreck"}
    assert (here["gpu_workers"], here["store_bytes"]) == (1, 0)
    for name, there in itertools.product(
        ("slides", "sampled", "regions", "windows", "output_bytes", "failed"), others
    ):
        assert here[name] == there[name]


def test_embed(cluster: None, inbox: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    network = timm.create_model("test_resnet", num_classes=0)
    weights = str(tmp_path / "weights.safetensors")
    safetensors.torch.save_file(network.state_dict(), weights)
    here, *others = of_each(
        tmp_path,
        lambda out, executor: embed(
            [str(inbox)],
            encoder="test_resnet",
            weights=weights,
            out=str(out),
            tile=96,
            precision="float32",
            executor=executor,
        ),
    )
    for there in others:
        assert contents(here, "features/**/*") == contents(there, "features/**/*")
    name = "slides.parquet"
    for there in others:
        assert table(here / name) == table(there / name)


def test_it_stops_between_slides_that_cannot_be_read(tmp_path: Path) -> None:
    """What may not go on is found out at each slide, not only at regions."""
    for number in range(4):
        (tmp_path / f"{number}.tif").write_bytes(b"II*\0no slide")
    ledger, asked = Ledger(str(tmp_path / "out")), itertools.count()

    def check() -> None:
        if next(asked) == 2:
            raise ConfigError("the lock is lost")

    stage = empty_stage(str(tmp_path / "out"), [])
    found = find_slides([str(tmp_path)])
    with pytest.raises(ConfigError, match="lock"):
        run_stage(stage, found, ledger, executor="local", check=check)
    assert len(ledger.slides) == 2


def test_without_ray_ray_is_not_imported(
    slides: Path, model: Path, tmp_path: Path
) -> None:
    code = (
        "import sys\nfrom medray.cli import main\ncode = main(sys.argv[1:])\n"
        "assert 'ray' not in sys.modules\nsys.exit(code)"
    )
    inputs = str(slides / "slides")
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    for command in (
        ("ingest", inputs, "--out", str(tmp_path / "local"), "--executor", "local"),
        ("ingest", inputs, "--out", str(tmp_path / "auto")),
        ("plan", inputs, "--model", str(model), "--executor", "local"),
    ):
        words = [sys.executable, "-c", code, *command]
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr


def test_the_command_asks_for_one_that_there_is(
    slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["ingest", str(slides), "--out", str(tmp_path), "--executor", "dask"])
    assert raised.value.code == 2
    assert 'Choose from: "auto", "ray", "processes", "local"' in capsys.readouterr().err
