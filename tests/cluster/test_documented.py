"""The commands of README and docs, run as they are written, on small things.

Trainings are made smaller by further overrides, and those that only repeat another are
left out; Ray Train's workers are those of README's, the others' loops run here.
"""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from documents import lines_of, steps
from PIL import Image

from medray import cli
from medray.models.classifiers import build_classifier
from medray.models.config import Architecture

SMALLER = {
    "unet": "model.encoder=tu-test_resnet window.size=128 window.stride=128 "
    "data.crop=128 data.samples=16 batch=4 schedule.epochs=1",
    "malaria-resnet50v2": "model.encoder=test_resnet schedule.epochs=1",
    "pneumonia-transfer": "model.encoder=test_resnet weights=encoder.pth schedule.epochs=3 "
    'schedule.phases=[{"epochs":1,"train":"head"},{"epochs":1,"train":"last","stages":2},'
    '{"train":"all"}]',
}


def run(commands: Iterable[list[str]]) -> list[str]:
    """Run commands of medray and of Python; return the names of medray's."""
    names: list[str] = []
    for program, *words in commands:
        if program == "python":
            subprocess.run([sys.executable, *words], check=True)
        if program == "medray":
            if words[0] in ("train", "tune"):
                words += SMALLER.get(words[1], "").split()
            assert cli.main(words) == 0, words
            names.append(words[0])
    return names


def lay_out(folder: Path, slides: Path, **given: Path) -> Path:
    """Put into a folder what the pages start from."""
    places = dict.fromkeys(("SLIDES", "NEW_SLIDES", "slides"), slides / "slides")
    places |= dict.fromkeys(
        ("OUTLINES", "ANNOTATIONS", "NEW_ANNOTATIONS"), slides / "annotations"
    )
    for name, place in (places | given).items():
        (folder / name).symlink_to(place)
    return folder


@pytest.fixture(scope="module")
def made(cluster: None, slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make what the commands of README make."""
    folder = lay_out(tmp_path_factory.mktemp("readme"), slides)
    with contextlib.chdir(folder):
        names = run(lines_of("README.md", "medray ingest"))
    assert names == ["ingest", "train", "infer", "evaluate"]
    return folder


def test_the_first_commands_end_in_a_report(made: Path) -> None:
    assert "F1" in (made / "report" / "report.html").read_text()


def test_a_look_before_the_work(slides: Path, tmp_path: Path) -> None:
    with contextlib.chdir(lay_out(tmp_path, slides)):
        assert run(lines_of("docs/annotations.md")) == ["check"]
    assert (tmp_path / "checked" / "check.html").exists()


def test_the_tutorial(made: Path, slides: Path, tmp_path: Path) -> None:
    """But for its training, which is README's."""
    (tmp_path / "demo").mkdir()
    places = {"known": slides, "new": slides, "model": made / "model"}
    for name, place in places.items():
        (tmp_path / "demo" / name).symlink_to(place)
    with contextlib.chdir(tmp_path):
        lines = lines_of("docs/tutorial.md")
        names = run(line for line in lines if line[1] not in ("train", "view"))
    assert names == ["check", "ingest", "infer", "evaluate"]
    assert (tmp_path / "checked" / "check.html").exists()
    assert (tmp_path / "report" / "report.html").exists()


def test_a_page_of_a_run(made: Path, slides: Path, tmp_path: Path) -> None:
    given = {name: made / name for name in ("run", "report")}
    given["REPORT"] = made / "report"
    lines = [line for line in lines_of("docs/view.md") if line[0] == "medray"]
    assert len(lines) == 3
    with contextlib.chdir(lay_out(tmp_path, slides, **given)):
        for _, *words in lines:
            process = subprocess.Popen(
                [sys.executable, "-m", "medray.cli", *words, "--port", "0", "--json"],
                stdout=subprocess.PIPE,
                text=True,
            )
            assert process.stdout is not None
            told = json.loads(process.stdout.readline())
            assert told["slides"] == 4
            assert told["truth"]
            assert httpx2.get(told["url"]).status_code == 200
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
            assert process.returncode == 130


def test_features_of_slides(made: Path, slides: Path, tmp_path: Path) -> None:
    torch.manual_seed(9)
    state = timm.create_model("resnet18", num_classes=0).state_dict()
    safetensors.torch.save_file(state, tmp_path / "resnet18.safetensors")
    with contextlib.chdir(lay_out(tmp_path, slides)):
        embed, *_ = lines_of("docs/slide-labels.md")
        assert run([embed]) == ["embed"]  # for the others see test_slide_labels


def test_masks_for_other_viewers(made: Path, slides: Path, tmp_path: Path) -> None:
    given = {name: made / name for name in ("run", "dataset")}
    with contextlib.chdir(lay_out(tmp_path, slides, **given)):
        assert run(lines_of("docs/viewers.md", "medray convert")) == ["convert"] * 6
    for folder in ("both", "old", "masks", "fiji", "asap", "images"):
        assert len([*(tmp_path / folder).glob("*.*")]) >= 4


def test_a_model_that_was_exported(made: Path, slides: Path, tmp_path: Path) -> None:
    given = {name: made / name for name in ("model", "dataset")}
    with contextlib.chdir(lay_out(tmp_path, slides, **given)):
        assert run(lines_of("docs/export.md", "medray export")) == ["export", "infer"]


def test_regions_come_back_corrected(made: Path, slides: Path, tmp_path: Path) -> None:
    with contextlib.chdir(lay_out(tmp_path, slides, model=made / "model")):
        lines = lines_of("docs/qupath.md", "medray review", "to_correct")
        names = run(line for line in lines if line[1] != "train")
    assert names == ["infer", "review", "ingest"]


@pytest.mark.usefixtures("trained_here")
def test_cells_with_contours(cluster: None, slides: Path, tmp_path: Path) -> None:
    with contextlib.chdir(lay_out(tmp_path, slides)):
        names = run(lines_of("docs/training.md", "generate_cells"))
    assert names == ["ingest", "train", "evaluate"]


def draw_classes(
    folder: Path, names: Iterable[str], file: str, count: int, seed: int = 7
) -> None:
    """Write images of 50 x 50 into a folder a class; each class is brighter."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(
                90 + 60 * label, 150 + 60 * label, (50, 50, 3), "uint8"
            )
            Image.fromarray(pixels).save(folder / name / file.format(number))


@pytest.mark.usefixtures("trained_here")
def test_x_rays(cluster: None, slides: Path, tmp_path: Path) -> None:
    torch.manual_seed(4)
    encoder: Any = build_classifier(
        Architecture("classifier", "test_resnet"), 2
    ).encoder
    torch.save(encoder.state_dict(), tmp_path / "encoder.pth")
    for seed, split in enumerate(("train", "test")):
        folder, file = tmp_path / "chest_xray" / split, f"IM-{seed}{{:03}}-0001.jpeg"
        draw_classes(folder, ("NORMAL", "PNEUMONIA"), file, 12, seed)
    with contextlib.chdir(lay_out(tmp_path, slides)):
        names = run(lines_of("docs/training.md", "chest_xray"))
    assert names == ["ingest", "train"]


def test_a_sweep(made: Path, slides: Path, tmp_path: Path) -> None:
    """Of the three of the page that over a grid, with half of its trials."""
    with contextlib.chdir(lay_out(tmp_path, slides, dataset=made / "dataset")):
        lines = lines_of("docs/training.md", "medray tune")
        (line,) = (line for line in lines if "--grid" in line)
        names = run([[word.replace("batch=[4,8]", "batch=[4]") for word in line]])
    assert names == ["tune"]
    assert (tmp_path / "sweep" / "tune.html").exists()


@pytest.mark.usefixtures("trained_here")
def test_classifiers(cluster: None, slides: Path, tmp_path: Path) -> None:
    """The page on images, with a third model that it takes as given; and why a class."""
    cells = tmp_path / "cell_images"
    draw_classes(cells, ("Uninfected", "Parasitized"), "C{0}P{0}ThinF_cell.png", 24)
    with contextlib.chdir(lay_out(tmp_path, slides)):
        ingest, train, *evaluate, on_slides = steps("docs/images.md")
        assert run([*ingest, *train]) == ["ingest", "train", "train"]
        shutil.copytree("second", "third")
        assert run(line for block in evaluate for line in block) == ["evaluate"] * 5
        assert "--probabilities" in on_slides[1]  # see test_slide_classifier
        draw_classes(cells / "test", ("",), "{}.png", 2)
        explain = lines_of("docs/training.md", "medray explain")
        assert run(explain) == ["explain"] * 2
