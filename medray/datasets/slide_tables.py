"""Users' tables of slides or images: groups, splits, cohorts, labels, mpp.

Each is read by `medray.datasets.tables` and joined to slides by
`medray.datasets.join_tables`; no other module reads such a table. Every error names
the file and the line.
"""

from __future__ import annotations

import logging
import re
import unicodedata

from medray.datasets.splits import SPLIT_NAMES, SPLITS
from medray.datasets.tables import SlideTable, TableRow, read_table
from medray.errors import ConfigError
from medray.slides import SANE_MPP

log = logging.getLogger(__name__)

PATIENT = "patient"
"""Column of cohorts and labels that says whose a slide is."""
_NOBODY = {"", "-", "?", "na", "n/a", "#n/a", "<na>", "nan", "null", "none", "unknown"}


def read_groups(uri: str) -> SlideTable:
    """Read a CSV (slide,group) of patients; "" where the patient is not known."""
    table = read_table(uri, ["group"]).converted("group", _patient)
    return _with_rows(_spelled_alike(table, "group"))


def read_splits(uri: str) -> SlideTable:
    """Read a CSV (slide,split); "" where the split is blank.

    One without rows is taken: it puts no slide into any split.
    """
    table = read_table(uri, ["split"]).converted("split", _split)
    if not table.rows:
        log.warning("%s: has no rows; no slide will be in a split", uri)
    return table


def read_cohorts(uri: str) -> SlideTable:
    """Read a CSV (slide, and at least one other column); "" where a cell is blank."""
    table = read_table(uri, [], optional=[PATIENT], others=True)
    if not table.columns:
        raise ConfigError(
            f"{uri}: expected the column slide and at least one other, such as scanner"
        )
    return _with_rows(
        _spelled_alike(table.converted(PATIENT, _patient), *table.columns)
    )


def read_labels(uri: str) -> SlideTable:
    """Read a CSV (slide,label[,patient]); a patient is "" where not given."""
    table = read_table(uri, ["label"], optional=[PATIENT])
    table = table.converted("label", _label).converted(PATIENT, _patient)
    return _with_rows(_spelled_alike(table, *table.columns))


def read_mpp(uri: str) -> SlideTable:
    """Read a CSV (slide,mpp) of microns per pixel; without rows it says nothing."""
    return read_table(uri, ["mpp"]).converted("mpp", _mpp)


def _patient(text: str) -> str:
    return "" if text.casefold() in _NOBODY else text


def _split(text: str) -> str:
    if text and text.casefold() not in SPLIT_NAMES:
        raise ValueError(f"expected a split ({', '.join(SPLITS)}), found {text!r}")
    return SPLIT_NAMES[text.casefold()] if text else ""


def _label(text: str) -> str:
    if not text:
        raise ValueError("has no label; complete or remove it")
    return text


def _mpp(text: str) -> str:
    try:
        mpp = float(re.sub(r"^(\d*),(\d+)$", r"\1.\2", text))
    except ValueError as error:
        raise ValueError(
            f"expected microns per pixel, such as 0.25, found {text!r}"
        ) from error
    low, high = SANE_MPP
    if not low <= mpp <= high:
        raise ValueError(f"expected {low:g} to {high:g} um per pixel, found {mpp:g}")
    return repr(mpp)


def _with_rows(table: SlideTable) -> SlideTable:
    if not table.rows:
        raise ConfigError(f"{table.uri}: holds no slide; expected one row per slide")
    return table


def _spelled_alike(table: SlideTable, *columns: str) -> SlideTable:
    """Raise an error for values that look equal to a reader but differ in spelling."""
    for column in columns:
        first: dict[str, TableRow] = {}
        for row in table.rows if column in table.columns else ():
            value = row.values[column]
            other = first.setdefault(_look(value), row)
            if (before := other.values[column]) != value:
                raise ConfigError(
                    f"{table.uri}: lines {other.line} and {row.line}: {column} "
                    f"{before!r} and {value!r} differ only by case, spaces or "
                    f"characters that look alike; write them alike"
                )
    return table


def _look(text: str) -> str:
    """Return what a text has in common with those that are spelled otherwise."""
    plain = unicodedata.normalize("NFKC", text)
    seen = (c for c in plain if unicodedata.category(c) != "Cf")
    return " ".join("".join(seen).casefold().split())
