"""Slides of which the scanner filled a part: what medray writes for QuPath of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicoms import picture
from noise import noise
from several_files import write_mrxs

from medray.annotations.geojson_write import extent_features, geojson_features
from medray.annotations.rasterize import rasterise
from medray.annotations.reading import Annotation, read_marks
from medray.classes import Classes
from medray.datasets.synthetic import write_pyramid
from medray.geometry import Rectangle
from medray.inference.outlines import trace, write_outlines
from medray.slides.bounds import scanned_bounds
from medray.slides.opening import open_slide
from medray.slides.tiff import TiffSlide
from medray.storage import ome_zarr

pytest.importorskip("openslide")

CLASSES = Classes(("background", "a", "b"))
HEIGHT, WIDTH = 1024, 1536
SIZE = {"height": HEIGHT, "width": WIDTH}
PART = Rectangle(256, 512, 512, 768)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bounds") / "x.mrxs"
    write_mrxs(path, picture(HEIGHT, WIDTH), scanned=PART)
    return path


def marks(uri: Path, slide: Path | str) -> Annotation:
    return read_marks(str(uri), **SIZE, classes=CLASSES, slide=str(slide))


def drawn(found: Annotation, downsample: int = 1) -> np.ndarray:
    size = {"height": HEIGHT // downsample, "width": WIDTH // downsample}
    return rasterise(
        found.areas, CLASSES, y=0, x=0, downsample=float(downsample), **size
    )


def at_borders() -> np.ndarray:
    """Objects within, on, across and beyond every border of the part and the canvas."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    for y in (0, 200, 246, 256, 500, 758, 768, 900, HEIGHT - 10):
        for x in (0, 300, 502, 512, 900, 1270, 1280, 1400, WIDTH - 10):
            mask[y : y + 10, x : x + 10] = 1 + (x + y) // 2 % 2
    for y, x in ((251, 700), (763, 700), (600, 507), (600, 1275)):
        mask[y : y + 10, x : x + 10] = 2  # across one border
    return mask


def scattered() -> np.ndarray:
    return np.kron(noise(HEIGHT // 16, WIDTH // 16, 5), np.ones((16, 16), np.uint8))


def one_beyond() -> np.ndarray:
    """A single object, on the far side of the part."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[800:900, 1300:1400] = 1
    return mask


def write(mask: np.ndarray, target: Path, downsample: int, bounds: Any) -> None:
    uri = str(target.with_suffix(".ome.zarr"))
    small = mask[::downsample, ::downsample]
    ome_zarr.create_labels(
        uri, *small.shape, mpp=0.5, name="", classes=CLASSES, attributes={}
    )
    whole = Rectangle(0, 0, *small.shape)
    ome_zarr.write_region(uri, whole, np.ascontiguousarray(small))
    options: Any = {"downsample": float(downsample), "bounds": bounds}
    write_outlines(uri, str(target), CLASSES, **options)


def test_openslide_states_the_part_and_reads_the_canvas(slide: Path) -> None:
    assert scanned_bounds(str(slide), **SIZE) == PART
    with open_slide(slide) as opened:
        whole = opened.read(0, 0, HEIGHT, WIDTH).astype(int)
    wanted = np.full_like(whole, 255)
    wanted[PART.slices()] = picture(HEIGHT, WIDTH)[PART.slices()]
    assert np.abs(whole - wanted).max() <= 8


def test_a_replaced_slide_has_its_own_bounds(tmp_path: Path) -> None:
    path, other = tmp_path / "x.mrxs", Rectangle(0, 256, 768, 512)
    for part in (PART, other, None):
        shutil.rmtree(path.with_suffix(""), ignore_errors=True)
        write_mrxs(path, picture(HEIGHT, WIDTH), scanned=part)
        assert scanned_bounds(str(path), **SIZE) == part


def test_a_tiff_of_a_vendor_that_may_have_bounds_has_none(tmp_path: Path) -> None:
    """It is opened as any slide is, by tifffile, whose canvas it is."""
    path = tmp_path / "x.scn"
    write_pyramid(path, HEIGHT, WIDTH)
    with open_slide(path) as opened:
        assert isinstance(opened, TiffSlide)
    assert scanned_bounds(str(path), **SIZE) is None


@pytest.mark.parametrize("make", [at_borders, scattered, one_beyond])
@pytest.mark.parametrize("downsample", [1, 2])
def test_a_masks_outlines_give_it_back(
    slide: Path, tmp_path: Path, make: Any, downsample: int
) -> None:
    mask, target = make(), tmp_path / "x.geojson"
    write(mask, target, downsample, scanned_bounds(str(slide), **SIZE))
    found = marks(target, slide)
    np.testing.assert_array_equal(
        drawn(found, downsample), mask[::downsample, ::downsample]
    )
    assert "as it states" in found.notes[0]


def test_what_is_written_counts_as_qupath_does(slide: Path, tmp_path: Path) -> None:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[PART.y + 10 : PART.y + 30, PART.x + 40 : PART.x + 70] = 1
    write(mask, tmp_path / "x.geojson", 1, PART)
    (feature,) = json.loads((tmp_path / "x.geojson").read_text())["features"]
    ring = np.array(feature["geometry"]["coordinates"][0])
    assert (ring.min(axis=0).tolist(), ring.max(axis=0).tolist()) == (
        [40, 10],
        [70, 30],
    )
    # Where there is no scanned part, nothing is said of one.
    areas = trace(mask, CLASSES)
    box = areas[0].polygon
    for one in (
        *geojson_features(areas, CLASSES)["features"],
        *extent_features([box], ["n"], "Region*"),
    ):
        assert "metadata" not in one["properties"]
        ring = np.array(one["geometry"]["coordinates"][0])
        assert ring.min(axis=0).tolist() == [PART.x + 40, PART.y + 10]


def through_qupath(document: dict[str, Any]) -> list[dict[str, Any]]:
    """What QuPath keeps of a file: features, and of them what it has a place for."""
    kept = ("objectType", "name", "classification", "isLocked", "metadata")
    return [
        {key: feature[key] for key in ("type", "id", "geometry")}
        | {"properties": {k: v for k, v in feature["properties"].items() if k in kept}}
        for feature in document["features"]
    ]


def box_feature(x0: int, y0: int, x1: int, y1: int, **properties: Any) -> Any:
    ring = [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]
    geometry = {"type": "Polygon", "coordinates": [ring]}
    properties |= {"classification": {"name": "a"}}
    return {"type": "Feature", "geometry": geometry, "properties": properties}


@pytest.mark.parametrize("as_list", [True, False])
def test_what_was_corrected_in_qupath_lies_right(
    slide: Path, tmp_path: Path, as_list: bool
) -> None:
    """Nearly all removed but what lies beyond the part, which would mislead a guess."""
    mask = one_beyond()
    collection = geojson_features(trace(mask, CLASSES), CLASSES, PART)
    features = through_qupath(collection)
    features.append(box_feature(7, 5, 17, 9, objectType="annotation"))  # drawn there
    mask[PART.y + 5 : PART.y + 9, PART.x + 7 : PART.x + 17] = 1
    target = tmp_path / "x.geojson"
    document = {"type": "FeatureCollection", "features": features}
    target.write_text(json.dumps(features if as_list else document))
    np.testing.assert_array_equal(drawn(marks(target, slide)), mask)


def test_of_a_copy_without_the_rest_of_the_canvas_nothing_is_moved(
    tmp_path: Path,
) -> None:
    mask = at_borders()
    mask[:256] = mask[768:] = mask[:, :512] = mask[:, 1280:] = 0
    target = tmp_path / "x.geojson"
    write(mask, target, 1, PART)
    part = {"height": PART.height, "width": PART.width}
    found = read_marks(str(target), **part, classes=CLASSES, slide="copy.tif")
    labels = rasterise(found.areas, CLASSES, y=0, x=0, **part)
    np.testing.assert_array_equal(labels, mask[PART.slices()])


def test_one_area_over_the_border_does_not_move_the_others(
    slide: Path, tmp_path: Path
) -> None:
    drawn_there = {"objectType": "annotation"}
    boxes = [(600, 300, 700, 400), (700, 420, 773, 517), (900, 30, 910, 40)]
    target = tmp_path / "x.geojson"
    features = [box_feature(*box, **drawn_there) for box in boxes]
    target.write_text(json.dumps(features))
    found = marks(target, slide)
    assert "as in QuPath; moved by that" in found.notes[0]
    for area, (x0, y0, x1, y1) in zip(found.areas, boxes, strict=True):
        moved = (x0 + PART.x, y0 + PART.y, x1 + PART.x, y1 + PART.y)
        assert area.polygon.bounds == moved


def test_a_file_drawn_on_the_whole_canvas_is_not_moved(
    slide: Path, tmp_path: Path
) -> None:
    drawn_there = {"objectType": "annotation"}
    boxes = [(520, 260, 560, 300), (900, 600, 1100, 700), (700, 300, 710, 310)]
    target = tmp_path / "x.geojson"
    features = [box_feature(*box, **drawn_there) for box in boxes]
    target.write_text(json.dumps(features))
    found = marks(target, slide)
    assert "lies mostly beyond" in found.notes[0]
    assert [area.polygon.bounds for area in found.areas] == boxes
    for feature in features:
        del feature["properties"]["objectType"]
    target.write_text(json.dumps(features))
    found = marks(target, slide)
    assert [area.polygon.bounds for area in found.areas] == boxes
    assert "reaches beyond" in found.notes[0]
