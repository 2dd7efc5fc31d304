"""`medray ingest --dry-run` says what ingest will do, and writes nothing."""

from __future__ import annotations

import csv
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from medray.apps.dry_images import dry_ingest_images
from medray.apps.dry_ingest import IngestPlan, dry_ingest
from medray.cli import main
from medray.datasets.dataset import open_dataset
from medray.datasets.image_folder import ingest_images
from medray.datasets.images_request import settle_images
from medray.datasets.ingest_request import settle_ingest
from medray.datasets.ingest_slides import ingest, ingest_settled
from medray.datasets.splits import SPLITS
from medray.errors import MedrayError

CLASSES = ("background", "tumour", "stroma")
Box = tuple[int, int, int, int]  # x0, y0, x1, y1


def write_slide(folder: Path, name: str, seed: int, side: int = 96) -> None:
    (folder / "s").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    pink = rng.integers(0, 60, (side, side, 3)) + np.array([190, 90, 160])
    pixels = pink.astype(np.uint8)
    options: Any = {"tile": (64, 64)} if side > 2048 else {}
    tifffile.imwrite(folder / "s" / f"{name}.tif", pixels, photometric="rgb", **options)


def write_outline(folder: Path, name: str, *areas: tuple[str, Box]) -> None:
    (folder / "a").mkdir(parents=True, exist_ok=True)
    features = []
    for kind, (x0, y0, x1, y1) in areas:
        ring = [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]
        shape = {"type": "Polygon", "coordinates": [ring]}
        properties = {"classification": {"name": kind}}
        features.append(
            {"type": "Feature", "geometry": shape} | {"properties": properties}
        )
    text = json.dumps({"type": "FeatureCollection", "features": features})
    (folder / "a" / f"{name}.geojson").write_text(text)


def write_table(path: Path, column: str, rows: dict[str, str]) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("slide", column), *rows.items()])
    return str(path)


def everything(folder: Path) -> dict[str, tuple[bytes, int]]:
    """All files with their bytes and times."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def dry(folder: Path, **options: Any) -> IngestPlan:
    before, inside = everything(folder), sorted(folder.rglob("*"))
    plan = dry_ingest(
        settle_ingest(
            [str(folder / "s")],
            out=str(folder / "d"),
            annotations=str(folder / "a"),
            classes=CLASSES,
            **options,
        ),
        executor="local",
    )
    assert everything(folder) == before
    assert sorted(folder.rglob("*")) == inside
    return plan


def real(folder: Path, **options: Any) -> Any:
    return ingest(
        [str(folder / "s")],
        out=str(folder / "d"),
        annotations=str(folder / "a"),
        classes=CLASSES,
        executor="local",
        **options,
    )


def splits_of(folder: Path) -> dict[str, str]:
    rows = pq.read_table(folder / "d" / "slides.parquet").to_pylist()
    return {row["slide"]: row["split"] for row in rows if row["status"] == "done"}


def told(plan: IngestPlan) -> dict[str, str]:
    rows = plan.checked.slides
    return {r["slide"]: r["split"] for r in rows if r["slide"] not in plan.failed}


# --- it tells what ingest does --------------------------------------------------------

PARTS = {
    "none": (),
    "some": (("tumour", (8, 8, 60, 60)),),
    "two": (("tumour", (8, 8, 60, 60)), ("stroma", (50, 0, 96, 20))),
    "hidden": (("stroma", (20, 20, 40, 40)), ("tumour", (8, 8, 60, 60))),
    "all": (("tumour", (-1, -1, 99, 99)),),
    "tiny": (("stroma", (30, 30, 30, 31)), ("tumour", (8, 8, 60, 60))),
    "partly": (("Region*", (0, 0, 80, 80)), ("tumour", (8, 8, 60, 60))),
    "partly whole": (("Region*", (-1, -1, 99, 99)), ("tumour", (8, 8, 60, 60))),
}
NAMES = [f"s{number}" for number in range(9)]
fractions = st.sampled_from([(0.7, 0.15, 0.15), (0.4, 0.3, 0.3), (0.5, 0.5, 0.0)])
requests = st.fixed_dictionaries(
    {
        "slides": st.sets(st.sampled_from(NAMES), min_size=3),
        "fractions": fractions,
        "seed": st.integers(0, 9),
        "groups": st.none() | st.lists(st.integers(0, 4), min_size=9, max_size=9),
        "splits": st.none()
        | st.none()
        | st.lists(st.sampled_from(SPLITS), min_size=9, max_size=9),
        "remove": st.booleans(),
    }
)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    parts=st.lists(st.sampled_from(sorted(PARTS)), min_size=9, max_size=9),
    copies=st.sets(st.sampled_from(NAMES[:4]), max_size=2),
    asked=st.lists(requests, min_size=2, max_size=2),
    changed=st.sets(st.sampled_from(NAMES), max_size=3),
)
def test_splits_are_those_that_ingest_deals(
    parts: list[str],
    copies: set[str],
    asked: list[dict[str, Any]],
    changed: set[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Of a first request and a second one, with slides that changed in between."""
    folder = tmp_path_factory.mktemp("dry")
    try:
        for turn, request in enumerate(asked):
            shutil.rmtree(folder / "s", ignore_errors=True)
            for number, name in enumerate(NAMES):
                if name not in request["slides"]:
                    continue
                seed = 0 if name in copies else number + 1
                write_slide(folder, name, seed + 100 * (turn and name in changed))
                if parts[number] != "none" or turn:
                    write_outline(folder, name, *PARTS[parts[number]])
            options: dict[str, Any] = {
                "fractions": request["fractions"],
                "seed": request["seed"],
            }
            here = sorted(request["slides"])
            for what, column in (("groups", "group"), ("splits", "split")):
                if request[what] is not None and not (
                    what == "groups" and request["splits"]
                ):
                    rows = {name: f"{request[what][int(name[1])]}" for name in here}
                    path = folder / f"{what}.csv"
                    options[what] = write_table(path, column, rows)
            if turn and not request["slides"].isdisjoint(asked[0]["slides"]):
                options["remove_missing"] = request["remove"]
            plan = dry(folder, **options)
            before = splits_of(folder) if turn else {}
            done = real(folder, **options)
            after = splits_of(folder)
            assert told(plan) == {name: after[name] for name in here}
            assert done.failed == plan.failed == {}
            assert done.done == len(plan.new) + len(plan.changed)
            assert done.skipped == len(plan.unchanged)
            assert done.regions == plan.regions
            assert set(plan.new) == request["slides"] - before.keys()
            assert set(plan.missing) == before.keys() - request["slides"]
            said = {text for text in done.warnings if "taken out" not in text}
            assert said == set(plan.warnings)
            moved = [
                name
                for name in after
                if before.get(name) not in (None, "", after[name])
            ]
            assert [text.split()[0] for text in plan.moved] == moved
    finally:
        shutil.rmtree(folder)


def test_what_changed_what_is_new_and_what_is_gone(tmp_path: Path) -> None:
    for number, name in enumerate(("same", "moved", "other", "outline", "gone")):
        write_slide(tmp_path, name, number)
        write_outline(tmp_path, name, ("tumour", (8, 8, 60, 60)))
    plan = dry(tmp_path)
    assert plan.new == ["gone", "moved", "other", "outline", "same"]
    assert not (tmp_path / "d").exists()
    real(tmp_path)
    os.utime(tmp_path / "s" / "moved.tif", (1, 1))
    write_slide(tmp_path, "other", 9)
    write_outline(tmp_path, "outline", ("stroma", (8, 8, 60, 60)))
    (tmp_path / "s" / "gone.tif").unlink()
    write_slide(tmp_path, "new", 7)
    (tmp_path / "s" / "text.svs").write_text("no slide")
    plan = dry(tmp_path)
    assert plan.new == ["new"]
    assert plan.changed == ["other", "outline"]
    assert plan.unchanged == ["moved", "same"]
    assert plan.missing == ["gone"]
    assert [*plan.failed] == ["text"]
    assert "gone" in plan.warnings[0]
    done = real(tmp_path)
    assert (done.done, done.skipped, [*done.failed]) == (3, 2, ["text"])
    assert done.failed == plan.failed
    assert told(plan).items() <= splits_of(tmp_path).items()
    plan = dry(tmp_path)
    assert (plan.new, plan.changed) == ([], [])
    assert (plan.regions, plan.pixels, plan.output_bytes) == (0, 0, 0)


def test_regions_that_are_left_of_a_slide(tmp_path: Path) -> None:
    """Those that were committed before it was interrupted are not done again."""
    write_slide(tmp_path, "large", 0, side=4160)
    write_outline(tmp_path, "large", ("tumour", (8, 8, 900, 4000)))
    plan = dry(tmp_path)
    assert plan.regions == 9
    assert plan.pixels == 4160**2
    assert plan.output_bytes == 4160**2 * 4 * 4 // 3
    assert 0 < plan.likely_bytes < 2 * plan.output_bytes
    assert plan.tried == 3
    assert 0 < plan.seconds[0] <= plan.seconds[1]
    calls = itertools.count()

    def check() -> None:
        if next(calls) == 5:
            raise MedrayError("enough")

    options: Any = {"annotations": str(tmp_path / "a"), "classes": CLASSES}
    request = settle_ingest([f"{tmp_path}/s"], out=f"{tmp_path}/d", **options)
    open_dataset(request.out, request.settings)
    with pytest.raises(MedrayError, match="enough"):
        ingest_settled(request, "local", check)
    left = dry(tmp_path)
    assert left.regions == 5
    assert left.pixels < plan.pixels
    assert real(tmp_path).regions == 5


# --- it refuses what ingest refuses ---------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, and tables that do not fit."""
    folder = tmp_path_factory.mktemp("refused")
    for number, name in enumerate(("one", "two", "three")):
        write_slide(folder, name, number)
        write_outline(folder, name, ("tumour", (8, 8, 60, 60)))
    real(folder)
    write_table(folder / "unknown.csv", "group", {"one": "A", "nobody": "B"})
    write_table(folder / "splits.csv", "split", {"one": "train", "two": "test"})
    write_table(folder / "groups.csv", "group", {"one": "A", "two": "A"})
    write_table(folder / "bad.csv", "split", {"one": "somewhere"})
    (folder / "other").mkdir()
    write_slide(folder / "other", "one", 8)
    write_slide(folder / "other", "four", 9)
    (folder / "empty").mkdir()
    images = folder / "images"
    for name in ("a", "b"):
        (images / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), (len(name), 9, 9)).save(images / name / "x.png")
    return folder


WRONG = {
    "no slides": "{f}/empty --out {f}/new",
    "no folder": "{f}/nowhere --out {f}/new",
    "fractions": "{f}/s --out {f}/new --fractions 0.5,0.4,0.3",
    "mpp": "{f}/s --out {f}/new --mpp 1e9",
    "no table": "{f}/s --out {f}/new --groups {f}/none.csv",
    "a row too many": "{f}/s --out {f}/new --groups {f}/unknown.csv",
    "a wrong split": "{f}/s --out {f}/new --splits {f}/bad.csv",
    "a group apart": "{f}/s --out {f}/new --splits {f}/splits.csv --groups {f}/groups.csv",
    "annotations": "{f}/s --out {f}/new --annotations {f}/none",
    "classes": "{f}/s --out {f}/d --annotations {f}/a --classes background,tumour",
    "another slide": "{f}/other/s/one.tif --out {f}/d --classes background,tumour,stroma",
    "twice": "{f}/s/one.tif {f}/other/s --out {f}/d --classes background,tumour,stroma",
    "nothing left": "{f}/other/s/four.tif --out {f}/d --remove-missing "
    "--classes background,tumour,stroma",
    "side": "{f}/images --side 33 --out {f}/new",
    "no classes": "{f}/s --side 32 --out {f}/new",
    "patients": "{f}/images --side 32 --patients ( --out {f}/new",
    "images into slides": "{f}/images --side 32 --out {f}/d",
    "does not go": "{f}/images --side 32 --scene 1 --out {f}/new",
    "contours of slides": "{f}/s --contours --out {f}/new",
    "remove missing images": "{f}/images --side 32 --remove-missing --out {f}/new",
}


@pytest.mark.parametrize("name", WRONG)
def test_what_ingest_refuses_is_refused_alike(
    name: str, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = WRONG[name].format(f=made).split()
    before = everything(made)

    def outcome(*more: str) -> tuple[int, str]:
        code = main(["ingest", *words, "--executor", "local", "--json", *more])
        return code, json.loads(capsys.readouterr().out)["error"]

    tried = outcome("--dry-run")
    assert everything(made) == before
    assert tried == outcome()
    assert tried[0] == 2


def test_codes_and_json(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made / "s", tmp_path / "s")
    words = ["ingest", str(tmp_path / "s"), "--out", str(tmp_path / "d")]
    words += ["--executor", "local", "--dry-run"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["new"] == ["one", "three", "two"]
    assert len(found["checked"]["slides"]) == 3
    (tmp_path / "s" / "text.svs").write_text("no slide")
    assert main(words) == 3
    shown = capsys.readouterr().out
    assert "failed    text: " in shown
    assert shown.splitlines()[-1].startswith("ingest: would do 3 new")
    assert main([*words, "--partial-ok"]) == 0
    assert not (tmp_path / "d").exists()


# --- class folders --------------------------------------------------------------------


def test_class_folders(tmp_path: Path) -> None:
    """Splits, copies and what cannot be read are those of the dataset."""
    rng = np.random.default_rng(3)
    for name in ("sick", "well"):
        (tmp_path / "i" / name).mkdir(parents=True)
        for number in range(15):
            pixels = rng.integers(0, 255, (30, 30, 3), np.uint8)
            path = tmp_path / "i" / name / f"P{number // 2}_{number}.png"
            Image.fromarray(pixels).save(path)
    shutil.copy(tmp_path / "i/sick/P0_0.png", tmp_path / "i/sick/P0_99.png")
    (tmp_path / "i" / "well" / "P5_50.png").write_bytes(b"no image")
    asked: dict[str, Any] = {"side": 32, "patients": r"P\d+", "seed": 4}
    asked |= {"out": str(tmp_path / "d")}
    request = settle_images(str(tmp_path / "i"), **asked)
    before = everything(tmp_path)
    plan = dry_ingest_images(request, executor="local")
    assert everything(tmp_path) == before
    assert not (tmp_path / "d").exists()
    done = ingest_images(str(tmp_path / "i"), executor="local", **asked)
    assert [*plan.failed] == [*done.failed]
    assert [*done.failed] == ["well/P5_50.png"]
    assert [*plan.left_out] == ["sick/P0_99.png"]
    assert (plan.images, plan.done) == (done.images, 0)
    rows = pq.read_table(tmp_path / "d" / "images.parquet").to_pylist()
    for row in plan.splits:
        some = [
            one
            for one in rows
            if one["split"] == row["split"] and one["status"] == "done"
        ]
        assert row["images"] == len(some)
        assert row["patients"] == len({one["patient"] for one in some})
        for name in plan.classes:
            count = sum(one["class"] == name for one in some)
            assert row[f"images_{name}"] == count
    slides = pq.read_table(tmp_path / "d" / "slides.parquet").num_rows
    assert plan.sheets == slides
    again = dry_ingest_images(request, executor="local")
    assert (again.images, again.done) == (0, done.images)
    assert again.failed == done.failed
