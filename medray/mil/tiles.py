"""The tiles of a slide: planned, read, and what was made of them written.

What runs in planners, readers and writers; neither torch nor Ray is imported.

Tiles lie side by side from the slide's first pixel at the working level; what is left
over at its lower and right end is less than a tile and is left out. A tile belongs to
one region, a rectangle of whole tiles, so regions share nothing.
"""

from __future__ import annotations

import io
import time
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
from PIL import Image

from medray.errors import FormatError, SlideError
from medray.geometry import plan_regions
from medray.inference import start_row
from medray.mil.features import (
    FeatureSettings,
    features_uri,
    parts_uri,
    provenance,
    thumbnail_uri,
)
from medray.slides import (
    Slide,
    check_unchanged,
    choose_level,
    mpp_columns,
    opened,
    read_thumbnail,
    read_working,
    settle_mpp,
    tissue_share,
    working_of,
)
from medray.storage import add_note, content_digest, files, write_arrays
from medray.types import Row, UInt8

Bool = npt.NDArray[np.bool_]

_THUMBNAIL = 1024  # pixels


def plan_tiles(
    slide: Slide, settings: FeatureSettings, given_mpp: float | None = None
) -> tuple[Row, list[Row]]:
    """Plan the regions of a slide.

    Args:
        slide: The slide.
        settings: Of the folder of features.
        given_mpp: Microns per pixel of level 0, over what the file says.

    Returns:
        The slide's facts, and a row for each region with tissue: its `index`, its
        `region` (y, x, height, width) in working pixels, and its `tiles` (rows,
        columns), which of them hold tissue.

    Raises:
        SlideError: The slide does not suit the encoder, or cannot be read.
    """
    side = settings.encoder.tile
    working = choose_level(slide, settings.encoder.mpp, given_mpp)
    share = tissue_share(slide, working.height, working.width, side)
    # A slide smaller than a tile has one.
    rows, columns = (max(1, n // side) for n in (working.height, working.width))
    wanted = share[:rows, :columns] >= max(settings.tissue, 1e-9)
    found = []
    for index, part in enumerate(plan_regions(rows, columns, settings.region)):
        tiles = wanted[part.slices()]
        if not tiles.any():
            continue
        ys, xs = np.flatnonzero(tiles.any(axis=1)), np.flatnonzero(tiles.any(axis=0))
        # Only the hull of what is wanted is read.
        tiles = tiles[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
        first, size = (part.y + ys[0], part.x + xs[0]), tiles.shape
        region = [int(n) * side for n in (*first, *size)]
        found.append({"index": index, "region": region, "tiles": tiles.tolist()})
    facts = asdict(working) | mpp_columns(settle_mpp(slide, given_mpp)[0])
    facts |= {
        "level0_height": slide.levels[0].height,
        "level0_width": slide.levels[0].width,
        "regions": len(found),
    }
    if not found:
        said = f"no tissue: none of {rows * columns} tiles holds enough of it"
        add_note(facts, said)
    return facts, found


def tile_bytes(row: Row) -> int:
    """Return how many bytes of pixels a region has."""
    return 3 * int(row["region"][2]) * int(row["region"][3])


def read_tiles(row: Row, settings: FeatureSettings) -> tuple[Row, UInt8 | None]:
    """Read one region.

    Args:
        row: The region, as the plan made it.
        settings: Of the folder.

    Returns:
        The row with how it went, and (height, width, 3) uint8 pixels; None where no
        tile is left. A tile of which something cannot be read is left out and counted
        as `unreadable`.

    Raises:
        SlideError: Nothing of it can be read.
        StoreError: The slide's store does not answer.
    """
    start = time.time()
    y, x, height, width = row["region"]
    bottom, right = min(y + height, row["height"]), min(x + width, row["width"])
    size = (bottom - y, right - x)
    pixels, damaged, why = read_working(opened(row), working_of(row), y, x, *size)
    tiles, side = np.array(row["tiles"], dtype=bool), settings.encoder.tile
    before = int(tiles.sum())
    for top, left, tall, wide in damaged:
        rows = slice(top // side, -(-(top + tall) // side))
        tiles[rows, left // side : -(-(left + wide) // side)] = False
    left_out = before - int(tiles.sum())
    row = row | {"tiles": tiles.tolist(), "unreadable": left_out, "why": why}
    row |= {"read_at": start, "read_s": time.time() - start}
    # Only a slide that is smaller than a tile is continued, by its mirror image.
    pad = ((0, height - size[0]), (0, width - size[1]), (0, 0))
    if np.any(pad):
        pixels = np.pad(pixels, pad, mode="symmetric")
    return row, pixels if tiles.any() else None


def cut_tiles(pixels: UInt8, tiles: Bool) -> UInt8:
    """Cut a region into the tiles that are wanted, row by row.

    Args:
        pixels: (height, width, 3) uint8 of whole tiles.
        tiles: (rows, columns) bool.

    Returns:
        (N, side, side, 3) uint8.
    """
    rows, columns = tiles.shape
    side = pixels.shape[0] // rows
    grid = pixels.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
    return np.ascontiguousarray(grid[tiles])


def write_tiles(
    row: Row, layers: dict[str, npt.NDArray[Any]], settings: FeatureSettings, out: str
) -> Row:
    """Write what was made of one region.

    Args:
        row: The region, as it was read.
        layers: `features` (N, D); empty when no tile was left.
        settings: Of the folder.
        out: The folder.

    Returns:
        Its record for the ledger.
    """
    start = time.time()
    side = settings.encoder.tile
    places = np.argwhere(np.asarray(row["tiles"], dtype=bool)) * side
    level0 = np.rint((places + row["region"][:2]) * row["downsample"])
    nothing = np.zeros((0, settings.encoder.dimensions), settings.dtype)
    features = np.ascontiguousarray(layers.get("features", nothing))
    # Their order in memory must be that of their rows, or safetensors mixes them up.
    coords = np.ascontiguousarray(level0, np.int32)
    arrays = {"features": features, "coords": coords}
    kept = ("read_at", "read_s", "predict_s", "waited_s", "unreadable", "why")
    record: Row = {key: row[key] for key in kept if key in row}
    data = safetensors.numpy.save(arrays)
    part = files.join(parts_uri(out, row["slide"]), f"{row['index']}.safetensors")
    files.write_bytes(part, data)
    record["files"] = {part[len(out) + 1 :]: content_digest(data)}
    record["tiles"] = len(features)
    return record | {"write_s": time.time() - start, "written_at": time.time()}


def finish_tiles(settings: FeatureSettings, out: str, row: Row) -> Row:
    """Put the regions of a slide together, and write its small picture.

    Args:
        settings: Of the folder.
        out: The folder.
        row: The slide's facts; `records`: of its regions.

    Returns:
        Nothing to add to the slide's row.

    Raises:
        MedrayError: Something cannot be read or written, or the slide changed while it
            was read.
    """
    check_unchanged(row)
    paths = [path for record in row["records"].values() for path in record["files"]]
    parts = [_read_part(files.join(out, path)) for path in paths]
    features = np.zeros((0, settings.encoder.dimensions), settings.dtype)
    coords = np.zeros((0, 2), np.int32)
    if parts:
        features = np.concatenate([part["features"] for part in parts])
        coords = np.concatenate([part["coords"] for part in parts])
    # By their places: how the slide was cut into regions must not be seen.
    order = np.lexsort((coords[:, 1], coords[:, 0]))
    arrays = {"features": features[order], "coords": coords[order]}
    thumbnail, _, _ = read_thumbnail(opened(row), _THUMBNAIL)
    picture = io.BytesIO()
    Image.fromarray(thumbnail).save(picture, "JPEG", quality=90)
    files.write_bytes(thumbnail_uri(out, row["slide"]), picture.getvalue())
    write_arrays(features_uri(out, row["slide"]), arrays, provenance(settings, row))
    return {}


def _read_part(uri: str) -> dict[str, npt.NDArray[Any]]:
    try:
        part: dict[str, npt.NDArray[Any]] = safetensors.numpy.load(
            files.read_bytes(uri)
        )
    except (FileNotFoundError, safetensors.SafetensorError) as error:
        raise FormatError(
            f"{uri}: expected the features of a region, found {error}; run again"
        ) from error
    return part


def sum_up(header: Row, regions: list[Row]) -> Row:
    """Sum up a finished slide for slides.parquet.

    Raises:
        SlideError: No tile of the slide could be read.
    """
    row = start_row(header, regions)
    row["tiles"] = sum(region["tiles"] for region in regions)
    row["unreadable"] = sum(region.get("unreadable", 0) for region in regions)
    if row["unreadable"]:
        why = next(region["why"] for region in regions if region.get("unreadable"))
        if not row["tiles"]:
            raise SlideError(why)
        add_note(row, f"{row['unreadable']} tiles cannot be read: {why}")
    return row
