"""Contours of cells: files, measures, and SIPaKMeD's layout as it lies on a disk."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from contours import points_of, shoelace
from shapely.geometry import Polygon

from medray.annotations.dat_contours import read_contour
from medray.annotations.morphology import FEATURES, feature_names, measure
from medray.cli import main
from medray.datasets.find_images import find_images
from medray.datasets.synthetic_cells import CELL_CLASSES, generate_cells
from medray.errors import ConfigError, SlideError


def ellipse(a: float, b: float, turn: float, x: float = 0, y: float = 0) -> Polygon:
    angles = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    ring = np.stack([a * np.cos(angles), b * np.sin(angles)], axis=1)
    cos, sin = math.cos(turn), math.sin(turn)
    return Polygon(ring @ np.array([[cos, sin], [-sin, cos]]) + (x, y))


# --- files ----------------------------------------------------------------------------


def test_a_contour_encloses_what_it_goes_round(tmp_path: Path) -> None:
    path = tmp_path / "007_cyt01.dat"
    path.write_bytes(
        b"\xef\xbb\xbf1.5,2\r\n11.5,2\r\n11.5,12\r\n\r\n1.5,12\r\n1.5,2\r\n"
    )
    assert read_contour(str(path), height=20, width=20).bounds == (1.5, 2, 11.5, 12)
    # A bow tie: both lobes belong to it.
    path.write_text("0,0\n10,10\n10,0\n0,10\n")
    assert read_contour(str(path), height=20, width=20).area == pytest.approx(50)
    # What slips over the border by a little is cut off.
    path.write_text("-2,0\n21,0\n21,10\n-2,10\n")
    assert read_contour(str(path), height=20, width=20).area == pytest.approx(200)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "3 points or more, found 0"),
        ("1,1\n2,2\n1,1\n", "found 2 different ones"),
        ("1,1\n5,5\n9;1\n", "line 3: expected two numbers `x,y`, found '9;1'"),
        ("1,1\n\nnan,5\n9,1\n", "line 3: .* found 'nan,5'"),
        ("1,1\n5,inf\n9,1\n", "line 2"),
        ("1,1\n5,5,5\n9,1\n", "line 2"),
        ("1,1\n5,5\n9,9\n", "encloses nothing"),
        ("1,1\n26,1\n1,9\n", "6 pixels beyond its image of 20 x 30"),
        ("1,1\n9,1\n1,-7\n", "7 pixels beyond"),
        ("1,1\n9,1\n1,47\n", "17 pixels beyond"),
    ],
)
def test_what_is_no_contour_is_refused(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "007_nuc01.dat"
    path.write_text(text)
    with pytest.raises(SlideError, match=match) as caught:
        read_contour(str(path), height=30, width=20)
    assert str(path) in str(caught.value)
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(SlideError, match=r"007_nuc01\.dat: cannot be read as text"):
        read_contour(str(path), height=30, width=20)
    with pytest.raises(SlideError, match=r"absent\.dat"):
        read_contour(str(tmp_path / "absent.dat"), height=30, width=20)


def test_real_contours_enclose_their_shoelace_area(shared_data: Path) -> None:
    folder = shared_data / "sipakmed" / "dat_contours_sample"
    paths = sorted(folder.glob("*_nuc*.dat"))
    assert len(paths) == 16
    for path in paths:
        nucleus = read_contour(str(path), height=1536, width=2048)
        around = path.with_name(path.name.replace("nuc", "cyt"))
        cytoplasm = read_contour(str(around), height=1536, width=2048)
        assert nucleus.area == pytest.approx(shoelace(points_of(path)), rel=0.01)
        assert cytoplasm.area == pytest.approx(shoelace(points_of(around)), rel=0.01)
        found = dict(zip(feature_names(), measure(nucleus, cytoplasm), strict=True))
        assert found["nucleus_area_px2"] == pytest.approx(nucleus.area, rel=0.02)
        ratio = nucleus.area / cytoplasm.area
        assert found["nucleus_cytoplasm_ratio"] == pytest.approx(ratio, rel=0.02)
        assert 0.005 < ratio < 0.2  # superficial cells: small nuclei


# --- measures -------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b", "turn"), [(30, 30, 0), (40, 22, 0.5), (50, 14, 2)])
def test_ellipses_measure_what_their_formulas_say(
    a: float, b: float, turn: float
) -> None:
    nucleus = ellipse(a, b, turn, 1200.3, 700.7)
    cytoplasm = ellipse(3 * a, 2.5 * b, turn, 1199, 702)
    found = dict(zip(feature_names(), measure(nucleus, cytoplasm), strict=True))
    h = (a - b) ** 2 / (a + b) ** 2
    around = math.pi * (a + b) * (1 + 3 * h / (10 + math.sqrt(4 - 3 * h)))  # Ramanujan
    assert found["nucleus_area_px2"] == pytest.approx(math.pi * a * b, rel=0.01)
    assert found["nucleus_perimeter_px"] == pytest.approx(around, rel=0.03)
    squared = 1 - b**2 / a**2
    assert found["nucleus_eccentricity"] ** 2 == pytest.approx(squared, abs=0.01)
    assert found["nucleus_solidity"] > 0.95
    assert found["cytoplasm_area_px2"] == pytest.approx(7.5 * math.pi * a * b, rel=0.01)
    assert found["nucleus_cytoplasm_ratio"] == pytest.approx(1 / 7.5, rel=0.01)


def test_a_notch_costs_solidity_and_microns_are_scaled() -> None:
    notched = Polygon([(0, 0), (90, 0), (90, 30), (30, 30), (30, 90), (0, 90)])
    cytoplasm = ellipse(150, 140, 0, 100, 100)  # its box begins left of the image
    pixels = dict(zip(feature_names(), measure(notched, cytoplasm), strict=True))
    solidity = notched.area / notched.convex_hull.area
    assert pixels["nucleus_solidity"] == pytest.approx(solidity, abs=0.02)
    assert pixels["nucleus_area_px2"] == 90 * 30 + 60 * 30
    microns = dict(
        zip(feature_names(0.25), measure(notched, cytoplasm, 0.25), strict=True)
    )
    assert len(microns) == FEATURES == 9
    for name, value in microns.items():
        same = pixels[name.replace("um", "px")]
        power = 2 if name.endswith("um2") else name.endswith("um")
        assert value == pytest.approx(same * 0.25**power)


def test_what_is_too_small_for_a_shape_is_refused() -> None:
    with pytest.raises(SlideError, match="of the nucleus holds 4 pixels"):
        measure(Polygon([(5, 5), (7, 5), (7, 7), (5, 7)]), ellipse(30, 20, 0, 9, 9))


# --- layout ---------------------------------------------------------------------------


def test_generated_cells_follow_from_their_seed(
    contoured_cells: Path, tmp_path: Path
) -> None:
    generate_cells(tmp_path / "same", clusters=2, each=4)
    generate_cells(tmp_path / "other", clusters=2, each=4, seed=1)
    paths = [
        p.relative_to(contoured_cells) for p in sorted(contoured_cells.rglob("*.*"))
    ]
    assert len(paths) == 5 * 2 * (1 + 4 * (2 + 3))
    assert all(
        (tmp_path / "same" / p).read_bytes() == (contoured_cells / p).read_bytes()
        for p in paths
    )
    some = paths[0]
    assert (tmp_path / "other" / some).read_bytes() != (
        contoured_cells / some
    ).read_bytes()


def test_wrong_requests_are_refused(
    contoured_cells: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(contoured_cells, bare, ignore=shutil.ignore_patterns("*.dat"))
    with pytest.raises(ConfigError, match="found no contours, expected NAME_nuc.dat"):
        find_images(str(bare), contours=True)
    assert len(find_images(str(bare))) == 40
    for path in (bare / CELL_CLASSES[1]).rglob("*.bmp"):
        path.unlink()
    with pytest.raises(ConfigError, match=f"of the class {CELL_CLASSES[1]}"):
        find_images(str(bare))
    out = ["--out", str(tmp_path / "data")]
    assert main(["ingest", str(contoured_cells), "--contours", *out]) == 2
    assert "--contours goes with --side" in capsys.readouterr().err
    assert (
        main(["ingest", str(contoured_cells), "--side", "64", "--mpp", "1", *out]) == 2
    )
    assert "only for the measures of --contours" in capsys.readouterr().err
