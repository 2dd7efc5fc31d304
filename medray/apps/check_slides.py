"""Slides and annotations as medray understands them, before anything is computed.

    look      each slide and its annotation are opened in a process that may die
    report    one row per slide, with the reason of each refusal
    show      one HTML page: each slide small, with its annotation as it will be drawn

Slides are found, matched and read as by ingest, so the same slides are refused, except
for damage inside a file: only coarse pixels are read.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import shapely

from medray.annotations import (
    Annotation,
    class_areas,
    list_annotations,
    match_names,
    read_marks,
    unused_annotations,
)
from medray.apps.check_page import (
    area_columns,
    draw_marks,
    render_page,
    write_slides_table,
)
from medray.apps.check_quality import quality_facts, start_quality
from medray.apps.checked import Checked, SlideTables, balance_of, match_tables
from medray.classes import Classes
from medray.datasets import with_overrides
from medray.errors import LostError, MedrayError
from medray.execution import Progress, call_each
from medray.slides import (
    QualityLimits,
    Slide,
    SlideFile,
    check_readable,
    fetch_if_copied,
    find_slides,
    log_copies,
    open_slide,
    read_limits,
    settle_mpp,
    too_large,
)
from medray.storage import files, storable
from medray.types import Row

_LIMIT_S = 300.0  # for a slide; a flat one is read whole
_MAX_PROCESSES = 8  # each may take the memory of one file: medray.slides.limits


def check(
    slides: Sequence[str],
    *,
    annotations: str | None = None,
    classes: tuple[str, ...] = ("background", "tumour"),
    mpp: float | str | None = None,
    scene: int | None = None,
    plane: int | None = None,
    groups: str | None = None,
    splits: str | None = None,
    cohorts: str | None = None,
    labels: str | None = None,
    qc: str | None = None,
    out: str | None = None,
) -> Checked:
    """Open slides and annotations, and report how medray understands them.

    Args:
        slides: Files, globs, folders, s3:// or gs:// addresses.
        annotations: Folder of annotations named like the slides, as for `ingest`.
        classes: Names by label value, the background first.
        mpp: Microns per pixel of level 0, instead of the files', or CSV (slide,mpp).
            The CSV has those of some slides.
        scene: Which of several slides in a file, from 0 in the file's order.
        plane: Which of several focal planes, from 0.
        groups: CSV (slide,group), as for `ingest`.
        splits: CSV (slide,split), as for `ingest`.
        cohorts: CSV (slide,scanner,site,...), as for `evaluate`.
        labels: CSV (slide,label[,patient]), as for `train`.
        qc: Limits of slide quality control: a YAML file, or `default`. None: no such.
        out: Folder or address for check.html and slides.csv. None: nothing is written.

    Raises:
        ConfigError: There are no slides, an annotation or a row of a table fits several
            slides, a table cannot be read, or OUT holds another kind of report.

    Examples:
        >>> medray.check(["slides"], annotations="annotations").failed
        {}
    """
    # Not in the processes that open slides: matplotlib takes its time to be imported.
    from medray.evaluation import check_folder

    known = Classes(tuple(classes))
    wanted = with_overrides(find_slides(slides), mpp=mpp, scene=scene, plane=plane)
    limits = read_limits(qc) if qc else None
    if out is not None:
        out = files.absolute(out)
        check_folder(out, "slides.csv")
    checked, pictures = check_found(
        wanted,
        known,
        annotations=annotations,
        tables=SlideTables(groups, splits, cohorts, labels),
        pictures=out is not None,
        limits=limits,
    )
    if out is None:
        return checked
    checked = replace(checked, page=files.join(out, "check.html"), out=out)
    write_slides_table(checked.slides, known, files.join(out, "slides.csv"))
    files.write_bytes(checked.page, render_page(checked, known, pictures).encode())
    return checked


def check_found(
    wanted: Sequence[SlideFile],
    classes: Classes,
    *,
    annotations: str | None,
    tables: SlideTables,
    pictures: bool = False,
    limits: QualityLimits | None = None,
) -> tuple[Checked, dict[str, bytes]]:
    """Return the rows of slides and annotations, and thumbnails where asked for.

    Without `limits` no quality is measured.

    Raises:
        ConfigError: An annotation or a row of a table could be that of several slides,
            or a table cannot be read.
    """
    names = list_annotations(annotations) if annotations is not None else {}
    matched = match_names(wanted, names)
    matching, columns = match_tables(wanted, tables)
    tasks = [
        _Task(file, matched.get(file.slide, ""), classes, pictures, limits)
        for file in wanted
    ]
    log_copies(file.uri for file in wanted)
    looks = _look_at_all(tasks)
    rows = [
        {k: storable(v) for k, v in (looks[name].row | columns[name]).items()}
        for name in (file.slide for file in wanted)
    ]
    checked = Checked(
        slides=rows,
        unused=[*map(storable, unused_annotations(wanted, names, matched))],
        bare=[f.slide for f in wanted if f.slide not in matched] if names else [],
        failed={row["slide"]: row["message"] for row in rows if row["message"]},
        tables=matching,
        balance=balance_of(rows, classes),
        page="",
        out="",
    )
    return checked, {name: look.picture for name, look in looks.items()}


# --- look -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """A slide to check; `annotation` is "" if it has none."""

    file: SlideFile
    annotation: str
    classes: Classes
    picture: bool
    limits: QualityLimits | None = None


@dataclass(frozen=True)
class _Look:
    """A slide's row, and its picture as JPEG (b"" where there is none)."""

    row: Row
    picture: bytes


def _look_at_all(tasks: Sequence[_Task]) -> dict[str, _Look]:
    """Return the result for each slide; each is opened in some process."""
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
    """Open a slide and its annotation; what cannot be used is reported in the row.

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
                row |= quality_facts(slide, task.file.mpp, task.limits)
            except MedrayError as error:
                refusal = f"{error}"
            # A picture helps to see why an annotation does not fit, too.
            if task.picture:
                picture = draw_marks(slide, marks, task.classes)
            if refusal:
                row |= _refused(refusal)
    except MemoryError as error:
        row |= _refused(too_large(task.file.uri, error))
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
        row |= dict.fromkeys(area_columns(name))
    return row | start_quality(task.limits) | {"note": ""}


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
        facts |= dict(zip(area_columns(name), (count, px / pixels, mm2), strict=True))
    said = list(marks.notes)
    if marks.extent:
        share = shapely.union_all([area.polygon for area in marks.extent]).area / pixels
        said.append(f"annotation: of only {share:.1%} of the slide")
    return facts | {"note": "; ".join(filter(None, [row["note"], *said]))}
