"""The bytes of a table of slides, as people save them -> rows with their lines.

Read is what spreadsheets and scripts write: UTF-8 or UTF-16, any line ends, cells
between commas, semicolons or tabs, with or without quotes. What could be read in two
ways is refused with its line.
"""

from __future__ import annotations

import codecs
import csv
import io
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from medray.errors import ConfigError
from medray.storage import files

_DELIMITERS = ",;\t"


@dataclass(frozen=True)
class TableRow:
    """One row of a table.

    Attributes:
        line: On which it begins in the file, from 1.
        name: What it calls its slide.
        values: By column, without spaces around them, in Unicode's NFC.
    """

    line: int
    name: str
    values: dict[str, str]


@dataclass(frozen=True)
class SlideTable:
    """A table with one row per slide.

    Attributes:
        uri: Where it is.
        columns: Those that were asked for and are there, but `slide`.
        rows: Those that are not blank, in the file's order.
    """

    uri: str
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]

    def converted(self, column: str, function: Callable[[str], str]) -> SlideTable:
        """Return the table with other values of a column.

        Raises:
            ConfigError: The function raised a ValueError, whose text says why.
        """
        if column not in self.columns:
            return self
        rows = []
        for row in self.rows:
            try:
                value = function(row.values[column])
            except ValueError as error:
                raise ConfigError(
                    f"{self.uri}: line {row.line}: slide {row.name}: {error}"
                ) from error
            rows.append(replace(row, values=row.values | {column: value}))
        return replace(self, rows=tuple(rows))


def read_table(
    uri: str,
    wanted: Sequence[str],
    *,
    optional: Sequence[str] = (),
    others: bool = False,
) -> SlideTable:
    """Read a CSV file with the column `slide` and others, in any order and case.

    Args:
        uri: Path or address.
        wanted: Columns that must be there.
        optional: Columns that may be there.
        others: Return all other columns that have a name, too.

    Raises:
        ConfigError: There is no such file, it is no such text, a column is missing or
            there twice, or a row has no slide, or fewer or more cells than the header.
    """
    records = _records(uri, text := _decode(uri), _delimiter_of(text))
    line, header = next(records, (1, []))
    while header and not header[-1]:
        header.pop()
    folded = [cell.casefold() for cell in header]
    for cell, key in zip(header, folded, strict=True):
        if key and folded.count(key) > 1:
            raise ConfigError(
                f"{uri}: line {line}: has the column {cell} twice (in any case); "
                f"rename or remove one"
            )
    required = ("slide", *wanted)
    if missing := [name for name in required if name not in folded]:
        also = f", and {' and '.join(optional)} if known" if optional else ""
        raise ConfigError(
            f"{uri}: line {line}: expected the columns {' and '.join(required)}{also}, "
            f"between commas, semicolons or tabs; found {header}, without {missing[0]}"
        )
    place_of = {name: folded.index(name) for name in wanted}
    place_of |= {name: folded.index(name) for name in optional if name in folded}
    if others:
        taken = {folded.index("slide"), *place_of.values()}
        place_of |= {c: i for i, c in enumerate(header) if c and i not in taken}
    rows = tuple(_rows(uri, header, place_of, records))
    return SlideTable(uri, tuple(place_of), rows)


def _rows(
    uri: str,
    header: Sequence[str],
    place_of: dict[str, int],
    records: Iterator[tuple[int, list[str]]],
) -> Iterator[TableRow]:
    slide = [cell.casefold() for cell in header].index("slide")
    for line, cells in records:
        while len(cells) > len(header) and not cells[-1]:
            cells.pop()
        if len(cells) != len(header):
            raise ConfigError(
                f"{uri}: line {line}: expected {len(header)} cells as in the header "
                f"({', '.join(header)}), found {len(cells)}: {cells}"
            )
        if not cells[slide]:
            raise ConfigError(
                f"{uri}: line {line}: has no slide; complete or remove it"
            )
        values = {name: cells[place] for name, place in place_of.items()}
        yield TableRow(line, cells[slide], values)


def _decode(uri: str) -> str:
    place = files.absolute(uri)
    if files.is_local(place) and files.is_folder(place):
        raise ConfigError(f"{uri}: expected a CSV file, found a folder")
    try:
        data = files.read_bytes(place)
    except FileNotFoundError as error:
        raise ConfigError(f"{uri}: expected a CSV file ({error})") from error
    if data.startswith(b"PK\x03\x04"):
        raise ConfigError(
            f"{uri}: expected a CSV file, found a workbook or another ZIP file; save "
            f"its sheet as CSV (UTF-8)"
        )
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = len(data[: error.start].splitlines()) or 1
        raise ConfigError(
            f"{uri}: line {line}: expected a CSV file in UTF-8, or in UTF-16 with a "
            f"byte order mark, found the byte 0x{data[error.start]:02x} ({error.reason}"
            f"); save it as CSV (UTF-8)"
        ) from error
    if "\0" in text:
        line = len(text[: text.index("\0") + 1].splitlines())
        raise ConfigError(
            f"{uri}: line {line}: expected a CSV file in UTF-8, found a NUL character; "
            f"save it as CSV (UTF-8)"
        )
    return text


def _delimiter_of(text: str) -> str:
    """Return what stands between the cells of the header, quotes respected."""
    most = (0, ",")
    for delimiter in _DELIMITERS:
        try:
            cells = next((cells for _, cells in _parsed(text, delimiter)), [])
        except csv.Error:
            continue
        if "slide" in (cell.casefold() for cell in cells):
            return delimiter
        most = max(most, (len(cells), delimiter), key=lambda found: found[0])
    return most[1]


def _records(uri: str, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    line = 0
    try:
        for line, cells in _parsed(text, delimiter):
            yield line, cells
    except csv.Error as error:
        raise ConfigError(
            f"{uri}: expected a CSV file: {error}, after line {line}; mend its quotes"
        ) from error


def _parsed(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the records that are not blank, with the lines on which they begin."""
    # newline="": line ends of all systems are the reader's business.
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    line = 1
    for cells in reader:
        cells = [unicodedata.normalize("NFC", cell.strip()) for cell in cells]
        if any(cells):
            yield line, cells
        line = reader.line_num + 1
