"""The tiles of the viewer on slides and masks of their own."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from medray.apps.viewer.layers import difference_tile, differences, mask_tile
from medray.apps.viewer.tiles import SlideSource, last_zoom, slide_tile, tile_region
from medray.apps.viewer.worst import worst_regions
from medray.classes import Classes
from medray.datasets.synthetic import write_slide
from medray.datasets.synthetic_scene import draw_scene
from medray.geometry import Rectangle
from medray.slides.image import ArraySlide
from medray.slides.opening import open_slide
from medray.storage import ome_zarr


def test_a_slide_without_coarse_levels_is_cut_from_one_small_picture() -> None:
    """A tile that would read more than 4096 x 4096 pixels is cut from an overview."""
    pixels = np.zeros((6000, 6000, 3), np.uint8)
    pixels[:, 3000:] = 200
    slide = ArraySlide(pixels)
    seen = slide_tile(slide, Rectangle(0, 0, 188, 188), 32)
    assert seen.shape == (188, 188, 3)
    assert seen[:, :93].max() == 0
    assert seen[:, 95:].min() == 200


@pytest.mark.parametrize("mask_step", [2.0, 1.6, 0.5])
def test_a_mask_of_another_resolution_lies_where_its_slide_does(
    mask_step: float, tmp_path: Path
) -> None:
    uri = str(tmp_path / "mask.ome.zarr")
    shape = (round(400 / mask_step), round(320 / mask_step))
    labels = np.random.default_rng(0).integers(0, 2, shape).astype(np.uint8)
    ome_zarr.create_labels(
        uri, *shape, mpp=1.0, name="", classes=Classes(), attributes={}
    )
    ome_zarr.write_region(uri, Rectangle(0, 0, *shape), labels)
    source = SlideSource("a", "", "", "", 400, 320, None, uri, mask_step, shape)
    region, step = tile_region(source, last_zoom(400, 320), 1, 1)
    assert (region, step) == (Rectangle(256, 256, 144, 64), 1)
    if mask_step < 1:  # a finer mask is seen at the level that fits
        mask_step, labels = 1.0, ome_zarr.open_level(uri, 1)[:]
    y, x = (
        np.minimum((np.arange(256, 256 + n) + 0.5) / mask_step, m - 1).astype(int)
        for n, m in zip((144, 64), labels.shape, strict=True)
    )
    assert np.array_equal(mask_tile(source, region, step), labels[np.ix_(y, x)])


def test_a_level_that_fits_is_taken_as_it_is(tmp_path: Path) -> None:
    path = write_slide(
        tmp_path, "a", draw_scene(3, height=700, width=600), layout="pyramid"
    )
    with open_slide(path) as slide:
        for level in range(3):
            whole = tifffile.imread(path, series=0, level=level)
            region = Rectangle(32, 16, 100, 90)
            wanted = whole[region.slices()]
            assert np.array_equal(slide_tile(slide, region, 2**level), wanted)


def test_where_nobody_annotated_nothing_is_different(tmp_path: Path) -> None:
    """Areas of class Region* say where a slide is annotated; elsewhere it is unknown."""

    def square(name: str, start: int, end: int) -> dict[str, Any]:
        ring = [[start, start], [end, start], [end, end], [start, end], [start, start]]
        return {
            "type": "Feature",
            "properties": {"classification": {"name": name}},
            "geometry": {"type": "Polygon", "coordinates": [ring]},
        }

    features = [square("Region*", 0, 100), square("tumour", 10, 50)]
    truth = tmp_path / "a.geojson"
    truth.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    uri = str(tmp_path / "mask.ome.zarr")
    ome_zarr.create_labels(
        uri, 200, 200, mpp=1.0, name="", classes=Classes(), attributes={}
    )
    whole = Rectangle(0, 0, 200, 200)
    ome_zarr.write_region(uri, whole, np.ones((200, 200), np.uint8))
    source = SlideSource("a", "", "", "", 200, 200, None, uri, 1.0, (200, 200))
    source = dataclasses.replace(source, truth=str(truth), kind="annotation")
    wanted = np.zeros((200, 200), np.uint8)
    wanted[:100, :100] = 2
    wanted[10:50, 10:50] = 1
    assert np.array_equal(difference_tile(source, whole, 1, Classes()), wanted)
    worst = worst_regions(source, Classes(), side=100)
    assert [(one["y"], one["x"], one["wrong"]) for one in worst] == [(0, 0, 0.84)]


def test_differences_between_several_classes() -> None:
    mask, truth = np.array([[0, 1, 1, 0, 2, 2]]), np.array([[0, 1, 0, 2, 1, 2]])
    assert differences(mask, truth).tolist() == [[0, 1, 2, 3, 4, 1]]
