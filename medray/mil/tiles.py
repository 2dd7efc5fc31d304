"""The tiles of a slide: planning, reading, and writing their features.

What runs in planners, readers and writers; neither torch nor Ray is imported.

Tiles lie side by side from the slide's first pixel at the working level; what is left
over at its lower and right end is less than a tile and is left out. A tile belongs to
one region, a rectangle of whole tiles, so regions share nothing.

One file, because one process reads and writes a region, and imports only this.
"""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
from PIL import Image

from medray.errors import FormatError, SlideError
from medray.execution import PlannedRegion, PlannedSlide, RegionTask, Timing
from medray.geometry import Rectangle, plan_regions
from medray.inference import SlideFacts, start_row
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
    opened,
    read_thumbnail,
    read_working,
    settle_mpp,
    tissue_share,
)
from medray.storage import Digests, add_note, content_digest, files, write_arrays
from medray.types import Columns, Layers, UInt8

Bool = npt.NDArray[np.bool_]

_THUMBNAIL = 1024  # pixels


@dataclass(frozen=True)
class SeenTiles:
    """What was seen of a region when it was read.

    Attributes:
        tiles: (rows, columns) bool, which tiles are encoded.
        unreadable: How many were left out, since something of them cannot be read.
        why: What is wrong with the first; "": nothing.
        read_at: When reading began, seconds since 1970.
        read_s: How long it took.
    """

    tiles: Bool
    unreadable: int
    why: str
    read_at: float
    read_s: float


@dataclass(frozen=True, kw_only=True)
class TilesRecord:
    """What the ledger keeps of a region; times in seconds.

    Attributes:
        read_at: When reading began, since 1970.
        read_s: How long it took.
        predict_s: How long encoding took; None: there was nothing to encode.
        waited_s: How long the device waited for the pixels; None as for `predict_s`.
        unreadable: Tiles that cannot be read.
        why: What is wrong with the first; "": nothing.
        files: Digest of the file of features by its path below the folder.
        tiles: Tiles that were encoded.
        write_s: How long writing took.
        written_at: When it ended.
    """

    read_at: float
    read_s: float
    predict_s: float | None = None
    waited_s: float | None = None
    unreadable: int = 0
    why: str = ""
    files: Digests
    tiles: int
    write_s: float
    written_at: float


TiledSlide = PlannedSlide[SlideFacts]
TilesTask = RegionTask[SlideFacts, Bool]


def plan_tiles(
    slide: Slide, settings: FeatureSettings, given_mpp: float | None = None
) -> tuple[SlideFacts, list[PlannedRegion[Bool]]]:
    """Plan the regions of a slide.

    Args:
        slide: The slide.
        settings: Of the folder of features.
        given_mpp: Microns per pixel of level 0, over what the file says.

    Returns:
        The slide's facts, and each region with tissue, in working pixels, with which
        of its tiles (rows, columns) hold tissue.

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
        region = Rectangle(*(int(n) * side for n in (*first, *size)))
        found.append(PlannedRegion(index, region, tiles))
    if not found:
        said = f"no tissue: none of {rows * columns} tiles holds enough of it"
        said = f"{working.note}; {said}" if working.note else said
        working = replace(working, note=said)
    mpp, _ = settle_mpp(slide, given_mpp)
    level0 = slide.levels[0]
    return SlideFacts(working, mpp, level0.height, level0.width), found


def tile_bytes(task: TilesTask) -> int:
    """Return how many bytes of pixels a region has."""
    return 3 * task.region.height * task.region.width


def read_tiles(
    task: TilesTask, settings: FeatureSettings
) -> tuple[SeenTiles, Layers | None]:
    """Read one region.

    Args:
        task: The region.
        settings: Of the folder.

    Returns:
        What was seen of it, and `pixels`, (height, width, 3) uint8; None where no tile
        is left. A tile of which something cannot be read is left out and counted as
        `unreadable`.

    Raises:
        SlideError: Nothing of it can be read.
        StoreError: The slide's store does not answer.
    """
    start = time.time()
    region, working = task.region, task.slide.facts.working
    bottom = min(region.bottom, working.height)
    right = min(region.right, working.width)
    size = (bottom - region.y, right - region.x)
    slide = opened(task.slide.input.file, task.slide.input.fingerprint)
    pixels, damaged, why = read_working(slide, working, region.y, region.x, *size)
    tiles, side = task.part.copy(), settings.encoder.tile
    before = int(tiles.sum())
    for top, left, tall, wide in damaged:
        rows = slice(top // side, -(-(top + tall) // side))
        tiles[rows, left // side : -(-(left + wide) // side)] = False
    unreadable = before - int(tiles.sum())
    # Only a slide that is smaller than a tile is continued, by its mirror image.
    pad = ((0, region.height - size[0]), (0, region.width - size[1]), (0, 0))
    seen = SeenTiles(tiles, unreadable, why, start, time.time() - start)
    if not tiles.any():
        return seen, None
    if np.any(pad):
        pixels = np.pad(pixels, pad, mode="symmetric")
    return seen, {"pixels": pixels}


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
    task: TilesTask,
    seen: SeenTiles,
    layers: Layers,
    timing: Timing | None,
    settings: FeatureSettings,
    out: str,
) -> TilesRecord:
    """Write what was made of one region.

    Args:
        task: The region.
        seen: What was seen when it was read.
        layers: `features` (N, D); empty when no tile was left.
        timing: Of the encoding.
        settings: Of the folder.
        out: The folder.
    """
    start = time.time()
    places = np.argwhere(seen.tiles) * settings.encoder.tile
    first = (task.region.y, task.region.x)
    level0 = np.rint((places + first) * task.slide.facts.working.downsample)
    nothing = np.zeros((0, settings.encoder.dimensions), settings.dtype)
    features = np.ascontiguousarray(layers.get("features", nothing))
    # Their order in memory must be that of their rows, or safetensors mixes them up.
    coords = np.ascontiguousarray(level0, np.int32)
    arrays = {"features": features, "coords": coords}
    data = safetensors.numpy.save(arrays)
    folder = parts_uri(out, task.slide.slide)
    part = files.join(folder, f"{task.index}.safetensors")
    files.write_bytes(part, data)
    return TilesRecord(
        read_at=seen.read_at,
        read_s=seen.read_s,
        predict_s=timing.predict_s if timing else None,
        waited_s=timing.waited_s if timing else None,
        unreadable=seen.unreadable,
        why=seen.why,
        files={part[len(out) + 1 :]: content_digest(data)},
        tiles=len(features),
        write_s=time.time() - start,
        written_at=time.time(),
    )


def finish_tiles(
    slide: TiledSlide,
    records: Mapping[int, TilesRecord],
    settings: FeatureSettings,
    out: str,
) -> None:
    """Join the features of a slide's regions, and write its thumbnail.

    Raises:
        MedrayError: Something cannot be read or written, or the slide changed while it
            was read.
    """
    source = slide.input
    check_unchanged(source.uri, source.annotation, source.fingerprint)
    paths = [path for record in records.values() for path in record.files]
    parts = [_read_part(files.join(out, path)) for path in paths]
    features = np.zeros((0, settings.encoder.dimensions), settings.dtype)
    coords = np.zeros((0, 2), np.int32)
    if parts:
        features = np.concatenate([part["features"] for part in parts])
        coords = np.concatenate([part["coords"] for part in parts])
    # By their places: how the slide was cut into regions must not be seen.
    order = np.lexsort((coords[:, 1], coords[:, 0]))
    arrays = {"features": features[order], "coords": coords[order]}
    opened_slide = opened(source.file, source.fingerprint)
    thumbnail, _, _ = read_thumbnail(opened_slide, _THUMBNAIL)
    picture = io.BytesIO()
    Image.fromarray(thumbnail).save(picture, "JPEG", quality=90)
    files.write_bytes(thumbnail_uri(out, slide.slide), picture.getvalue())
    write_arrays(features_uri(out, slide.slide), arrays, provenance(settings, slide))


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


def sum_up(slide: TiledSlide, records: Sequence[TilesRecord], _: None) -> Columns:
    """Sum up a finished slide for slides.parquet.

    Raises:
        SlideError: No tile of the slide could be read.
    """
    row = start_row(slide.facts, slide.regions, records)
    tiles = sum(record.tiles for record in records)
    unreadable = sum(record.unreadable for record in records)
    row |= {"tiles": tiles, "unreadable": unreadable}
    if unreadable:
        why = next(record.why for record in records if record.unreadable)
        if not tiles:
            raise SlideError(why)
        add_note(row, f"{unreadable} tiles cannot be read: {why}")
    return row
