"""Slides and annotations as medray understands them, before anything is computed.

    look      each slide and its annotation are opened in a process that may die of it
    tell      a row a slide, and what was refused, in words
    show      one HTML page: each slide small, with its annotation as it will be drawn

Slides are found, matched and read by the functions that ingest uses, so what is refused
here is what ingest refuses, but for damage inside a file: only coarse pixels are read.
Slides of a bucket that OpenSlide reads are copied whole for that, as in any run.
"""

from __future__ import annotations

import datetime
import functools
import io
import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import shapely
from PIL import Image, ImageDraw
from scipy import ndimage

from medray.annotations import Annotation, rasterise, read_marks
from medray.annotations.matching import (
    list_annotations,
    match_names,
    unused_annotations,
)
from medray.annotations.measure import class_areas
from medray.annotations.polygons import Area
from medray.classes import AnyClass, Classes, rgb_of
from medray.datasets.overrides import with_overrides
from medray.errors import MedrayError
from medray.execution.failures import too_large
from medray.execution.isolation import LostError, call_each
from medray.execution.progress import Progress
from medray.slides import Slide, open_slide, read_thumbnail
from medray.slides.cache import fetch_if_copied, log_copies
from medray.slides.discovery import SlideFile, find_slides
from medray.slides.readable import check_readable
from medray.slides.resolution import settle_mpp
from medray.storage import files
from medray.storage.ledger import storable
from medray.types import Row

PICTURE_PX = 480
"""Longest side of a picture at most, pixels; twice what the page shows of it."""
_BORDER = "#1d2429"  # of what is annotated; the pages' ink
_MAX_PICTURES = 500  # of a page, some 50 kB each; slides.csv has all slides
_LIMIT_S = 300.0  # for a slide; a flat one is read whole
# Each may take the memory that decoding one file needs, see medray.execution.failures.
_MAX_PROCESSES = 8


@dataclass(frozen=True)
class Checked:
    """What slides and annotations are to medray.

    Attributes:
        slides: A row a slide, in order of their addresses, with `slide`, `status` (`ok`
            or `refused`), `message` (why), `uri`, `format`, `height` and `width`
            (pixels of level 0), `levels` (how many), `mpp` (microns per pixel of level
            0) and `mpp_from`, `magnification`, `annotation` (its address), `annotated`,
            `partly`, `areas`, of each class but the background `areas_NAME`,
            `share_NAME` (of the slide's pixels) and `mm2_NAME`, and `note`. None where
            a refused slide does not tell, or there is no annotation.
        unused: Annotations that belong to no slide, or are second ones of a slide.
        bare: Slides without annotation, if annotations were given.
        failed: Why slides or their annotations are refused, by slide.
        page: The HTML page; empty without `out`.
        out: Where it is, with `slides.csv`.
    """

    slides: list[Row]
    unused: list[str]
    bare: list[str]
    failed: dict[str, str]
    page: str
    out: str


def check(
    slides: Sequence[str],
    *,
    annotations: str | None = None,
    classes: tuple[str, ...] = ("background", "tumour"),
    mpp: float | str | None = None,
    scene: int | None = None,
    plane: int | None = None,
    out: str | None = None,
) -> Checked:
    """Open slides and annotations, and tell what medray takes them for.

    Args:
        slides: Files, globs, folders, s3:// or gs:// addresses.
        annotations: Folder of annotations named like their slides, as for `ingest`.
        classes: Names by label value, the background first.
        mpp: Microns per pixel of level 0, over what the files say; or a CSV (slide,mpp)
            with those of some.
        scene: Which of several slides in a file, from 0 in the file's order.
        plane: Which of several focal planes, from 0.
        out: Folder or address for `check.html` and `slides.csv`; None: nothing is
            written.

    Raises:
        ConfigError: The request is wrong: there are no slides, an annotation could be
            that of several, or OUT holds a report of another kind.
    """
    # Not in the processes that open slides: matplotlib takes its time to be imported.
    from medray.evaluation.html import check_folder

    known = Classes(tuple(classes))
    wanted = with_overrides(find_slides(slides), mpp=mpp, scene=scene, plane=plane)
    names = list_annotations(annotations) if annotations is not None else {}
    matched = match_names(wanted, names)
    if out is not None:
        out = files.absolute(out)
        check_folder(out, "slides.csv")
    tasks = [
        _Task(file, matched.get(file.slide, ""), known, out is not None)
        for file in wanted
    ]
    log_copies(file.uri for file in wanted)
    looks = _look_at_all(tasks)
    rows = [
        {key: storable(value) for key, value in look.row.items()}
        for look in (looks[file.slide] for file in wanted)
    ]
    checked = Checked(
        slides=rows,
        unused=[*map(storable, unused_annotations(wanted, names, matched))],
        bare=[f.slide for f in wanted if f.slide not in matched] if names else [],
        failed={row["slide"]: row["message"] for row in rows if row["message"]},
        page=files.join(out, "check.html") if out is not None else "",
        out=out or "",
    )
    if out is not None:
        _write_table(rows, known, files.join(out, "slides.csv"))
        page = _page(
            checked, known, {name: look.picture for name, look in looks.items()}
        )
        files.write_bytes(checked.page, page.encode())
    return checked


# --- look -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """A slide to look at; `annotation` is "" if it has none."""

    file: SlideFile
    annotation: str
    classes: Classes
    picture: bool


@dataclass(frozen=True)
class _Look:
    """A slide's row, and its picture as JPEG (b"" where there is none)."""

    row: Row
    picture: bytes


def _look_at_all(tasks: Sequence[_Task]) -> dict[str, _Look]:
    """Look at each slide in some process; give what was seen by slide."""
    processes = min(len(tasks), os.cpu_count() or 1, _MAX_PROCESSES)
    found: dict[str, _Look] = {}
    with Progress("check", len(tasks)) as progress:
        for task, look in call_each(
            _look, tasks, processes=processes, limit_s=_LIMIT_S
        ):
            if isinstance(look, LostError):
                message = (
                    f"{task.file.uri}: the process that opened it and its annotation "
                    f"{look}; a file is damaged, or the slide is large and without "
                    f"levels: save it as a pyramid"
                )
                look = _Look(_start_row(task) | _refused(message), b"")
            found[task.file.slide] = look
            said = look.row["message"]
            progress.slide(task.file.slide, f"failed: {said}" if said else "ok")
    return found


def _look(task: _Task) -> Generator[None, None, _Look]:
    """Open a slide and its annotation; what cannot be used is told in the row.

    Yields:
        While the slide is copied, which may take any time.
    """
    file = task.file
    yield from fetch_if_copied(file.uri, file.scene, file.plane)
    row, picture = _start_row(task), b""
    try:
        scene, plane = task.file.scene, task.file.plane
        with open_slide(task.file.uri, scene=scene, plane=plane) as slide:
            row |= _slide_facts(slide, task)
            marks, refusal = Annotation([], [], ()), ""
            try:
                check_readable(slide)
                marks = _read_marks(slide, task)
                row |= _marks_facts(row, marks, task)
            except MedrayError as error:
                refusal = f"{error}"
            # A picture helps to see why an annotation does not fit, too.
            if task.picture:
                picture = draw_marks(slide, marks, task.classes)
            if refusal:
                row |= _refused(refusal)
    except MemoryError as error:
        row |= _refused(too_large({"uri": task.file.uri}, error))
    except (MedrayError, OSError) as error:
        row |= _refused(f"{error}")
    return _Look(row, picture)


def _start_row(task: _Task) -> Row:
    """Return the row of a slide of which nothing is known yet."""
    names = ("format", "height", "width", "levels", "mpp", "mpp_from", "magnification")
    row: Row = {"slide": task.file.slide, "status": "ok", "message": ""}
    row |= {"uri": task.file.uri} | dict.fromkeys(names)
    row |= {"annotation": task.annotation, "annotated": bool(task.annotation)}
    row |= {"partly": None, "areas": None}
    for name in task.classes.names[1:]:
        row |= dict.fromkeys(_columns(name))
    return row | {"note": ""}


def _columns(name: str) -> tuple[str, str, str]:
    return f"areas_{name}", f"share_{name}", f"mm2_{name}"


def _refused(message: str) -> Row:
    return {"status": "refused", "message": message}


def _slide_facts(slide: Slide, task: _Task) -> Row:
    level = slide.levels[0]
    mpp, said = settle_mpp(slide, task.file.mpp)
    if mpp is None:
        said = "no mpp in the file (give --mpp); unknown to all that follows"
    return {
        "format": slide.format,
        "height": level.height,
        "width": level.width,
        "levels": len(slide.levels),
        "mpp": mpp.x if mpp else None,
        "mpp_from": mpp.source if mpp else "",
        "magnification": slide.magnification,
        "note": "; ".join(filter(None, [slide.note, said])),
    }


def _read_marks(slide: Slide, task: _Task) -> Annotation:
    if not task.annotation:
        return Annotation([], [], ())
    level = slide.levels[0]
    size = {"height": level.height, "width": level.width}
    return read_marks(
        task.annotation, **size, classes=task.classes, slide=task.file.uri
    )


def _marks_facts(row: Row, marks: Annotation, task: _Task) -> Row:
    """Count the areas of each class, and measure them."""
    if not task.annotation:
        return {"partly": False, "areas": 0}
    facts: Row = {"partly": bool(marks.extent), "areas": len(marks.areas)}
    found = class_areas(marks.areas, task.classes)
    pixels = row["height"] * row["width"]
    for name, (count, px) in zip(task.classes.names[1:], found[1:], strict=True):
        mm2 = None if row["mpp"] is None else px * row["mpp"] ** 2 / 1e6
        facts |= dict(zip(_columns(name), (count, px / pixels, mm2), strict=True))
    said = list(marks.notes)
    if marks.extent:
        share = shapely.union_all([area.polygon for area in marks.extent]).area / pixels
        said.append(f"annotation: of only {share:.1%} of the slide")
    return facts | {"note": "; ".join(filter(None, [row["note"], *said]))}


# --- show -----------------------------------------------------------------------------


def draw_marks(slide: Slide, marks: Annotation, classes: Classes) -> bytes:
    """Draw a slide small, with the outlines of what `rasterise` makes of its areas.

    Areas too small to be seen are dots. A dashed line is the border of what is
    annotated if the slide is so only in part; hatched is what cannot be read.

    Args:
        slide: Its coarse pixels are read.
        marks: Of level 0.
        classes: Give the colours.

    Returns:
        A JPEG, at most `PICTURE_PX` a side.
    """
    thumbnail, factor, damaged = read_thumbnail(slide, PICTURE_PX)
    shown = thumbnail.copy()
    across = np.add.outer(*map(np.arange, damaged.shape))
    shown[damaged & (across % 8 < 4)] = (150, 150, 150)
    draw = functools.partial(
        rasterise,
        y=0,
        x=0,
        height=shown.shape[0],
        width=shown.shape[1],
        downsample=factor,
    )
    if marks.extent:
        border = _border(draw(marks.extent, AnyClass()) > 0)
        shown[border & (across % 8 < 5)] = rgb_of(_BORDER)
    labels = draw(marks.areas, classes)
    for value in np.unique(labels[labels > 0]).tolist():
        shown[_border(labels == value)] = rgb_of(classes.colors[value])
    picture = Image.fromarray(shown)
    _draw_dots(picture, marks.areas, classes, factor)
    buffer = io.BytesIO()
    # Without chroma subsampling: it washes out thin coloured lines.
    picture.save(buffer, "JPEG", quality=85, subsampling=0)
    return buffer.getvalue()


def _border(inside: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return the outermost three pixels of a shape, at the picture's edge too."""
    return inside & ~ndimage.binary_erosion(inside, iterations=3)


def _draw_dots(
    picture: Image.Image, areas: Sequence[Area], classes: Classes, factor: float
) -> None:
    """Draw a dot for each area of the foreground that is smaller than one."""
    pen = ImageDraw.Draw(picture)
    for area in areas:
        x0, y0, x1, y1 = (value / factor for value in area.polygon.bounds)
        value = classes.value(area.class_name)
        if value and max(x1 - x0, y1 - y0) < 4:
            x, y = (x0 + x1) / 2, (y0 + y1) / 2
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=classes.colors[value])


def _page(checked: Checked, classes: Classes, pictures: dict[str, bytes]) -> str:
    """Fill the page: what is refused first, then what has a note, then the rest."""
    from medray.evaluation.html import data_uri, render

    order = sorted(
        checked.slides, key=lambda row: (row["status"] == "ok", not row["note"])
    )
    seen = [row for row in order if pictures[row["slide"]]]
    return render(
        "check.html.jinja",
        title="What medray understood",
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        checked=checked,
        classes=classes,
        noted=sum(bool(row["note"]) for row in checked.slides),
        shown=[(row, data_uri(pictures[row["slide"]])) for row in seen[:_MAX_PICTURES]],
        left_out=max(0, len(seen) - _MAX_PICTURES),
    )


def _write_table(rows: Sequence[Row], classes: Classes, uri: str) -> None:
    schema = pa.schema(
        [
            (name, pa.string())
            for name in ("slide", "status", "message", "uri", "format")
        ]
        + [(name, pa.int64()) for name in ("height", "width", "levels")]
        + [("mpp", pa.float64()), ("mpp_from", pa.string())]
        + [("magnification", pa.float64()), ("annotation", pa.string())]
        + [("annotated", pa.bool_()), ("partly", pa.bool_()), ("areas", pa.int64())]
        + [
            (column, pa.int64() if column.startswith("areas_") else pa.float64())
            for name in classes.names[1:]
            for column in _columns(name)
        ]
        + [("note", pa.string())]
    )
    files.write_csv(uri, pa.Table.from_pylist([*rows], schema))
