"""Contours of cells: files, measures, and SIPaKMeD's layout as it lies on a disk."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shapely.geometry import Polygon

from medray.annotations.contours import read_contour
from medray.cli import main
from medray.dataset import read_morphology, read_patches, slide_uri
from medray.errors import ConfigError, SlideError
from medray.morphology import FEATURES, feature_names, measure
from medray.sheets import Images, find_images, ingest_images
from medray.store import files, omezarr
from medray.synth_cells import CELL_CLASSES, generate_cells


def shoelace(points: np.ndarray) -> float:
    x, y = points.T
    return abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2


def points_of(path: Path) -> np.ndarray:
    return np.loadtxt(path, delimiter=",")


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


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sipakmed") / "cells"
    generate_cells(folder, clusters=2, each=4)
    return folder


def ingested(cells: Path, out: Path, **how: object) -> Images:
    return ingest_images(str(cells), out=str(out), side=64, **how)


def measures(out: Path) -> dict[str, np.ndarray]:
    patches = [
        row
        for split in ("train", "val", "test")
        for row in read_patches(str(out), split)
    ]
    names, values = read_morphology(str(out), patches)
    assert names == feature_names()
    return {row["image"]: v for row, v in zip(patches, values, strict=True)}


def test_generated_cells_follow_from_their_seed(cells: Path, tmp_path: Path) -> None:
    generate_cells(tmp_path / "same", clusters=2, each=4)
    generate_cells(tmp_path / "other", clusters=2, each=4, seed=1)
    paths = [p.relative_to(cells) for p in sorted(cells.rglob("*.*"))]
    assert len(paths) == 5 * 2 * (1 + 4 * (2 + 3))
    assert all(
        (tmp_path / "same" / p).read_bytes() == (cells / p).read_bytes() for p in paths
    )
    some = paths[0]
    assert (tmp_path / "other" / some).read_bytes() != (cells / some).read_bytes()


def test_crops_are_taken_with_their_contours(
    cluster: None, cells: Path, tmp_path: Path
) -> None:
    summary = ingested(cells, tmp_path / "data", contours=True)
    assert (summary.images, summary.copies, summary.failed) == (40, 0, {})
    found = measures(tmp_path / "data")
    for name, values in found.items():
        assert "/CROPPED/" in name
        stem = cells / name.removesuffix(".bmp")
        nucleus, cytoplasm = (
            shoelace(points_of(stem.with_name(f"{stem.name}_{part}.dat")))
            for part in ("nuc", "cyt")
        )
        assert values[0] == pytest.approx(nucleus, rel=0.05)
        assert values[4] == pytest.approx(cytoplasm, rel=0.02)
        assert values[8] == pytest.approx(nucleus / cytoplasm, rel=0.05)
    # The contours count as much as the images: again only if one has changed.
    assert ingested(cells, tmp_path / "data", contours=True).skipped == 40
    # Without contours the same cells are there, and nothing of the measures stays.
    summary = ingested(cells, tmp_path / "data")
    assert summary.images == 40
    with pytest.raises(ConfigError, match="--contours"):
        read_morphology(str(tmp_path / "data"), [])


def test_cells_are_cut_out_of_clusters_where_there_are_no_crops(
    cluster: None, cells: Path, tmp_path: Path
) -> None:
    generate_cells(tmp_path / "cells", clusters=2, each=4, crops=False)
    summary = ingested(tmp_path / "cells", tmp_path / "data", contours=True)
    assert (summary.images, summary.copies, summary.failed) == (40, 0, {})
    ingested(cells, tmp_path / "crops", contours=True)
    crops = measures(tmp_path / "crops")
    for name, values in measures(tmp_path / "data").items():
        same = name.replace("/", "/CROPPED/") + ".bmp"
        np.testing.assert_allclose(values, crops[same], rtol=0.05, atol=0.02)
    for row in read_patches(str(tmp_path / "data"), "test"):
        folder, stem = row["image"].split("/")
        number, cell = stem.split("_")
        contour = points_of(tmp_path / "cells" / folder / f"{number}_cyt{cell}.dat")
        (x0, y0), (x1, y1) = contour.min(axis=0) // 1, np.ceil(contour.max(axis=0))
        with Image.open(tmp_path / "cells" / folder / f"{number}.bmp") as picture:
            x1, y1 = min(x1 + 10, picture.width), min(y1 + 10, picture.height)
            box = (max(x0 - 10, 0), max(y0 - 10, 0), x1, y1)
            cut = picture.crop(tuple(map(int, box)))
        wanted = np.asarray(cut.resize((64, 64), Image.Resampling.BILINEAR))
        sheet = omezarr.open_level(slide_uri(str(tmp_path / "data"), row["slide"]))
        pixels = sheet[:, row["y"] : row["y"] + 64, row["x"] : row["x"] + 64]
        np.testing.assert_array_equal(np.moveaxis(pixels, 0, 2), wanted)


def test_what_is_wrong_with_a_cell_costs_only_that_cell(
    cluster: None,
    cells: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "cells"
    shutil.copytree(cells, folder)
    crops = folder / CELL_CLASSES[0] / "CROPPED"
    damaged = crops / "001_01.bmp"
    damaged.write_bytes(damaged.read_bytes()[:60])
    (crops / "001_02_nuc.dat").write_text("10,10\n400,10\n10,20\n")
    (crops / "001_03_cyt.dat").unlink()
    (crops / "001_04.bmp").unlink()
    # The same cell under another name, in the split that tests.
    for suffix in (".bmp", "_nuc.dat", "_cyt.dat"):
        shutil.copy(crops / f"002_01{suffix}", crops / f"900_01{suffix}")
    names = [row["image"] for row in find_images(str(folder))]
    lines = [f"{n},{'test' if '/900' in n else 'train'}" for n in names]
    splits = tmp_path / "splits.csv"
    splits.write_text("\n".join(["slide,split", *lines]) + "\n")
    how = {"contours": True, "splits": str(splits)}
    summary = ingested(folder, tmp_path / "data", **how)
    failed = {Path(name).name: why for name, why in summary.failed.items()}
    assert set(failed) == {"001_01.bmp", "001_02.bmp", "001_03.bmp"}
    assert "001_01.bmp" in failed["001_01.bmp"]
    assert "001_02_nuc.dat: the contour reaches" in failed["001_02.bmp"]
    assert "no contour of its cytoplasm" in failed["001_03.bmp"]
    assert "1 images of contours are missing" in caplog.text
    assert "CROPPED/001_04.bmp" in caplog.text
    assert (summary.images, summary.copies) == (40 + 1 - 4 - 1, 1)
    table = files.read_table(f"{tmp_path}/data/images.parquet").to_pylist()
    (copy,) = [row for row in table if row["status"] == "copy"]
    assert copy["image"].endswith("002_01.bmp")
    assert "900_01.bmp" in copy["message"]


def test_wrong_requests_are_refused(
    cells: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(cells, bare, ignore=shutil.ignore_patterns("*.dat"))
    with pytest.raises(ConfigError, match="found no contours, expected NAME_nuc.dat"):
        find_images(str(bare), contours=True)
    assert len(find_images(str(bare))) == 40
    for path in (bare / CELL_CLASSES[1]).rglob("*.bmp"):
        path.unlink()
    with pytest.raises(ConfigError, match=f"of the class {CELL_CLASSES[1]}"):
        find_images(str(bare))
    out = ["--out", str(tmp_path / "data")]
    assert main(["ingest", str(cells), "--contours", *out]) == 2
    assert "--contours goes with --side" in capsys.readouterr().err
    assert main(["ingest", str(cells), "--side", "64", "--mpp", "1", *out]) == 2
    assert "only for the measures of --contours" in capsys.readouterr().err
