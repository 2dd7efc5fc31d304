"""A mask's objects as GeoJSON annotations, for QuPath."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from rasterio import features

from medray.annotations import Area, geojson_features
from medray.classes import Classes
from medray.geometry import Rectangle, plan_regions
from medray.storage import files, ome_zarr

# Side of the parts that are traced at once; pieces at their seams are joined after.
_SIDE = 4096


def write_outlines(
    mask: str,
    target: str,
    classes: Classes,
    *,
    downsample: float,
    bounds: Rectangle | None = None,
) -> int:
    """Write a finished mask's objects as a FeatureCollection of annotations.

    Args:
        mask: The OME-Zarr.
        target: The GeoJSON file to write.
        classes: Names and colours; class 0 is no object.
        downsample: Level-0 pixels per pixel of the mask, per side.
        bounds: The scanned part of the slide, if it is not all of it: QuPath counts
            from its corner (`medray.slides.bounds`).

    Returns:
        The number of objects.
    """
    areas = trace(ome_zarr.open_level(mask), classes, downsample=downsample)
    files.write_bytes(target, as_geojson(areas, classes, bounds))
    return len(areas)


def as_geojson(
    areas: Sequence[Area], classes: Classes, bounds: Rectangle | None = None
) -> bytes:
    """Return areas as the bytes of a FeatureCollection; see `geojson_features`."""
    collection = geojson_features(areas, classes, bounds)
    return json.dumps(collection, separators=(",", ":")).encode()


def trace(mask: Any, classes: Classes, *, downsample: float = 1.0) -> list[Area]:
    """Trace the objects of a mask along their pixels' edges, with holes.

    An object is a set of pixels of one class (not 0) that hang together by their edges.
    Drawn again (`medray.annotations.rasterize`) the areas give the mask.

    Args:
        mask: (height, width) uint8, an array or a zarr array, read in parts.
        classes: Names by label value.
        downsample: Level-0 pixels per pixel of the mask, per side.

    Returns:
        The objects in level-0 pixels, by class and then from top to bottom.
    """
    height, width = mask.shape
    inner: dict[int, list[Any]] = {}
    cut: dict[int, list[Any]] = {}
    for part in plan_regions(height, width, _SIDE):
        labels = np.asarray(mask[part.slices()])
        for geometry, value in _shapes(labels, part.y, part.x):
            x0, y0, x1, y1 = shapely.bounds(geometry)
            at_seam = (
                (x0 == part.x and part.x > 0)
                or (y0 == part.y and part.y > 0)
                or (x1 == part.right and part.right < width)
                or (y1 == part.bottom and part.bottom < height)
            )
            (cut if at_seam else inner).setdefault(value, []).append(geometry)
    areas = []
    for value in sorted(inner.keys() | cut.keys()):
        joined = shapely.get_parts(shapely.union_all(cut.get(value, [])))
        # Joining leaves points in the middle of straight edges.
        whole = [*inner.get(value, []), *shapely.simplify(joined, 0)]
        whole.sort(key=lambda one: tuple(shapely.bounds(one)[[1, 0]]))
        scaled = shapely.transform(whole, lambda xy: xy * downsample)
        areas += [Area(polygon, classes.names[value]) for polygon in scaled]
    return areas


def _shapes(
    labels: npt.NDArray[np.uint8], y: int, x: int
) -> list[tuple[shapely.Polygon, int]]:
    """Return the polygons of one part, in pixels of the mask."""
    found = []
    for shape, value in features.shapes(labels, mask=labels > 0, connectivity=4):
        rings = (np.array(ring) + np.array([x, y]) for ring in shape["coordinates"])
        shell, *holes = rings
        found.append((shapely.Polygon(shell, holes), int(value)))
    return found
