"""A run or a dataset -> copies in the formats that other viewers open.

    read      the mask and its layers, the image from its slide or dataset; part by part
    write     OME-Zarr 0.5 or 0.4 with the image in it, OME-TIFF, or a plain pyramid
    commit    a row a slide in OUT/slides.parquet, when its file is complete

OUT/
convert.yaml              what was asked for (ConvertSettings)
slides.parquet            a row a slide: status, and what it was made of
SLIDE.ome.zarr            or SLIDE.ome.tif, or SLIDE.tif
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tifffile

from medray.classes import Classes
from medray.datasets.dataset import LABELS, labels_uri, read_dataset, slide_uri
from medray.errors import ConfigError, FormatError, MedrayError, SlideError
from medray.execution.commit import Summary
from medray.execution.progress import Progress
from medray.execution.rows import map_rows
from medray.execution.run import Executor
from medray.geometry import plan_regions
from medray.inference.run import LAYERS, layer_uri, mask_uri, read_run
from medray.slides import Slide, open_slide
from medray.slides.fingerprint import slide_digest
from medray.slides.resolution import Working, read_working, working_of
from medray.storage import files, ngff, ngff_v04, ome_zarr
from medray.storage.ledger import Ledger
from medray.storage.lock import locked
from medray.storage.yaml_config import keep_settings, to_dict
from medray.types import Row, UInt8

log = logging.getLogger(__name__)
Format = Literal["ome-zarr", "ome-zarr-0.4", "ome-tiff", "tiff"]

FORMATS: dict[str, str] = {
    "ome-zarr": ".ome.zarr",
    "ome-zarr-0.4": ".ome.zarr",
    "ome-tiff": ".ome.tif",
    "tiff": ".tif",
}
"""What each format's files end in."""

_TIMEOUT_S = 24 * 3600.0  # for a copy, however large

MASK = "mask"
"""Name of a run's mask among the label images of an image."""


@dataclass(frozen=True, kw_only=True)
class ConvertSettings:
    """What decides the copies of a folder; stored as `convert.yaml`.

    Attributes:
        source: The run or the dataset.
        to: The format.
        with_image: Put the slide's image beside its mask.
    """

    source: str
    to: str
    with_image: bool

    def decisive(self) -> dict[str, Any]:
        """Give what decides the copies, as plain values."""
        return to_dict(self)


@dataclass(frozen=True)
class Layer:
    """A label image.

    Attributes:
        name: Among those of its image.
        uri: Its OME-Zarr.
        classes: Names and colours of its values.
    """

    name: str
    uri: str
    classes: Classes


@dataclass(frozen=True)
class Copy:
    """What a slide's copy is made of.

    Attributes:
        slide: Its id.
        digest: Of the slide that the labels belong to.
        image: The file or OME-Zarr with its pixels; "" to leave them out.
        working: How the image is read, so that it lies under the labels.
        layers: Its label images, the first of which stands alone without an image.
        scene: Which of several slides in the image's file, if the user chose.
        plane: Which of several focal planes, likewise.
    """

    slide: str
    digest: str
    image: str
    working: Working
    layers: tuple[Layer, ...]
    scene: int | None = None
    plane: int | None = None

    @property
    def made_of(self) -> str:
        """Name the contents: equal names, equal copies."""
        roots = [ome_zarr.read_root(layer.uri) or "" for layer in self.layers]
        return "+".join([self.digest, *roots])


def convert(
    source: str,
    *,
    to: Format,
    out: str,
    with_image: bool = False,
    executor: Executor = "ray",
) -> Summary:
    """Write copies of a run's masks, or of a dataset, for viewers and other tools.

    Copies have the pixels, the levels and the resolution of the masks. Running the same
    command again makes what is missing and what has changed.

    Args:
        source: Folder of a run or of a dataset.
        to: `ome-zarr`: version 0.5 (zarr v3); `ome-zarr-0.4` (zarr v2); `ome-tiff`:
            levels as SubIFDs, for QuPath, Fiji and others by Bio-Formats; `tiff`: a
            tiled pyramid of pages, for ASAP and OpenSlide. A TIFF holds label values.
        out: Folder to make; TIFF needs one on a disk.
        with_image: The slide's image, read as the model read it, with the mask in its
            `labels`. A dataset has it in any case.
        executor: On a Ray cluster, or in this process, one thing after the other.

    Raises:
        ConfigError: The request is wrong, or OUT holds other copies.
        StoreError: OUT cannot be written.
    """
    source, out = files.absolute(source), files.absolute(out)
    if to not in FORMATS:
        raise ConfigError(f"--to: expected one of {', '.join(FORMATS)}, found {to}")
    tiff = to in ("ome-tiff", "tiff")
    if tiff and with_image:
        raise ConfigError(f"--to {to} holds a mask alone; leave --with-image away")
    if tiff and not files.is_local(out):
        raise ConfigError(
            f"{out}: TIFF is written to a folder on a disk; copy the files from there"
        )
    is_run = files.exists(files.join(source, "run.yaml"))
    if to == "ome-zarr" and not (is_run and with_image):
        raise ConfigError(
            f"{source}: is OME-Zarr 0.5 as it is; add --with-image to a run's masks, "
            f"or choose another format ({', '.join(FORMATS)})"
        )
    settings = ConvertSettings(source=source, to=to, with_image=with_image)
    copies, failed = _of_run(source, with_image) if is_run else _of_dataset(source)
    with locked(out, "convert") as check:
        keep_settings(files.join(out, "convert.yaml"), settings)
        return _convert(copies, failed, to, out, executor, check)


# --- find -----------------------------------------------------------------------------


def _of_run(run: str, with_image: bool) -> tuple[list[Copy], dict[str, str]]:
    """Give what is done of a run, and why the rest is not there."""
    settings = read_run(run)
    done, failed = _rows(run, "infer")
    copies = []
    for row in done:
        slide = row["slide"]
        layers = [Layer(MASK, mask_uri(run, slide), settings.classes)]
        if with_image:
            layers += [
                Layer(name, layer_uri(run, slide, name), LAYERS[name])
                for name in settings.layers
            ]
        image = row["uri"] if with_image else ""
        working = working_of(row)
        chosen = {name: row.get(name) for name in ("scene", "plane")}
        copy = Copy(slide, row["digest"], image, working, tuple(layers), **chosen)
        copies.append(copy)
    return copies, failed


def _of_dataset(dataset: str) -> tuple[list[Copy], dict[str, str]]:
    classes = read_dataset(dataset).classes
    done, failed = _rows(dataset, "ingest")
    copies = []
    for row in done:
        slide = row["slide"]
        image, labels = slide_uri(dataset, slide), labels_uri(dataset, slide)
        there = files.exists(files.join(labels, "zarr.json"))
        layers = (Layer(LABELS, labels, classes),) if there else ()
        try:
            height, width = ome_zarr.open_level(image).shape[1:]
        except FormatError as error:
            failed[slide] = f"{error}"
            continue
        working = Working(0, 1.0, height, width, 1.0, row["mpp"])
        copies.append(Copy(slide, row["digest"], image, working, layers))
    return copies, failed


def _rows(folder: str, stage: str) -> tuple[list[Row], dict[str, str]]:
    """Give the rows of slides that are done, and why the others are not."""
    uri = files.join(folder, "slides.parquet")
    if not files.exists(uri):
        raise ConfigError(f"{uri} is missing; run `medray {stage}` to its end")
    rows: list[Row] = files.read_table(uri).to_pylist()
    done = [row for row in rows if row["status"] == "done"]
    others = [row for row in rows if row["status"] != "done"]
    return done, {row["slide"]: f"not done: {row['message']}" for row in others}


# --- commit ---------------------------------------------------------------------------


def _convert(
    copies: list[Copy],
    failed: dict[str, str],
    to: str,
    out: str,
    executor: Executor,
    check: Callable[[], None],
) -> Summary:
    ledger = Ledger(out)
    todo: dict[str, tuple[Copy, str]] = {}
    for copy in copies:
        made_of, before = copy.made_of, ledger.slides.get(copy.slide)
        same = before and before["status"] == "done" and before["digest"] == made_of
        if same and files.exists(_target(copy.slide, to, out)):
            continue
        todo[copy.slide] = (copy, made_of)
    skipped = len(copies) - len(todo)
    log.info("%d slides, %d of them to do, into %s", len(copies), len(todo), out)
    if not todo:
        return Summary(out, 0, skipped, failed, 0, 0.0)
    for slide in ledger.slides.keys() & todo.keys():
        ledger.forget_slide(slide)  # its file is about to be replaced
    ledger.flush()
    start, failed = time.perf_counter(), dict(failed)
    write = functools.partial(_write, to=to, out=out)
    copies = [copy for copy, _ in todo.values()]
    with Progress("convert", len(todo)) as progress, ledger.kept():
        for copy, error in map_rows(
            write, copies, executor=executor, timeout=_TIMEOUT_S, check=check
        ):
            slide, message = copy.slide, f"{error or ''}"
            ledger.commit_slide(
                {
                    "slide": slide,
                    "status": "failed" if message else "done",
                    "message": message,
                    "digest": todo[slide][1],
                    "file": f"{slide}{FORMATS[to]}",
                }
            )
            if message:
                failed[slide] = message
            progress.slide(slide, f"failed: {message}" if message else "done")
    ledger.close()
    seconds = time.perf_counter() - start
    done = len(todo.keys() - failed.keys())
    return Summary(out, done, skipped, failed, 0, seconds)


# --- write ----------------------------------------------------------------------------


def _target(slide: str, to: str, out: str) -> str:
    return files.join(out, f"{slide}{FORMATS[to]}")


def _write(copy: Copy, to: str, out: str) -> None:
    """Write one copy; nothing of it is left where that fails.

    Raises:
        MedrayError: The mask or the image cannot be read, or the copy not be written.
    """
    target = _target(copy.slide, to, out)
    try:
        if to in ("ome-tiff", "tiff"):
            _write_tiff(copy, target, ome=to == "ome-tiff")
        elif to == "ome-zarr":
            _write_05(copy, target)
        else:
            _write_04(copy, target)
    except (MedrayError, OSError):
        with contextlib.suppress(MedrayError):
            files.remove(target)  # half of a copy, or one of what was before
        raise
    for name in files.list_files(target):
        files.sync(files.join(target, name))


class _Image:
    """A slide at its working level, (3, y, x) uint8, read in parts."""

    def __init__(self, slide: Slide, working: Working) -> None:
        self._slide, self._working = slide, working
        self.shape: tuple[int, ...] = (3, working.height, working.width)

    def __getitem__(self, selection: Any) -> UInt8:
        rows, columns = selection[-2:]
        size = (rows.stop - rows.start, columns.stop - columns.start)
        # What is unreadable is white here as it was for the model.
        pixels, _, _ = read_working(
            self._slide, self._working, rows.start, columns.start, *size
        )
        return pixels.transpose(2, 0, 1)


def _image_of(copy: Copy) -> _Image:
    """Open a copy's image, if it is what the mask was made of.

    Raises:
        SlideError: It is another now, or is not there.
    """
    slide, _, _ = copy.digest.partition("+")  # after it that of an annotation
    own = copy.image.endswith(".ome.zarr")  # a dataset's, made of the slide
    if not own and slide_digest(copy.image) != slide:
        raise SlideError(
            f"{copy.image}: is not the file that the mask was made of; put that back, "
            f"or run `medray infer` again"
        )
    return _Image(
        open_slide(copy.image, scene=copy.scene, plane=copy.plane), copy.working
    )


def _write_05(copy: Copy, target: str) -> None:
    image, working = _image_of(copy), copy.working
    size = (working.height, working.width)
    about: Any = {"mpp": working.mpp, "attributes": _provenance(copy)}
    files.remove(target)
    ome_zarr.create_image(target, *size, name=copy.slide, **about)
    _fill_05(target, image)
    ome_zarr.list_labels(target, [layer.name for layer in copy.layers])
    for layer in copy.layers:
        uri = files.join(target, "labels", layer.name)
        ome_zarr.create_labels(
            uri,
            *size,
            name=layer.name,
            classes=layer.classes,
            source="../../",
            **about,
        )
        _fill_05(uri, ome_zarr.open_level(layer.uri))


def _fill_05(uri: str, pixels: ngff_v04.Readable) -> None:
    for region in plan_regions(pixels.shape[-2], pixels.shape[-1], ome_zarr.REGION):
        ome_zarr.write_region(uri, region, pixels[..., *region.slices()])
    ome_zarr.build_pyramid(uri)


def _write_04(copy: Copy, target: str) -> None:
    mpp, about = copy.working.mpp, _provenance(copy)
    levels = len(ome_zarr.level_shapes(copy.working.height, copy.working.width))
    if not copy.image:
        (layer,) = copy.layers
        ome = ngff.labels_metadata(
            levels, mpp=mpp, name=copy.slide, classes=layer.classes
        )
        ngff_v04.write(target, ome_zarr.open_level(layer.uri), ome, about)
        return
    ome = ngff.image_metadata(levels, mpp=mpp, name=copy.slide)
    ngff_v04.write(target, _image_of(copy), ome, about)
    if copy.layers:
        ngff_v04.list_labels(target, [layer.name for layer in copy.layers])
    for layer in copy.layers:
        ome = ngff.labels_metadata(
            levels, mpp=mpp, name=layer.name, classes=layer.classes, source="../../"
        )
        uri = files.join(target, "labels", layer.name)
        ngff_v04.write(uri, ome_zarr.open_level(layer.uri), ome, about)


def _provenance(copy: Copy) -> dict[str, Any]:
    """Give what the copied mask says of itself."""
    found = [ome_zarr.read_attributes(layer.uri) for layer in copy.layers]
    return {"kind": "copy", "of": found[0] if found else copy.slide}


def _write_tiff(copy: Copy, target: str, *, ome: bool) -> None:
    """Write a mask as a pyramid of tiled, deflated label values.

    Levels are SubIFDs of the first (OME-TIFF, "sub-resolutions"), or pages marked as
    reduced (TIFF 6.0, NewSubfileType): Bio-Formats looks for the former, ASAP and
    OpenSlide for the latter.
    """
    if not copy.layers:
        raise SlideError(f"{copy.slide}: has no annotation that could be written")
    layer, mpp = copy.layers[0], copy.working.mpp
    shapes = ome_zarr.level_shapes(copy.working.height, copy.working.width)
    names = {str(value): name for value, name in enumerate(layer.classes.names)}
    folder, name = os.path.split(target)
    partial = files.join(folder, f"{files.PARTIAL}{name}")
    about: dict[str, Any] = {"metadata": None}
    if ome:
        about["metadata"] = {"axes": "YX", "Name": copy.slide, "MapAnnotation": names}
        if mpp:
            about["metadata"] |= {
                f"PhysicalSize{axis}{what}": value
                for axis in "XY"
                for what, value in (("", mpp), ("Unit", "µm"))
            }
        about["subifds"] = len(shapes) - 1
    else:
        about["description"] = ", ".join(f"{v} {name}" for v, name in names.items())
    try:
        with tifffile.TiffWriter(partial, ome=ome) as tiff:
            for level, shape in enumerate(shapes):
                per_cm = None if mpp is None else 1e4 / (mpp * 2**level)
                tiff.write(
                    _tiles(ome_zarr.open_level(layer.uri, level)),
                    shape=shape,
                    dtype="uint8",
                    tile=(ome_zarr.PATCH, ome_zarr.PATCH),
                    compression="adobe_deflate",
                    photometric="minisblack",
                    resolution=None if per_cm is None else (per_cm, per_cm),
                    resolutionunit=None if per_cm is None else "centimeter",
                    subfiletype=int(level > 0),
                    maxworkers=1,
                    **(about if level == 0 else {"metadata": None}),
                )
        files.sync(partial)
        os.replace(partial, target)
    finally:
        files.remove(partial)


def _tiles(labels: ome_zarr.Pixels) -> Iterator[UInt8]:
    """Give the tiles of a level, row by row, each whole."""
    side = ome_zarr.PATCH
    for part in plan_regions(labels.shape[0], labels.shape[1], side):
        tile = labels[part.slices()]
        missing = [(0, side - length) for length in tile.shape]
        yield np.pad(tile, missing)
