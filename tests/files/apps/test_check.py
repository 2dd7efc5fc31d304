"""`medray check` says of slides and annotations what ingest makes of them."""

import base64
import csv
import functools
import html
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import numpy.typing as npt
import psutil
import pytest
import shapely
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from serial_ingest import ingest

import medray
from medray import cli
from medray.annotations import area_measures
from medray.annotations.area_measures import class_areas
from medray.annotations.polygons import Area
from medray.annotations.rasterize import rasterise
from medray.apps.checked import Checked
from medray.classes import Classes
from medray.datasets.dataset import labels_uri, read_patches, slide_uri
from medray.datasets.synthetic_faults import blur
from medray.datasets.synthetic_scene import draw_scene
from medray.errors import ConfigError, LostError, SlideError
from medray.execution.isolation import call_each
from medray.slides.opening import open_slide
from medray.storage import group_attributes, ome_zarr

CLASSES = ("background", "tumour", "stroma")
Box = tuple[int, int, int, int]  # x0, y0, x1, y1


def write_slide(
    path: Path, height: int = 600, width: int = 500, seed: int = 0, **options: Any
) -> None:
    """A slide of pink noise, so that all of it is tissue, at 0.5 um per pixel."""
    rng = np.random.default_rng(seed)
    rgb = rng.integers(0, 60, (height, width, 3)) + np.array([190, 90, 160])
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != ".png":
        options |= {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"}
        options |= {"photometric": "rgb", "metadata": None}
        tifffile.imwrite(path, rgb.astype(np.uint8), **options)
    else:
        Image.fromarray(rgb.astype(np.uint8)).save(path)


def ring(box: Box) -> list[list[int]]:
    x0, y0, x1, y1 = box
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]


def write_geojson(path: Path, *areas: tuple[str, Box] | tuple[str, Box, Box]) -> None:
    """Write areas of a class, each a box, some with a hole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features = [
        {
            "type": "Feature",
            "geometry": {
                "type": "Polygon",
                "coordinates": [ring(box) for box in boxes],
            },
            "properties": {"classification": {"name": name}},
        }
        for name, *boxes in areas
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def rows_of(checked: Checked) -> dict[str, dict[str, Any]]:
    return {row["slide"]: row for row in checked.slides}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides and annotations, right ones and such as people have."""
    root = tmp_path_factory.mktemp("mixed")
    slides, notes = root / "slides", root / "notes"
    for number, name in enumerate(
        ("a/one", "b/one", "holes", "part", "wrong_class", "outside", "bare", "lacks")
    ):
        size = (700 + 64 * number, 400 + 32 * number)
        write_slide(slides / f"{name}.tif", *size, seed=number, tile=(64, 64))
    write_slide(slides / "silent.png", 300, 200)
    (slides / "text.svs").write_text("no slide")
    cut = (slides / "holes.tif").read_bytes()
    (slides / "cut.tif").write_bytes(cut[: len(cut) // 2])
    write_geojson(notes / "a" / "one.geojson", ("tumour", (10, 20, 210, 120)))
    write_geojson(notes / "b" / "one.tif.geojson", ("stroma", (0, 0, 400, 9)))
    write_geojson(
        notes / "holes.geojson",
        ("tumour", (50, 50, 350, 450), (100, 100, 250, 300)),
        ("stroma", (200, 400, 380, 600)),
        ("tumour", (300, 500, 310, 510)),
    )
    write_geojson(
        notes / "part.geojson",
        ("Region*", (0, 0, 400, 600)),
        ("tumour", (30, 40, 90, 140)),
    )
    write_geojson(notes / "wrong_class.geojson", ("Tumor", (10, 10, 90, 90)))
    write_geojson(notes / "outside.geojson", ("tumour", (9000, 10, 9090, 90)))
    write_geojson(notes / "nobody.geojson", ("tumour", (10, 10, 90, 90)))
    write_geojson(notes / "cut.geojson", ("tumour", (10, 10, 90, 90)))
    write_geojson(notes / "silent.geojson", ("stroma", (0, 0, 100, 100)))
    write_geojson(notes / "lacks.geojson", ("tumour", (0, 0, 128, 256)))
    (root / "mpp.csv").write_text("slide,mpp\nsilent,0.25\nholes.tif,0.3\n")
    return root


@pytest.fixture(scope="module")
def checked(mixed: Path) -> Checked:
    return medray.check(
        [str(mixed / "slides")],
        annotations=str(mixed / "notes"),
        classes=CLASSES,
        mpp=str(mixed / "mpp.csv"),
        out=str(mixed / "checked"),
    )


# --- check and ingest agree -----------------------------------------------------------


def test_what_is_said_of_slides_is_what_ingest_writes(
    mixed: Path, checked: Checked, tmp_path: Path
) -> None:
    said = rows_of(checked)
    mpp = str(mixed / "mpp.csv")
    written = ingest(mixed / "slides", tmp_path, mixed / "notes", CLASSES, mpp=mpp)
    assert set(said) == set(written)
    failed = {slide for slide, row in written.items() if row["status"] == "failed"}
    assert failed == {"text", "cut", "wrong_class", "outside"} == set(checked.failed)
    for slide, row in written.items():
        ours = said[slide]
        assert (ours["uri"], ours["annotation"]) == (row["uri"], row["annotation"])
        if row["status"] == "failed":
            assert ours["status"] == "refused"
            assert ours["message"] == row["message"]
            continue
        assert (ours["status"], ours["message"]) == ("ok", "")
        for name in ("height", "width", "mpp", "mpp_from", "magnification", "format"):
            assert ours[name] == row[name], name
        for name in ("annotated", "partly", "areas"):
            assert ours[name] == row[name], name
        if row["annotated"] and not row["partly"]:
            pixels = row["height"] * row["width"]
            for name in CLASSES[1:]:
                share = row[f"px_{name}"] / pixels
                assert ours[f"share_{name}"] == pytest.approx(share, abs=1e-9), name
                mm2 = share * pixels * row["mpp"] ** 2 / 1e6
                assert ours[f"mm2_{name}"] == pytest.approx(mm2)
        for words in (row["note"] or "").split("; "):
            assert words in ours["note"]
    assert said["silent"]["mpp_from"] == "--mpp"
    assert said["bare"]["mpp_from"].startswith("XResolution")
    assert said["holes"]["areas_tumour"] == 2
    assert said["holes"]["areas_stroma"] == 1


def test_what_belongs_to_nothing_is_named(mixed: Path, checked: Checked) -> None:
    assert checked.unused == [str(mixed / "notes" / "nobody.geojson")]
    assert checked.bare == ["bare", "text"]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(CLASSES),
            *[st.integers(0, 40) for _ in range(2)],
            *[st.integers(1, 40) for _ in range(2)],
        ),
        max_size=9,
    )
)
def test_measured_is_what_is_drawn(boxes: list[tuple[str, int, int, int, int]]) -> None:
    classes = Classes(CLASSES)
    areas = [
        Area(shapely.box(x, y, x + width, y + height), name)
        for name, x, y, width, height in boxes
    ]
    labels = rasterise(areas, classes, y=0, x=0, height=90, width=90)
    drawn = np.bincount(labels.ravel(), minlength=3).tolist()
    for most in (
        area_measures._POINTS,
        -1,
    ):  # cut off each other, and drawn and counted
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(area_measures, "_POINTS", most)
            patch.setattr(
                area_measures, "_TIMES", area_measures._TIMES if most > 0 else 0
            )
            found = class_areas(areas, classes)
        assert [count for count, _ in found] == [
            sum(name == each for name, *_ in boxes) for each in CLASSES
        ]
        assert [px for _, px in found][1:] == pytest.approx(drawn[1:])


def blobs(count: int, side: int, radius: int) -> list[Area]:
    """Areas of alternating classes, of 40 points each, all over each other."""
    rng = np.random.default_rng(count)
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    found = []
    for number in range(count):
        y, x = rng.integers(radius, side - radius, 2)
        reach = radius * rng.uniform(0.7, 1, angle.size)
        ring = np.stack([x + reach * np.cos(angle), y + reach * np.sin(angle)], 1)
        found.append(Area(shapely.Polygon(ring), CLASSES[1 + number % 2]))
    return found


def test_many_areas_on_top_of_each_other_are_drawn_and_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is too much to cut off is counted instead, and how exactly is known."""
    areas, classes = blobs(60, 20_000, 5_000), Classes(CLASSES)
    exact = class_areas(areas, classes)
    monkeypatch.setattr(area_measures, "_POINTS", 0)
    monkeypatch.setattr(area_measures, "_TIMES", 1)
    cut: list[Any] = []
    monkeypatch.setattr(shapely, "difference", lambda *_: cut.append(_))
    found = class_areas(areas, classes)
    assert cut == []
    assert [count for count, _ in found] == [0, 30, 30]
    bounds = shapely.total_bounds([area.polygon for area in areas])
    step = np.sqrt(np.prod(bounds[2:] - bounds[:2]) / area_measures._PIXELS)
    outlines = sum(area.polygon.length for area in areas)
    for (_, px), (_, wanted) in zip(found, exact, strict=True):
        assert abs(px - wanted) < step * outlines
        assert px == pytest.approx(wanted, rel=1e-3)


def test_what_areas_cost_to_measure_grows_with_their_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of areas all over each other, few pairs are looked at, whatever their number."""
    looked_at: list[int] = []
    intersects = shapely.intersects

    def counting(one: Any, other: Any) -> Any:
        looked_at.append(len(one))
        return intersects(one, other)

    monkeypatch.setattr(shapely, "intersects", counting)
    monkeypatch.setattr(area_measures, "_PIXELS", 1 << 16)
    for count in (500, 1000, 2000):
        looked_at.clear()
        class_areas(blobs(count, 2_000, 900), Classes(CLASSES))
        assert sum(looked_at) <= max(
            area_measures._POINTS / 80, area_measures._TIMES * count
        )


# --- what is written ------------------------------------------------------------------


def picture_of(page: str, slide: str) -> npt.NDArray[np.int64]:
    """The pixels of a slide's picture in the page."""
    found = re.search(
        rf'src="data:image/jpeg;base64,([^"]+)" alt="Slide {slide} ', page
    )
    assert found is not None
    with Image.open(io.BytesIO(base64.b64decode(found[1]))) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def color_at(picture: npt.NDArray[np.int64], y: float, x: float, code: str) -> bool:
    """Whether a pixel, or a neighbour of it, has about a colour."""
    wanted = np.array(list(bytes.fromhex(code[1:])))
    part = picture[round(y) - 1 : round(y) + 2, round(x) - 1 : round(x) + 2]
    return bool((np.abs(part - wanted).max(axis=2) < 40).any())


def test_outlines_are_drawn_where_the_annotation_is(checked: Checked) -> None:
    page, colors = Path(checked.page).read_text(), Classes(CLASSES).colors
    tumour, stroma = colors[1:]
    picture = picture_of(page, "holes")
    row = rows_of(checked)["holes"]
    scale = picture.shape[0] / row["height"]
    assert color_at(picture, 250 * scale, 50 * scale + 1, tumour)  # outer border
    assert color_at(picture, 200 * scale, 100 * scale - 2, tumour)  # of the hole
    assert color_at(picture, 500 * scale, 200 * scale + 1, stroma)
    assert color_at(picture, 505 * scale, 305 * scale, tumour)  # too small: a dot
    for inside in ((200, 170), (250, 75), (650, 100)):
        place = (inside[0] * scale, inside[1] * scale)
        assert not color_at(picture, *place, tumour)
        assert not color_at(picture, *place, stroma)
    # The first outline of the file goes through here; a later one hides it.
    assert not color_at(picture, 450 * scale - 1, 300 * scale, tumour)
    assert color_at(picture_of(page, "part"), 300 * scale, 398 * scale, "#1d2429")


def test_the_page_is_one_file_with_every_slide(checked: Checked) -> None:
    page = Path(checked.page).read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    rows = rows_of(checked)
    # One row of the table for each, with its facts.
    table = page.partition('<table id="slides">')[2].partition("</table>")[0]
    told = re.findall(r'<tr><td class="name">(.*?)</td>\n(.*?)</tr>', table, re.DOTALL)
    assert len(told) == len(rows)
    for first, others in told:
        row = rows.pop(first.partition("<")[0])
        assert ('<small class="warn">refused</small>' in first) == bool(row["message"])
        if row["height"] is not None:
            assert f"<td>{row['height']}</td><td>{row['width']}</td>" in others
        assert row["note"] in html.unescape(others)
    assert rows == {}
    # Who is refused, and why, stands above it.
    table = page.partition('<h2 id="refused">')[2].partition("</table>")[0]
    found = re.findall(
        r'<tr><td class="name">(.*?)</td><td class="words">(.*?)</td>', table
    )
    told_why = {slide: html.unescape(why) for slide, why in found}
    assert told_why == checked.failed
    # A picture of each that can be opened.
    shown = re.findall(r'alt="Slide (\S+) with', page)
    opened = {row["slide"] for row in checked.slides if row["height"] is not None}
    assert sorted(shown) == sorted(opened)
    unused = page.partition("<h2>Annotations that are not used</h2>")[2]
    assert "/nobody.geojson</td>" in unused.partition("</table>")[0]
    bare = page.partition("<h2>Slides without annotation</h2>")[2]
    assert "<p>bare, text</p>" in bare


def test_the_table_has_every_slide(checked: Checked) -> None:
    with open(Path(checked.out) / "slides.csv", newline="") as file:
        rows = {row["slide"]: row for row in csv.DictReader(file)}
    assert set(rows) == {row["slide"] for row in checked.slides}
    assert float(rows["holes"]["share_tumour"]) == pytest.approx(
        rows_of(checked)["holes"]["share_tumour"]
    )
    assert rows["text"]["status"] == "refused"
    assert rows["text"]["height"] == ""


def test_the_command(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [str(mixed / "slides" / name) for name in ("bare.tif", "part.tif")]
    notes = str(mixed / "notes")
    assert cli.main(["check", *good]) == 0
    said = capsys.readouterr().out
    assert "bare" in said
    assert "2 slides, 0 refused" in said
    command = ["check", str(mixed / "slides"), "--annotations", notes]
    command += ["--classes", "background,tumour,stroma"]
    assert cli.main(command) == 3
    said = capsys.readouterr().out
    assert "unknown class 'Tumor'" in said
    assert "nobody.geojson" in said
    assert cli.main([*command, "--json", "--out", str(tmp_path / "out")]) == 3
    told = json.loads(capsys.readouterr().out)
    assert told["exit_code"] == 3
    assert set(told["failed"]) == {"text", "cut", "wrong_class", "outside"}
    assert (tmp_path / "out" / "check.html").exists()
    assert cli.main(["check", str(tmp_path / "nothing")]) == 2


def test_tables_are_shown_as_ingest_would_join_them(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def table(name: str, *lines: str) -> str:
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return str(tmp_path / name)

    tables = {
        "groups": table("g.csv", "Slide;Group", "a/one.tif;A", "b/one;A", "HOLES;B"),
        "splits": table(
            "s.csv", "slide,split", "a__one,train", "b__one,valid", "holes.tif,train"
        ),
        "cohorts": table("c.csv", "slide,Scanner", "holes,X", "whole,Y", "part,"),
        "labels": table("l.csv", "slide\tlabel\tpatient", "holes\tcancer\tB"),
    }
    checked = medray.check(
        [str(mixed / "slides")],
        annotations=str(mixed / "notes"),
        classes=CLASSES,
        out=str(tmp_path / "out"),
        **tables,
    )
    rows = rows_of(checked)
    names = ("group", "split", "label", "patient", "cohort_Scanner")
    assert [rows["holes"][name] for name in names] == ["B", "train", "cancer", "B", "X"]
    assert [rows["b__one"][name] for name in names] == ["A", "val", "", "", ""]
    assert [rows["bare"][name] for name in names] == [""] * 5
    groups, splits, labels, cohorts = checked.tables
    assert groups.matched == f"g.csv: 3 of 3 rows matched 3 of {len(rows)} slides"
    assert set(groups.without) == set(rows) - {"a__one", "b__one", "holes"}
    assert groups.unknown == labels.unknown == []
    assert cohorts.unknown == ["line 3: whole (the nearest: holes.tif)"]
    (apart,) = splits.apart
    assert "group A of" in apart
    assert "in train (a__one: line 2" in apart
    train, val, none = checked.balance
    assert (train["split"], train["slides"], train["patients"]) == ("train", 2, 2)
    areas = rows["a__one"]["mm2_tumour"] + rows["holes"]["mm2_tumour"]
    assert train["mm2_tumour"] == pytest.approx(areas, abs=1e-6)
    assert train["labels"] == "cancer 1, no label 1"
    assert (val["slides"], val["slides_stroma"], val["slides_tumour"]) == (1, 1, 0)
    assert none["slides"] == len(rows) - 3
    page = Path(checked.page).read_text()
    for text in (groups.matched, *cohorts.unknown, "no split", "<svg"):
        assert text in page
    with open(tmp_path / "out" / "slides.csv", newline="") as file:
        written = {row["slide"]: row for row in csv.DictReader(file)}
    assert [written["holes"][name] for name in names] == [
        rows["holes"][name] for name in names
    ]
    # A row that names nothing is no success.
    good = [str(mixed / "slides" / name) for name in ("bare.tif", "part.tif")]
    assert cli.main(["check", *good, "--cohorts", tables["cohorts"]]) == 3
    said = capsys.readouterr().out
    assert "c.csv: 1 of 3 rows matched 1 of 2 slides" in said
    assert "names no slide: line 2: holes" in said
    assert "has no row of bare" in said
    fine = table("c.csv", "slide,site", "bare,X", "part,")
    assert cli.main(["check", *good, "--cohorts", fine]) == 0
    assert cli.main(["check", *good, "--groups", fine]) == 2


def test_neither_ray_nor_torch_is_imported(mixed: Path) -> None:
    code = (
        "import sys, medray\n"
        f"medray.check([{str(mixed / 'slides' / 'bare.tif')!r}])\n"
        "print(sorted({'ray', 'torch'} & {*sys.modules}))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert said.stdout == "[]\n"


def test_another_report_is_not_overwritten(mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "per_slide.parquet").touch()
    with pytest.raises(ConfigError, match="another kind of report"):
        medray.check([str(mixed / "slides")], out=str(tmp_path))


# --- bad files ------------------------------------------------------------------------


def test_hostile_slides_cost_only_themselves(tmp_path: Path) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    for name, data in hostile.tiffs(40, random.Random(5)):
        (folder / name).write_bytes(data)
    write_slide(folder / "sound.tif")
    checked = medray.check([str(folder)], out=str(tmp_path / "out"))
    rows = rows_of(checked)
    assert len(rows) >= 41
    assert rows["sound"]["status"] == "ok"
    assert checked.failed
    assert all(why.startswith(f"{folder}/") for why in checked.failed.values())
    assert picture_of(Path(checked.page).read_text(), "sound").size


def test_hostile_annotations_are_refused_as_ingest_refuses_them(tmp_path: Path) -> None:
    folder, notes = tmp_path / "slides", tmp_path / "notes"
    notes.mkdir()
    for number, (name, data) in enumerate(hostile.annotations(24, random.Random(6))):
        write_slide(folder / f"n{number}.tif", 260, 300)
        (notes / f"n{number}{Path(name).suffix}").write_bytes(data)
    checked = medray.check([str(folder)], annotations=str(notes))
    written = ingest(folder, tmp_path / "out", notes)
    assert 0 < len(checked.failed) < len(written)

    def said(failed: dict[str, str]) -> dict[str, str]:
        # At which bracket Python gives up depends on the depth of the calls before.
        return {k: re.sub(r"RecursionError[^)]*", "", v) for k, v in failed.items()}

    failed = {k: r["message"] for k, r in written.items() if r["status"] == "failed"}
    assert said(checked.failed) == said(failed)
    for row in checked.slides:
        if not row["message"]:
            assert row["areas"] == written[row["slide"]]["areas"]


def test_a_file_name_that_is_no_unicode(tmp_path: Path) -> None:
    write_slide(tmp_path / "slides" / "x.tif")
    (tmp_path / "slides" / "x.tif").rename(
        os.fsdecode(bytes(tmp_path) + b"/slides/\xe9.tif")
    )
    checked = medray.check([str(tmp_path / "slides")], out=str(tmp_path / "out"))
    assert checked.slides[0]["status"] == "ok"
    assert checked.slides[0]["uri"].endswith("/\\udce9.tif")


def test_a_call_that_kills_or_hangs_costs_only_itself() -> None:
    dies = "__import__('os').kill(__import__('os').getpid(), 11)"
    hangs, raises = "__import__('time').sleep(99)", "1 / 0"
    tasks = ["1 + 1", dies, "2 + 2", hangs, "3 + 3", raises, "4 + 4"]
    found = dict(call_each(eval, tasks, processes=2, limit_s=8))
    assert {task: found[task] for task in tasks[::2]} == {
        "1 + 1": 2,
        "2 + 2": 4,
        "3 + 3": 6,
        "4 + 4": 8,
    }
    lost = {task: found[task] for task in tasks[1::2]}
    assert all(isinstance(error, LostError) for error in lost.values())
    assert "signal 11" in str(lost[dies])
    assert "more than 8 s" in str(lost[hangs])
    assert "code 1" in str(lost[raises])


def test_a_call_that_goes_on_may_take_longer_than_its_limit() -> None:
    code = "(__import__('time').sleep(s) for s in {})"
    steady, hangs = code.format("[2.5] * 5"), code.format("[1, 99]")
    found = dict(call_each(eval, [steady, hangs], processes=2, limit_s=8))
    assert found[steady] is None  # what such a generator returns
    assert "more than 8 s" in str(found[hangs])


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_command(tmp_path: Path, how: signal.Signals) -> None:
    os.mkfifo(tmp_path / "x.png")  # whoever opens it waits
    words = ["-m", "medray.cli", "check", str(tmp_path)]
    # Who runs the tests in the background of a shell has SIGINT ignored.
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command_line = [sys.executable, "-P", *words]
    with subprocess.Popen(command_line, stderr=-3, preexec_fn=heard) as command:
        process = psutil.Process(command.pid)
        deadline = time.monotonic() + 60
        while not (readers := process.children()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(readers) == 1
        command.send_signal(how)
        assert command.wait(60) == (130 if how == signal.SIGINT else -how)
        gone, alive = psutil.wait_procs(readers, timeout=60)
        assert (len(gone), alive) == (1, [])


# --- tiles that were never stored -----------------------------------------------------


def lose_tiles(path: Path, lost: set[int]) -> None:
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tag = tiff.pages[0].tags["TileByteCounts"]
        tag.overwrite([0 if i in lost else n for i, n in enumerate(tag.value)])


@pytest.mark.parametrize(("height", "kept"), [(2560, 13), (2048, 10)])
def test_what_was_never_stored_is_neither_background_nor_tissue(
    tmp_path: Path, height: int, kept: int
) -> None:
    """Of two regions and of one; two tiles are lost, and so two of 15 or 12 patches."""
    slides, notes, out = tmp_path / "slides", tmp_path / "notes", tmp_path / "out"
    write_slide(slides / "x.tif", height, 1536, tile=(256, 256))
    write_geojson(notes / "x.geojson", ("tumour", (0, 0, 900, 1800)))
    lose_tiles(slides / "x.tif", {0, 33})  # (0, 0) and (5, 3): y=1280, x=768
    row = ingest(slides, out, notes)["x"]
    assert row["status"] == "done", row["message"]
    assert f"2 of {6 * height // 256} tiles" in row["note"]
    assert "cannot be read" in row["note"]
    assert row["partly"]
    patches = read_patches(str(out), "train")
    places = {(patch["y"], patch["x"]) for patch in patches}
    assert len(patches) == kept
    assert not places & {(0, 0), (1024, 512)}
    labels = np.asarray(ome_zarr.open_level(labels_uri(str(out), "x"))[:])
    assert (labels[:256, :256] == 0).all()
    # Nothing was counted as background that is not annotated.
    assert row["px_background"] == sum(patch["class_px"][0] for patch in patches)
    (said,) = medray.check([str(slides)], annotations=str(notes)).slides
    assert said["status"] == "ok"
    assert f"2 of {6 * height // 256} tiles" in said["note"]
    # What the dataset has of it is as unreadable as it was.
    with open_slide(slide_uri(str(out), "x")) as slide:
        assert slide.note
        slide.read(256, 256, 256, 256)
        for place in ((0, 0, 10, 10), (1270, 760, 30, 30)):
            with pytest.raises(SlideError, match="could not be read"):
                slide.read(*place)
        with pytest.raises(SlideError, match="could not be read"):
            slide.read(0, 0, 8, 8, len(slide.levels) - 1)


@pytest.mark.parametrize("noted", [7, [7], [[0, 0, 9]], [[0, 0, 1e999, 9]], ["abcd"]])
def test_damaged_notes_of_what_is_unreadable_are_refused(
    tmp_path: Path, noted: Any
) -> None:
    uri = str(tmp_path / "x.zarr")
    ome_zarr.create_image(uri, 64, 64, mpp=None, name="x", attributes={})
    group_attributes.note_unreadable(uri, [[0, 0, 9, 9]])
    with open_slide(uri) as slide:
        assert slide.absent == 81 / 64**2
    top = tmp_path / "x.zarr" / "zarr.json"
    metadata = json.loads(top.read_text())
    metadata["attributes"]["unreadable"] = noted
    top.write_text(json.dumps(metadata))
    with pytest.raises(SlideError, match="expected an OME-Zarr"):
        open_slide(uri)


def test_a_slide_that_lacks_too_much_is_refused_by_both(tmp_path: Path) -> None:
    write_slide(tmp_path / "slides" / "x.tif", 1024, 768, tile=(128, 128))
    lose_tiles(tmp_path / "slides" / "x.tif", {*range(5)})
    row = ingest(tmp_path / "slides", tmp_path / "out")["x"]
    checked = medray.check([str(tmp_path / "slides")])
    assert row["status"] == "failed"
    assert checked.failed == {"x": row["message"]}
    assert "5 of 48 tiles" in row["message"]


def test_the_quality_of_slides_is_measured_on_request(tmp_path: Path) -> None:
    pixels = draw_scene(11, height=1024, width=1024, artefacts=False).pixels
    blurred = blur(pixels, np.random.default_rng(0), 3, 1)
    (tmp_path / "slides").mkdir()
    for name, rgb in (("clean", pixels), ("blurred", blurred)):
        Image.fromarray(rgb).save(tmp_path / "slides" / f"{name}.png")
    (tmp_path / "slides" / "broken.png").write_bytes(b"no image")
    out = tmp_path / "out"
    folder = str(tmp_path / "slides")
    checked = medray.check([folder], mpp=0.5, qc="default", out=str(out))
    rows = rows_of(checked)
    assert rows["clean"]["quality"] == ""
    assert rows["clean"]["qc_focus"] > 0.85
    assert rows["blurred"]["quality"].startswith("focus 0.1")
    assert rows["broken"]["qc_focus"] is None
    assert rows["blurred"]["quality"] in (out / "check.html").read_text()
    assert rows["blurred"]["quality"] in str(checked)
    with open(out / "slides.csv", newline="") as file:
        table = {row["slide"]: row for row in csv.DictReader(file)}
    assert float(table["blurred"]["qc_focus"]) == rows["blurred"]["qc_focus"]
    assert "qc_focus" not in rows_of(medray.check([folder]))["clean"]
    with pytest.raises(ConfigError, match="no such file"):
        medray.check([folder], qc="none.yaml")
