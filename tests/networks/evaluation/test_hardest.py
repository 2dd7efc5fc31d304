"""`medray review --by-loss`: the hardest images of reports that had not seen them."""

import csv
import json
import math
from pathlib import Path

import pytest
from image_cells import write_cells

from medray.cli import main
from medray.datasets import read_patches
from medray.datasets.image_folder import ingest_images
from medray.types import Row


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("hardest")
    cells = write_cells(folder / "cells", patients=4, each=2)
    out = str(folder / "data")
    ingest_images(str(cells), out=out, side=32, patients="^(P\\d+)", executor="local")
    return out


def report(folder: Path, rows: list[Row], sick: dict[str, float]) -> str:
    """Write the images.csv of a report, with a probability of `sick` for each image."""
    folder.mkdir()
    with (folder / "images.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        names = ("image", "digest", "patient", "truth", "predicted")
        writer.writerow([*names, "p_healthy", "p_sick"])
        for row in rows:
            share = sick.get(row["image"], 0.9 if row["class"] == "sick" else 0.1)
            predicted = "sick" if share > 0.5 else "healthy"
            values = (row["image"], row["digest"], row["patient"], row["class"])
            writer.writerow([*values, predicted, round(1 - share, 4), share])
    return str(folder)


def all_rows(dataset: str) -> list[Row]:
    rows = [r for s in ("train", "val", "test") for r in read_patches(dataset, s)]
    return [row | {"class": row["image"].split("/")[0]} for row in rows]


def test_the_greatest_loss_comes_first_and_doubted_labels_are_counted(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = all_rows(dataset)
    healthy = [row["image"] for row in rows if row["class"] == "healthy"]
    halves = rows[::2], rows[1::2]
    shares = {healthy[0]: 0.99, healthy[1]: 0.6, healthy[2]: 1.0}
    reports = [
        report(tmp_path / f"r{k}", half, shares) for k, half in enumerate(halves)
    ]
    out = tmp_path / "out"
    words = [
        "review",
        *reports,
        "--by-loss",
        dataset,
        "--out",
        str(out),
        "--count",
        "4",
    ]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["shown"], found["doubted"]) == (len(rows), 4, 2)
    assert found["accuracy"] == pytest.approx(1 - 3 / len(rows))
    assert found["undoubted_accuracy"] == pytest.approx(1 - 1 / (len(rows) - 2))
    with (out / "hardest.csv").open() as file:
        ranked = list(csv.DictReader(file))
    assert len(ranked) == len(rows)
    assert [row["image"] for row in ranked[:3]] == [healthy[2], healthy[0], healthy[1]]
    assert [row["doubted"] for row in ranked[:3]] == ["true", "true", "false"]
    assert float(ranked[1]["loss"]) == pytest.approx(-math.log(0.01), abs=1e-3)
    page = (out / "hardest.html").read_text()
    assert page.count("<img") == 4
    assert all(name in page for name in healthy[:3])


def test_of_several_reports_the_mean_loss_counts(dataset: str, tmp_path: Path) -> None:
    rows = all_rows(dataset)
    one, other = rows[0]["image"], rows[1]["image"]
    wrong = {row["image"]: 0.1 if row["class"] == "sick" else 0.9 for row in rows[:2]}
    both = report(tmp_path / "a", rows, wrong), report(tmp_path / "b", rows, {})
    alone = report(tmp_path / "c", rows, {one: wrong[one]})
    out = tmp_path / "out"
    assert main(["review", *both, alone, "--by-loss", dataset, "--out", str(out)]) == 0
    with (out / "hardest.csv").open() as file:
        ranked = list(csv.DictReader(file))
    assert [row["image"] for row in ranked[:2]] == [one, other]
    mean = (2 * -math.log(0.1) - math.log(0.9)) / 3
    assert float(ranked[0]["loss"]) == pytest.approx(mean, abs=1e-3)


def test_what_is_asked_wrongly_is_refused(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = report(tmp_path / "r", all_rows(dataset), {})
    out = ["--out", str(tmp_path / "out")]
    assert main(["review", rows, rows, *out]) == 2
    assert "--by-loss" in capsys.readouterr().err
    assert main(["review", str(tmp_path), "--by-loss", dataset, *out]) == 2
    assert "images.csv" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
