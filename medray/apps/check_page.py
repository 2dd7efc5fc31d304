"""The page, table and lines of `medray check`, and small pictures of slides."""

from __future__ import annotations

import datetime
import functools
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image, ImageDraw
from scipy import ndimage

from medray.annotations import Annotation, Area, rasterise
from medray.apps.check_quality import QUALITY
from medray.classes import AnyClass, Classes, rgb_of
from medray.slides import Slide, read_thumbnail
from medray.storage import files
from medray.types import Row

if TYPE_CHECKING:
    from medray.apps.checked import Checked

PICTURE_PX = 480
"""Longest side of a picture at most, pixels; twice what the page shows of it."""
_BORDER = "#1d2429"  # of what is annotated; the pages' ink
_MAX_PICTURES = 500  # of a page, some 50 kB each; slides.csv has all slides


def draw_marks(slide: Slide, marks: Annotation, classes: Classes) -> bytes:
    """Draw a thumbnail of a slide, with its areas outlined as `rasterise` draws them.

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


def render_page(checked: Checked, classes: Classes, pictures: dict[str, bytes]) -> str:
    """Fill the page: what is refused first, then what has a note, then the rest."""
    from medray.evaluation import data_uri, render

    order = sorted(
        checked.slides, key=lambda row: (row["status"] == "ok", not row["note"])
    )
    seen = [row for row in order if pictures[row["slide"]]]
    return render(
        "check.html.jinja",
        title="What medray understood",
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        checked=checked,
        quality=QUALITY if any("quality" in row for row in order) else (),
        classes=classes,
        columns=table_columns(checked.slides),
        balance=_draw_balance(checked.balance, classes),
        faults=sum(len(table.unknown) + len(table.apart) for table in checked.tables),
        noted=sum(bool(row["note"]) for row in checked.slides),
        shown=[(row, data_uri(pictures[row["slide"]])) for row in seen[:_MAX_PICTURES]],
        left_out=max(0, len(seen) - _MAX_PICTURES),
    )


def _draw_balance(balance: Sequence[Row], classes: Classes) -> str:
    """Draw slides, patients and the area of each class by split, as SVG."""
    from matplotlib.figure import Figure

    from medray.evaluation import ACCENT, SOFT, as_svg, finish_axes, name_above

    if not balance:
        return ""
    figure = Figure(figsize=(7.2, 0.9 + 0.6 * len(balance)), layout="constrained")
    left, right = figure.subplots(1, 2)
    places = np.arange(len(balance), dtype=float)[::-1]
    splits = [row["split"] or "no split" for row in balance]
    counts = (("slides", ACCENT), ("patients", SOFT))
    areas = zip(classes.names[1:], classes.colors[1:], strict=True)
    sides = (
        (left, "slides and patients", counts),
        (right, "mm² annotated", [(f"mm2_{name}", color) for name, color in areas]),
    )
    for axes, title, columns in sides:
        height = 0.8 / max(1, len(columns))
        for number, (column, color) in enumerate(columns):
            values = [row[column] for row in balance]
            label = column.removeprefix("mm2_")
            at = places + 0.4 - height * (number + 0.5)
            axes.barh(at, values, 0.9 * height, color=color, label=label)
        axes.set_yticks(places, splits)
        finish_axes(axes, title, "")
        if columns:
            name_above(axes)
    return as_svg(figure)


def write_slides_table(rows: Sequence[Row], classes: Classes, uri: str) -> None:
    """Write one row per slide as CSV."""
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
            for column in area_columns(name)
        ]
        + [(name, pa.float64()) for name in QUALITY if rows and name in rows[0]]
        + [("quality", pa.string())][: bool(rows) and "quality" in rows[0]]
        + [("note", pa.string())]
        + [(name, pa.string()) for name in table_columns(rows)]
    )
    files.write_csv(uri, pa.Table.from_pylist([*rows], schema))


def table_columns(rows: Sequence[Row]) -> list[str]:
    """Return the columns that come of tables: those after `note`."""
    return [*rows[0]][[*rows[0]].index("note") + 1 :] if rows else []


def area_columns(name: str) -> tuple[str, str, str]:
    """Return the columns of a class: areas, share, square millimetres."""
    return f"areas_{name}", f"share_{name}", f"mm2_{name}"


def slide_lines(slides: Sequence[Row]) -> list[str]:
    """Return a table of the slides for a terminal; a dash is what is not known."""
    head = ("", "slide", "height x width", "levels", "um", "format", "annotation")
    table = [(*head, "areas"), *map(_cells, slides)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    rows = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]
    lines = rows[:1]
    for line, row in zip(rows[1:], slides, strict=True):
        remark = "; ".join(
            filter(None, [row["message"] or row["note"], row.get("quality")])
        )
        lines += [line, *([f"         {remark}"] if remark else [])]
    return lines


def _cells(row: Row) -> tuple[str, ...]:
    """Return the cells of a slide's line."""
    size = f"{row['height']} x {row['width']}" if row["height"] else "-"
    mpp = "-" if row["mpp"] is None else f"{row['mpp']:.4g} ({row['mpp_from']})"
    areas = []
    for key, count in row.items():
        name = key.removeprefix("areas_")
        if name != key and count:
            mm2 = row[f"mm2_{name}"]
            size_mm2 = "" if mm2 is None else f" {mm2:.3g} mm2"
            areas.append(f"{name} {count}{size_mm2} {100 * row[f'share_{name}']:.3g} %")
    return (
        row["status"],
        row["slide"],
        size,
        str(row["levels"] or "-"),
        mpp,
        row["format"] or "-",
        row["annotation"].rpartition("/")[2] or "-",
        ", ".join(areas) or "-",
    )
