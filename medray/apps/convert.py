"""A run or a dataset -> copies in the formats that other viewers open.

    read      the mask and its layers, the image from its slide or dataset; part by part
    write     OME-Zarr 0.5 or 0.4 with the image in it, OME-TIFF, or a plain pyramid
    commit    one row per slide in OUT/slides.parquet, when its file is complete

OUT/
convert.yaml              what was asked for (ConvertSettings)
slides.parquet            one row per slide: status, and what it was made of
SLIDE.ome.zarr            or SLIDE.ome.tif, or SLIDE.tif
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from medray.apps.convert_write import FORMATS, MASK, Copy, Layer, target_uri, write_copy
from medray.datasets import LABELS, labels_uri, read_dataset, slide_uri
from medray.errors import ConfigError, FormatError
from medray.execution import Progress, Summary, map_rows, settle_executor
from medray.inference import LAYERS, layer_uri, mask_uri, read_run
from medray.slides import Working, working_of
from medray.storage import Ledger, files, keep_settings, locked, ome_zarr, to_dict
from medray.types import Executor, Row

log = logging.getLogger(__name__)
_TIMEOUT_S = 24 * 3600.0  # for a copy, however large

Format = Literal["ome-zarr", "ome-zarr-0.4", "ome-tiff", "tiff"]


@dataclass(frozen=True, kw_only=True)
class ConvertSettings:
    """What decides the copies of a folder; stored as `convert.yaml`.

    Attributes:
        source: The run or the dataset.
        to: The format.
        with_image: Put the slide's image next to its mask.
    """

    source: str
    to: str
    with_image: bool

    def decisive(self) -> dict[str, Any]:
        """Return what decides the copies, as plain values."""
        return to_dict(self)


def convert(
    source: str,
    *,
    to: Format,
    out: str,
    with_image: bool = False,
    executor: Executor = "auto",
) -> Summary:
    """Write copies of a run's masks, or of a dataset, for viewers and other tools.

    Copies have the pixels, the levels and the resolution of the masks. Running the same
    command again makes what is missing and what has changed.

    Args:
        source: Folder of a run or of a dataset.
        to: Format. `ome-zarr`: version 0.5 (zarr v3); `ome-zarr-0.4` (zarr v2);
            `ome-tiff`: levels as SubIFDs, for QuPath, Fiji and others by Bio-Formats;
            `tiff`: a tiled pyramid of pages, for ASAP and OpenSlide. A TIFF holds label
            values.
        out: Folder to make; TIFF needs one on a disk.
        with_image: Write the slide's image too. As the model read it, with the mask in
            its `labels`. A dataset has it in any case.
        executor: On the Ray of RAY_ADDRESS, in processes here, or in this one (local).
            `auto`: Ray, but processes where no cluster is named and the files are few.

    Raises:
        ConfigError: The request is wrong, or OUT holds other copies.
        StoreError: OUT cannot be written.

    Examples:
        >>> from medray.apps.convert import convert
        >>> converted = convert("run", to="ome-tiff", out="tiffs", executor="local")
        >>> converted.done
        4
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
        places = [copy.image or copy.layers[0].uri for copy in copies]
        executor = settle_executor(executor, places)
        return _convert(copies, failed, to, out, executor, check)


# --- find -----------------------------------------------------------------------------


def _of_run(run: str, with_image: bool) -> tuple[list[Copy], dict[str, str]]:
    """Return the copies to make of a run, and why the others cannot be made."""
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
    """Return the rows of slides that are done, and why the others are not."""
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
        if same and files.exists(target_uri(copy.slide, to, out)):
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
    write = functools.partial(write_copy, to=to, out=out)
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
