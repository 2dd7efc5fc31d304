"""Users' tables joined to the slides or images of a request.

    match_table  each row to the slide that it names: by path, id or file name
    join_table   the same; rows that name nothing are refused, before any work is done

What a table says of a slide is joined to it, or refused or warned of with its line.
"""

from __future__ import annotations

import difflib
import itertools
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from medray.datasets.names import NameIndex, Names
from medray.datasets.slide_tables import read_groups, read_splits
from medray.datasets.tables import SlideTable, TableRow
from medray.errors import ConfigError
from medray.slides import strip_suffix

log = logging.getLogger(__name__)

_SHOWN = 5  # names in a message
_COMPARED = 20_000  # names, to find those nearest to an unknown one

type Unknown = Literal["refuse", "ignore", "warn"]
"""Rows that name no slide: refused; left out if not all are such; or left out."""


# --- join -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Joined:
    """A table and the slides of a request.

    Attributes:
        table: As it was read.
        row_of: Row of each slide that has one, by its id.
        unknown: Rows that name no slide.
        without: Slides of the request that no row names.
        slides: Of the request.
        what: They are: slide or image.
    """

    table: SlideTable
    row_of: dict[str, TableRow]
    unknown: tuple[TableRow, ...]
    without: tuple[str, ...]
    slides: int
    what: str

    def column(self, name: str) -> dict[str, str]:
        """Return the values of a column by slide, of those that have a row."""
        return {slide: row.values[name] for slide, row in self.row_of.items()}

    def values_of(self, slides: Iterable[str]) -> dict[str, dict[str, str]]:
        """Return the values of each column by slide; "" where nothing is said."""
        found = {column: self.column(column) for column in self.table.columns}
        slides = [*slides]
        return {
            column: {slide: values.get(slide, "") for slide in slides}
            for column, values in found.items()
        }

    def __str__(self) -> str:
        rows = len(self.table.rows)
        return (
            f"{self.table.uri.rpartition('/')[2]}: {rows - len(self.unknown)} of "
            f"{rows} rows matched {self.slides - len(self.without)} of {self.slides} "
            f"{self.what}s"
        )


def match_table(
    table: SlideTable,
    names: Mapping[str, Names],
    *,
    known: Mapping[str, Names] | None = None,
    what: str = "slide",
) -> Joined:
    """Match each row of a table to the slide that it names.

    Args:
        table: To be matched.
        names: Of the slides of the request.
        known: Of others that it may name, such as those of an earlier request.
        what: They are: slide or image.

    Raises:
        ConfigError: A row could name several slides, or rows of one slide differ.
    """
    every = {**(known or {}), **names}
    index = NameIndex(every)
    row_of: dict[str, TableRow] = {}
    unknown = []
    for row in table.rows:
        found = index.find(row.name)
        if not found:
            unknown.append(row)
            continue
        if len(found) > 1:
            uris = " and ".join(every[slide].uri for slide in found[:2])
            more = f" ({len(found)} in all)" if len(found) > 2 else ""
            raise ConfigError(
                f"{table.uri}: line {row.line}: {row.name} could be {uris}{more}; name "
                f"it by its path with suffix below the folder that holds all {what}s"
            )
        other = row_of.setdefault(found[0], row)
        if other.values != row.values:
            both = " and ".join(
                ",".join([one.name, *one.values.values()]) for one in (other, row)
            )
            raise ConfigError(
                f"{table.uri}: lines {other.line} and {row.line}: say of {what} "
                f"{every[found[0]].uri} both {both}; expected one row per {what}"
            )
    without = tuple(slide for slide in names if slide not in row_of)
    return Joined(table, row_of, tuple(unknown), without, len(names), what)


def join_table(
    table: SlideTable,
    names: Mapping[str, Names],
    *,
    unknown: Unknown,
    known: Mapping[str, Names] | None = None,
    what: str = "slide",
    every: bool = True,
) -> Joined:
    """Match the rows of a table to slides, and log how many were matched.

    Args:
        table: To be joined.
        names: Of the slides of the request.
        unknown: What to do with rows that name no slide.
        known: Of others that it may name, such as those of an earlier request.
        what: They are: slide or image.
        every: Whether all slides should have a row; those without are warned of.

    Raises:
        ConfigError: As for `match_table`; or rows name no slide.
    """
    joined = match_table(table, names, known=known, what=what)
    log.info("%s", joined)
    if joined.unknown:
        none_matched = len(joined.unknown) == len(table.rows)
        if unknown == "refuse" or (unknown == "ignore" and none_matched):
            raise ConfigError(_unknown_message(joined, {**(known or {}), **names}))
        log.warning(
            "%s: %d rows belong to no %s: %s",
            table.uri,
            len(joined.unknown),
            what,
            shown(row.name for row in joined.unknown),
        )
    if joined.without and every and table.rows:
        log.warning(
            "%s: %d %ss have no row: %s",
            table.uri,
            len(joined.without),
            what,
            shown(joined.without),
        )
    return joined


def shown(names: Iterable[str]) -> str:
    """Return the first of many names, for a message."""
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "")


def _unknown_message(joined: Joined, names: Mapping[str, Names]) -> str:
    uri, what, rows = joined.table.uri, joined.what, len(joined.table.rows)
    first, count = joined.unknown[0], len(joined.unknown)
    said = f"{uri}: line {first.line}: names {first.name}, which is no {what} of the "
    said += f"request; {nearest(first.name, names)}. "
    if count == rows:
        return said + (
            f"None of the {rows} rows names one; a {what} is named by its path below "
            f"the folder, its id or its file name, with or without suffix"
        )
    lines = shown(f"{row.line}" for row in joined.unknown)
    return said + (
        f"{count} of {rows} rows are such (lines {lines}): mend or remove them, or "
        f"give --ignore-unknown"
    )


def nearest(name: str, names: Mapping[str, Names]) -> str:
    """Return which names are nearest to one that is not there, in words."""
    uris = (own.uri for own in itertools.islice(names.values(), _COMPARED))
    there = {_stem(uri): uri.rpartition("/")[2] for uri in uris}
    close = difflib.get_close_matches(_stem(name), there)
    if close:
        return f"the nearest: {', '.join(there[stem] for stem in close)}"
    return f"there are {shown(there.values())}"


def _stem(name: str) -> str:
    name = name.rpartition("/")[2].casefold()
    return strip_suffix(name) or name


# --- splits ---------------------------------------------------------------------------


def groups_apart(groups: Joined, splits: Joined) -> list[str]:
    """Return, in words, the groups of a table that another puts into two splits."""
    members: dict[str, dict[str, str]] = defaultdict(dict)
    for slide, group in groups.column("group").items():
        row = splits.row_of.get(slide)
        if group and row and row.values["split"]:
            members[group].setdefault(row.values["split"], slide)
    return [
        f"{splits.table.uri}: group {group} of {groups.table.uri} is in "
        + " and in ".join(
            f"{split} ({slide}: line {splits.row_of[slide].line}, its group line "
            f"{groups.row_of[slide].line})"
            for split, slide in found.items()
        )
        for group, found in sorted(members.items())
        if len(found) > 1
    ]


def join_divisions(
    groups: str | None,
    splits: str | None,
    names: Mapping[str, Names],
    *,
    unknown: Unknown,
    known: Mapping[str, Names] | None = None,
    what: str = "slide",
) -> tuple[dict[str, str], dict[str, str] | None]:
    """Return the group and the split of slides or images, as far as tables say.

    Args:
        groups: CSV (slide,group); None: there is none.
        splits: CSV (slide,split); None: there is none, and no dictionary of it.
        names: Of the slides of the request: of each there is a split, which is "" where
            nothing is said.
        unknown: What to do with rows that name no slide.
        known: Of others that tables may name, such as those of an earlier request.
        what: They are: slide or image.

    Raises:
        ConfigError: A table cannot be read or joined, or SPLITS puts into two splits
            what GROUPS keeps together.
    """
    grouped = divided = None
    if groups:
        grouped = join_table(
            read_groups(groups), names, unknown=unknown, known=known, what=what
        )
        alone = [slide for slide, group in grouped.column("group").items() if not group]
        if alone:
            log.warning(
                "%s: of %d %ss the group is not known; each is one by itself: %s",
                groups,
                len(alone),
                what,
                shown(alone),
            )
    if splits:
        divided = join_table(
            read_splits(splits),
            names,
            unknown=unknown,
            known=known,
            what=what,
            every=False,
        )
    if grouped and divided and (apart := groups_apart(grouped, divided)):
        more = f" ({len(apart)} groups in all)" if len(apart) > 1 else ""
        raise ConfigError(
            f"{apart[0]}{more}; put all of a group into one split, or give only one of "
            f"the tables"
        )
    group_of = grouped.column("group") if grouped else {}
    if divided is None:
        return group_of, None
    split_of = dict.fromkeys(names, "") | divided.column("split")
    if left_out := [slide for slide in names if not split_of[slide]]:
        log.warning(
            "%s: %d of %d %ss are in no split, so no training sees them: %s",
            splits,
            len(left_out),
            len(names),
            what,
            shown(left_out),
        )
    return group_of, split_of
