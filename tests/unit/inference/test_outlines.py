"""A mask's outlines, and the mask drawn from them again."""

import json
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from noise import noise

import medray.inference.outlines
from medray.annotations.rasterize import rasterise
from medray.annotations.reading import read_annotation
from medray.classes import Classes
from medray.geometry import Rectangle
from medray.inference.outlines import trace, write_outlines
from medray.storage import ome_zarr

CLASSES = Classes(("background", "a", "b"))


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    side=st.integers(7, 100),
    seed=st.integers(0, 99),
    downsample=st.sampled_from([1.0, 4.0]),
)
def test_outlines_drawn_again_are_the_mask(
    height: int, width: int, side: int, seed: int, downsample: float
) -> None:
    mask = noise(height, width, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(medray.inference.outlines, "_SIDE", 10**6)
        whole = trace(mask, CLASSES, downsample=downsample)
        patch.setattr(medray.inference.outlines, "_SIDE", side)
        areas = trace(mask, CLASSES, downsample=downsample)
    assert all(area.polygon.is_valid for area in areas)
    drawn = rasterise(
        areas, CLASSES, y=0, x=0, height=height, width=width, downsample=downsample
    )
    np.testing.assert_array_equal(drawn, mask)
    # Seams leave no trace: the same objects, as many, each in one piece.
    assert len(areas) == len(whole)
    for one, other in zip(areas, whole, strict=True):
        assert one.class_name == other.class_name
        assert shapely.equals(one.polygon, other.polygon)


def test_qupath_can_import_them(tmp_path: Path) -> None:
    mask = np.zeros((600, 700), np.uint8)
    mask[100:500, 100:600] = 1
    mask[200:300, 200:300] = 0
    mask[220:240, 220:240] = 2
    uri = str(tmp_path / "mask.ome.zarr")
    ome_zarr.create_labels(
        uri, 600, 700, mpp=0.5, name="", classes=CLASSES, attributes={}
    )
    ome_zarr.write_region(uri, Rectangle(0, 0, 600, 700), mask)
    target = tmp_path / "mask.geojson"
    assert write_outlines(uri, str(target), CLASSES, downsample=2) == 2
    document = json.loads(target.read_text())
    assert document["type"] == "FeatureCollection"
    first = document["features"][0]
    assert first["properties"]["objectType"] == "annotation"
    assert first["properties"]["classification"]["name"] == "a"
    assert len(first["properties"]["classification"]["color"]) == 3
    assert len(first["geometry"]["coordinates"]) == 2  # the outline and a hole
    areas = read_annotation(str(target), height=1200, width=1400, classes=CLASSES)
    drawn = rasterise(areas, CLASSES, y=0, x=0, height=600, width=700, downsample=2)
    np.testing.assert_array_equal(drawn, mask)
