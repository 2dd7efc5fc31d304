"""Microns per pixel: what files say, what the user says, what is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from stages import commit_done

from medray.datasets.overrides import with_overrides
from medray.errors import ConfigError, SlideError
from medray.execution.commit import changed_slides
from medray.slides.base import Mpp
from medray.slides.discovery import SlideFile, find_slides
from medray.slides.image import ArraySlide
from medray.slides.opening import open_slide
from medray.slides.resolution import choose_level, mpp_columns, settle_mpp
from medray.storage.ledger import Ledger

RGB = np.full((32, 48, 3), 200, np.uint8)
PLAIN: dict[str, Any] = {"photometric": "rgb", "metadata": None}


def aperio(path: Path, text: str) -> None:
    description = f"Aperio Image Library v12\r\n48x32|AppMag = 20|MPP = {text}"
    tifffile.imwrite(path, RGB, description=description, tile=(16, 16), **PLAIN)


def ome(path: Path, x: str, y: str, unit: str) -> None:
    """Write an OME-TIFF by hand: tifffile takes no other text than its own."""
    sizes = f'PhysicalSizeX="{x}" PhysicalSizeY="{y}"'
    if unit:
        sizes += f' PhysicalSizeXUnit="{unit}" PhysicalSizeYUnit="{unit}"'
    pixels = (
        f'<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="48" '
        f'SizeY="32" SizeC="3" SizeZ="1" SizeT="1" {sizes}>'
        f'<Channel ID="Channel:0:0" SamplesPerPixel="3"/><TiffData/></Pixels>'
    )
    name = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
    text = f'<OME xmlns="{name}"><Image ID="Image:0">{pixels}</Image></OME>'
    tifffile.imwrite(path, RGB, description=text.encode(), **PLAIN)


def tagged(path: Path, x: float, y: float, unit: str, description: str = "") -> None:
    how = {"resolution": (x, y), "resolutionunit": unit, **PLAIN}
    tifffile.imwrite(path, RGB, description=description or None, **how)


@pytest.mark.parametrize(
    ("write", "x", "y", "source"),
    [
        (lambda p: aperio(p, "0.5015"), 0.5015, 0.5015, "Aperio MPP"),
        (lambda p: aperio(p, "0,2520"), 0.252, 0.252, "Aperio MPP"),
        (lambda p: ome(p, "0.325", "0.325", ""), 0.325, 0.325, "OME"),
        (lambda p: ome(p, "0,5", "0,5", "µm"), 0.5, 0.5, "OME"),
        (lambda p: ome(p, "0.00044", "0.00022", "mm"), 0.44, 0.22, "OME"),
        (lambda p: ome(p, "454", "454", "nm"), 0.454, 0.454, "OME"),
        (lambda p: tagged(p, 20000, 40000, "CENTIMETER"), 0.5, 0.25, "XResolution"),
        (lambda p: tagged(p, 50800, 50800, "INCH"), 0.5, 0.5, "XResolution"),
        (
            lambda p: tagged(p, 4, 4, "NONE", "ImageJ=1.54f\nunit=micron\n"),
            0.25,
            0.25,
            "ImageJ",
        ),
    ],
)
def test_both_axes_are_read_and_their_source_is_told(
    tmp_path: Path, write: Any, x: float, y: float, source: str
) -> None:
    path = tmp_path / ("x.svs" if source == "Aperio MPP" else "x.tif")
    write(path)
    with open_slide(path) as slide:
        found = slide.resolution
    assert found is not None
    assert (found.x, found.y) == (pytest.approx(x), pytest.approx(y))
    assert found.source.startswith(source)


@pytest.mark.parametrize(
    ("x", "unit", "noted"),
    [
        (72, "INCH", True),
        (118.11, "CENTIMETER", True),  # 300 dpi
        (28, "CENTIMETER", True),  # 71 dpi, rounded down from 72
        (1200, "INCH", True),
        (300, "ImageJ inch", True),
        (118.11, "ImageJ cm", True),
        (1, "NONE", False),
        (1, "INCH", False),
        (0, "INCH", False),
    ],
)
def test_a_screens_or_printers_resolution_counts_for_nothing(
    tmp_path: Path, x: float, unit: str, noted: bool
) -> None:
    named = unit.removeprefix("ImageJ ")
    if unit.startswith("ImageJ"):
        tagged(tmp_path / "x.tif", x, x, "NONE", f"ImageJ=1.54f\nunit={named}\n")
    else:
        tagged(tmp_path / "x.tif", x, x, unit)
    with open_slide(tmp_path / "x.tif") as slide:
        assert slide.resolution is None
        assert ("dpi" in slide.note) == noted


@pytest.mark.parametrize(("x", "y"), [(0, 300), (20_000, 72), (300, 20_000)])
def test_one_axis_of_a_screen_makes_both_unknown(
    tmp_path: Path, x: float, y: float
) -> None:
    tagged(tmp_path / "x.tif", x, y, "INCH")
    with open_slide(tmp_path / "x.tif") as slide:
        assert slide.resolution is None
        assert "dpi" in slide.note


@settings(deadline=None)
@given(st.floats(0.02, 20), st.floats(0.02, 20), st.none() | st.floats(0.02, 20))
def test_what_the_user_says_counts(x: float, y: float, said: float | None) -> None:
    slide = ArraySlide(RGB)
    slide.resolution = Mpp(x, y, "its file")
    oblong = not 1 / 1.01 <= x / y <= 1.01
    if said is None and oblong:
        with pytest.raises(SlideError, match="square"):
            choose_level(slide, None, None)
        return
    told, note = settle_mpp(slide, said)
    assert told is not None
    assert told.x == (said or x)
    assert bool(note) == (said is not None and (oblong or abs(x / said - 1) >= 0.01))
    assert choose_level(slide, None, said).mpp == told.x
    assert mpp_columns(told) == {
        "mpp_x": told.x,
        "mpp_y": told.y,
        "mpp_from": "--mpp" if said else "its file",
    }


# --- a CSV ----------------------------------------------------------------------------


def slides_in(folder: Path) -> list[SlideFile]:
    for name in ("a/one.tif", "a/two.svs", "b/one.tif"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    return find_slides([str(folder)])


def test_a_csv_names_slides_as_annotations_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = slides_in(tmp_path)
    table = tmp_path / "mpp.csv"
    table.write_text("slide,mpp\na__one,0.25\ntwo.svs,0.5\nb/one.tif,1\nthree,2\n")
    with caplog.at_level(logging.WARNING):
        found = with_overrides(wanted, mpp=str(table), scene=None, plane=2)
    assert {f.slide: f.mpp for f in found} == {
        "a__one": 0.25,
        "a__two": 0.5,
        "b__one": 1.0,
    }
    assert {f.plane for f in found} == {2}
    assert "1 rows belong to no slide: three" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide,um\na,0.5\n", "expected the columns slide and mpp"),
        (
            "slide,mpp\na__one,fine\n",
            "line 2: slide a__one: .* such as 0.25, found 'fine'",
        ),
        ("slide,mpp\na__one,\n", "found ''"),
        ("slide,mpp\na__one\n", "line 2: expected 2 cells"),
        ("mpp,slide\n0.5\n", "line 2: expected 2 cells"),
        (
            "slide,mpp\na/one.tif,0.5\na/one,0.25\n",
            r"lines 2 and 3: .*both a/one.tif,0.5 and a/one,0.25",
        ),
        ("slide,mpp\na__one,250\n", r"a__one: expected 0.01 to 100 um.*found 250"),
        ("slide,mpp\na__one,nan\n", "expected 0.01 to 100"),
        ("slide,mpp\na__one,0.5\na__one,0.25\n", "lines 2 and 3: say of"),
        ("slide,mpp\none.tif,0.5\n", "line 2: one.tif could be"),
    ],
)
def test_a_csv_that_is_wrong_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    wanted = slides_in(tmp_path)
    (tmp_path / "mpp.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        with_overrides(wanted, mpp=str(tmp_path / "mpp.csv"), scene=None, plane=None)


def test_what_says_the_same_twice_is_taken(tmp_path: Path) -> None:
    wanted = slides_in(tmp_path)
    # Line ends as Excel for the Mac writes them.
    (tmp_path / "mpp.csv").write_bytes(
        b"slide,mpp\ra/one.tif,0.5\ra/one,0.50\rtwo,0.25\r"
    )
    found = with_overrides(
        wanted, mpp=str(tmp_path / "mpp.csv"), scene=None, plane=None
    )
    assert [f.mpp for f in found] == [0.5, 0.25, None]


def test_a_number_that_is_wrong_is_refused(tmp_path: Path) -> None:
    wanted = slides_in(tmp_path)
    with pytest.raises(ConfigError, match="--mpp: expected 0.01 to 100"):
        with_overrides(wanted, mpp=400.0, scene=None, plane=None)
    with pytest.raises(ConfigError, match="--scene: expected 0 or more, found -1"):
        with_overrides(wanted, mpp=None, scene=-1, plane=None)


def test_a_slide_that_is_said_to_be_another_is_done_again(tmp_path: Path) -> None:
    wanted = slides_in(tmp_path)
    ledger = Ledger(str(tmp_path / "out"))
    first = with_overrides(wanted, mpp=0.5, scene=None, plane=None)
    for task in changed_slides(first, ledger):
        commit_done(ledger, task.input)
    assert changed_slides(first, ledger) == []
    table = tmp_path / "mpp.csv"
    table.write_text("slide,mpp\na__one,0.5\na__two,0.25\nb__one,0.5\n")
    second = with_overrides(wanted, mpp=str(table), scene=None, plane=None)
    assert [task.input.slide for task in changed_slides(second, ledger)] == ["a__two"]
