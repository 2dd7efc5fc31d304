"""Where a run is least certain, as files that a pathologist corrects in QuPath.

    rank      mean uncertainty of squares of each mask, band by band
    write     the most uncertain ones with the mask's outlines, one file per slide

What comes back goes into `medray ingest --annotations`: within the squares a slide is
then annotated, elsewhere nothing is known of it.
"""

from __future__ import annotations

import heapq
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import shapely

from medray.annotations import EXTENT, Area, extent_features, geojson_features
from medray.classes import Classes
from medray.errors import ConfigError, FormatError, SlideError
from medray.geometry import Rectangle
from medray.inference import layer_uri, mask_uri, read_run, trace
from medray.slides import scanned_bounds
from medray.storage import files, ome_zarr
from medray.types import Row

log = logging.getLogger(__name__)

SIDE = 2 * ome_zarr.PATCH
"""Side of a square in pixels of level 0: ingest makes whole patches of it."""


@dataclass(frozen=True)
class Review:
    """What there is to correct.

    Attributes:
        out: Folder of the files.
        squares: How many squares were chosen, of all slides.
        slides: Slides with at least one, each with how many.
        failed: Why some slides could not be looked at.
    """

    out: str
    squares: int
    slides: dict[str, int]
    failed: dict[str, str]

    def __str__(self) -> str:
        lines = [f"cannot  {slide}: {why}" for slide, why in self.failed.items()]
        for slide, count in self.slides.items():
            lines.append(f"{count:6}  {self.out}/{slide}.geojson")
        lines.append(
            f"{self.squares} squares of {len(self.slides)} slides, {len(self.failed)} "
            f"could not be looked at"
        )
        return "\n".join(lines)


def review(run: str, *, out: str, count: int = 20) -> Review:
    """Write the most uncertain squares of a run as QuPath GeoJSON, one file per slide.

    A square is 1024 x 1024 level-0 pixels, on a grid from the slide's origin. In the
    files, unlike the table, coordinates count as QuPath's do: from the corner of the
    scanned part, where the slide states that its canvas is larger. A square's
    uncertainty is the mean of the layer `uncertainty`: the entropy of the predicted
    classes, of its maximum (Shannon 1948; for choosing what to label: Settles 2009,
    section 3.1).

    Args:
        run: Folder of a run made with `--quality`.
        out: Folder for SLIDE.geojson and squares.parquet. The table has slide, y, x,
            height, width (level-0 pixels from the slide's corner) and uncertainty (0 to
            1).
        count: Squares of 1024 pixels at most, over all slides.

    Raises:
        ConfigError: There is no run, or it has no uncertainty.

    Examples:
        >>> from medray.evaluation import review
        >>> places = review("run", out="to_correct", count=3)
        >>> places.squares, places.failed
        (3, {})
    """
    run, out = files.absolute(run), files.absolute(out)
    settings = read_run(run)
    if "uncertainty" not in settings.layers:
        raise ConfigError(
            f"{run}: has no layer of uncertainty; run `medray infer` again with "
            f"--quality, into another folder"
        )
    if count < 1:
        raise ConfigError(f"expected at least one square, found {count}")
    table = files.read_table(files.join(run, "slides.parquet")).to_pylist()
    failed: dict[str, str] = {}
    chosen: list[tuple[float, int, Row]] = []
    bounds: dict[str, Rectangle | None] = {}
    for row in table:
        if row["status"] != "done":
            failed[row["slide"]] = f"not done: {row['message']}"
            continue
        try:
            size = {"height": row["level0_height"], "width": row["level0_width"]}
            bounds[row["slide"]] = scanned_bounds(row["uri"], **size)
            for square in _squares(run, row):
                # Of equal ones the first; the number also keeps rows from comparing.
                key = (square["uncertainty"], -len(chosen), square)
                push = heapq.heappush if len(chosen) < count else heapq.heappushpop
                push(chosen, key)
        except (FormatError, SlideError) as error:
            failed[row["slide"]] = f"{error}"
    squares = [square for _, _, square in sorted(chosen, key=lambda one: -one[0])]
    found: dict[str, int] = {}
    by_slide = {row["slide"]: row for row in table}
    for slide in dict.fromkeys(square["slide"] for square in squares):
        mine = [square for square in squares if square["slide"] == slide]
        found[slide] = len(mine)
        features = _features(
            run, by_slide[slide], mine, settings.classes, bounds[slide]
        )
        target = files.join(out, f"{slide}.geojson")
        files.write_bytes(target, json.dumps(features).encode())
    uri = files.join(out, "squares.parquet")
    files.write_table(uri, pa.Table.from_pylist(squares, _SCHEMA))
    return Review(out, len(squares), found, failed)


_SCHEMA = pa.schema(
    [("slide", pa.string())]
    + [(name, pa.int64()) for name in ("y", "x", "height", "width")]
    + [("uncertainty", pa.float64())]
)


def _squares(run: str, row: Row) -> Iterator[Row]:
    """Return the squares of a slide that are not certain all over."""
    layer = ome_zarr.open_level(layer_uri(run, row["slide"], "uncertainty"))
    scale = row["downsample"]
    height, width = row["level0_height"], row["level0_width"]
    columns = _edges(width, scale, layer.shape[1])
    rows = _edges(height, scale, layer.shape[0])
    for i, (top, bottom) in enumerate(rows):
        band = np.asarray(layer[top:bottom])
        for j, (left, right) in enumerate(columns):
            mean = float(band[:, left:right].mean()) / 255
            if mean > 0:
                yield {
                    "slide": row["slide"],
                    "y": i * SIDE,
                    "x": j * SIDE,
                    "height": min(SIDE, height - i * SIDE),
                    "width": min(SIDE, width - j * SIDE),
                    "uncertainty": mean,
                }


def _edges(length: int, scale: float, pixels: int) -> list[tuple[int, int]]:
    """Return the first and last pixel of the mask of each square along an axis."""
    found = []
    for start in range(0, length, SIDE):
        first = round(start / scale)
        last = min(pixels, round(min(start + SIDE, length) / scale))
        if last > first:
            found.append((first, last))
    return found


def _features(
    run: str,
    row: Row,
    squares: list[Row],
    classes: Classes,
    bounds: Rectangle | None,
) -> Row:
    """Return the squares, and the mask's outlines within them."""
    mask = ome_zarr.open_level(mask_uri(run, row["slide"]))
    scale = row["downsample"]
    areas: list[Area] = []
    boxes, names = [], []
    for square in squares:
        y, x = square["y"], square["x"]
        box = shapely.box(x, y, x + square["width"], y + square["height"])
        boxes.append(box)
        names.append(f"uncertainty {square['uncertainty']:.3f}")
        top, left = int(y / scale), int(x / scale)
        bottom = -int(-(y + square["height"]) // scale)
        right = -int(-(x + square["width"]) // scale)
        part = np.asarray(mask[top:bottom, left:right])
        for area in trace(part, classes, downsample=scale):
            moved = shapely.transform(
                area.polygon, lambda xy, at=(left, top): xy + np.array(at) * scale
            )
            within = shapely.intersection(moved, box)
            areas += [
                Area(polygon, area.class_name)
                for polygon in shapely.get_parts(within)
                if polygon.geom_type == "Polygon" and polygon.area
            ]
    collection = geojson_features(areas, classes, bounds)
    collection["features"][:0] = extent_features(boxes, names, EXTENT, bounds)
    return collection
