"""What `medray check` found of slides, annotations and tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medray.apps.check_page import slide_lines
from medray.classes import Classes
from medray.datasets import (
    SPLITS,
    Joined,
    Names,
    SlideTable,
    groups_apart,
    match_table,
    names_of_slides,
    nearest,
    read_cohorts,
    read_groups,
    read_labels,
    read_splits,
)
from medray.slides import SlideFile
from medray.types import Row

_COMPARED = 20  # rows that name no slide, with all slides


@dataclass(frozen=True)
class CheckedTable:
    """How a table and the slides match.

    Attributes:
        table: Its address.
        matched: How many rows and slides did, in words.
        unknown: Rows that name no slide, with their lines and the nearest names.
        without: Slides that have no row.
        apart: Groups of another table that it puts into several splits, in words.
    """

    table: str
    matched: str
    unknown: list[str]
    without: list[str]
    apart: list[str]


@dataclass(frozen=True)
class Checked:
    """How medray understands slides and annotations.

    Attributes:
        slides: One row per slide, in order of their addresses, with `slide`, `status`
            (`ok` or `refused`), `message` (why), `uri`, `format`, `height` and `width`
            (pixels of level 0), `levels` (how many), `mpp` (microns per pixel of level
            0) and `mpp_from`, `magnification`, `annotation` (its address), `annotated`,
            `partly`, `areas`, of each class but the background `areas_NAME`,
            `share_NAME` (of the slide's pixels) and `mm2_NAME`, with `qc` `qc_NAME` and
            `quality` (worse than a limit), and `note`. None where it is not known. Of
            tables that are given `group`, `split`, `label`, `patient`, and
            `cohort_NAME` of each column; "" where they do not say.
        unused: Annotations that belong to no slide, or are second ones of a slide.
        bare: Slides without annotation, if annotations were given.
        failed: Why slides or their annotations are refused, by slide.
        tables: How each table that was given and the slides match.
        balance: With a table of groups or splits, one row per split (`split`) with its
            `slides`, how many are `annotated`, their `patients`, and of each class but
            the background `slides_NAME` and `mm2_NAME`; of labels `labels`, in words.
        page: The HTML page; empty without `out`.
        out: Where it is, with `slides.csv`.
    """

    slides: list[Row]
    unused: list[str]
    bare: list[str]
    failed: dict[str, str]
    tables: list[CheckedTable]
    balance: list[Row]
    page: str
    out: str

    @property
    def code(self) -> int:
        """The exit code: 3 if anything is refused, by ingest or another command."""
        wrong = any(table.unknown or table.apart for table in self.tables)
        return 3 if self.failed or wrong else 0

    def __str__(self) -> str:
        rows = sum(len(table.unknown) for table in self.tables)
        last = (
            f"{len(self.slides)} slides, {len(self.failed)} refused, "
            f"{len(self.bare)} without annotation; {len(self.unused)} annotations not "
            f"used" + (f"; {rows} rows of tables name no slide" if self.tables else "")
        )
        return "\n".join([*self.lines(), last])

    def lines(self) -> list[str]:
        """Return all lines for a terminal but the one that sums up."""
        lines = slide_lines(self.slides)
        lines += [f"not used  {uri}" for uri in self.unused]
        lines += [f"without   {slide}" for slide in self.bare]
        for table in self.tables:
            lines.append(f"table     {table.matched}")
            lines += [f"          names no slide: {row}" for row in table.unknown]
            lines += [f"          has no row of {slide}" for slide in table.without]
            lines += [f"          {group}" for group in table.apart]
        for row in self.balance:
            values = (f"{key} {value}" for key, value in row.items() if key != "split")
            lines.append(f"{row['split'] or 'no split':<9} {', '.join(values)}")
        if self.page:
            lines += [f"page      {self.page}", f"out       {self.out}"]
        return lines


@dataclass(frozen=True)
class SlideTables:
    """Addresses of tables about slides; None: there is none.

    Attributes:
        groups: CSV (slide,group).
        splits: CSV (slide,split).
        cohorts: CSV (slide,scanner,site,...).
        labels: CSV (slide,label[,patient]).
    """

    groups: str | None = None
    splits: str | None = None
    cohorts: str | None = None
    labels: str | None = None


def match_tables(
    slides: Sequence[SlideFile], given: SlideTables
) -> tuple[list[CheckedTable], dict[str, Row]]:
    """Return how tables match the slides, and the columns they add to each slide.

    Raises:
        ConfigError: A table cannot be read, or says two things of a slide.
    """
    names = names_of_slides(slides)
    columns: dict[str, Row] = {file.slide: {} for file in slides}
    tables = []

    def add(
        table: SlideTable, prefix: str = "", grouped: Joined | None = None
    ) -> Joined:
        joined = match_table(table, names)
        for name, values in joined.values_of(columns).items():
            for slide, value in values.items():
                columns[slide][prefix + name] = value
        tables.append(
            CheckedTable(
                table=table.uri,
                matched=f"{joined}",
                unknown=_unknown_rows(joined, names),
                without=[*joined.without],
                apart=groups_apart(grouped, joined) if grouped else [],
            )
        )
        return joined

    grouped = add(read_groups(given.groups)) if given.groups else None
    if given.splits:
        add(read_splits(given.splits), grouped=grouped)
    if given.labels:
        add(read_labels(given.labels))
    if given.cohorts:
        add(read_cohorts(given.cohorts), "cohort_")
    return tables, columns


def _unknown_rows(joined: Joined, names: Mapping[str, Names]) -> list[str]:
    """Return the rows that name no slide; of the first also what is nearest."""
    return [
        f"line {row.line}: {row.name}"
        + (f" ({nearest(row.name, names)})" if number < _COMPARED else "")
        for number, row in enumerate(joined.unknown)
    ]


def balance_of(rows: Sequence[Row], classes: Classes) -> list[Row]:
    """Return what each split holds; nothing without a table of groups or splits."""
    if not rows or not {"group", "split"} & rows[0].keys():
        return []
    by_split: dict[str, list[Row]] = {}
    for row in rows:
        by_split.setdefault(row.get("split", ""), []).append(row)
    order = [split for split in (*SPLITS, "") if split in by_split]
    return [_summed(split, by_split[split], classes) for split in order]


def _summed(split: str, rows: Sequence[Row], classes: Classes) -> Row:
    patients = {row.get("group") or ("", row["slide"]) for row in rows}
    found: Row = {"split": split, "slides": len(rows)}
    found["annotated"] = sum(bool(row["annotated"]) for row in rows)
    found["patients"] = len(patients)
    for name in classes.names[1:]:
        found[f"slides_{name}"] = sum(bool(row[f"areas_{name}"]) for row in rows)
        found[f"mm2_{name}"] = round(sum(row[f"mm2_{name}"] or 0 for row in rows), 6)
    if "label" in rows[0]:
        found["labels"] = _counted(rows)
    return found


def _counted(rows: Sequence[Mapping[str, str]]) -> str:
    counts = Counter(row["label"] or "no label" for row in rows)
    return ", ".join(f"{label} {count}" for label, count in sorted(counts.items()))
