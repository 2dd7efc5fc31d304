"""What has ever been processed: a row a content, in catalog.parquet.

A content is named by its digest. A file name may stand for one content after the other,
and one content may lie under several names, so a row lists its names, each with the
stamp (size and time) of the file when it was last seen with these bytes. A name whose
stamp is empty stands for other bytes now.

Noting the same again changes nothing, so that a night that was killed after its catalog
was written may note everything once more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from medray.storage import files
from medray.types import Row

Catalog = dict[str, Row]

COLUMNS = pa.schema(
    [
        ("digest", pa.string()),
        ("names", pa.list_(pa.string())),
        ("stamps", pa.list_(pa.string())),
        ("first_seen", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("night", pa.string()),
        ("tried", pa.list_(pa.string())),
        ("slide", pa.string()),
        ("mask", pa.string()),
        ("model_digest", pa.string()),
        ("scanner", pa.string()),
        ("replaced_by", pa.string()),
    ]
)
"""Columns of the table; those that follow are values that are watched for drift.

status is `done`, `failed` (to be tried again), `given up`, or `new` (seen, not tried).
night is that of the last try, tried those of all. mask is a path below OUT. replaced_by
is the digest of what stands under the last of the names now, if none has these bytes.
"""


@dataclass(frozen=True)
class Found:
    """A file of the inbox whose bytes are known.

    Attributes:
        name: Its path below the inbox.
        stamp: Size and time.
        digest: Of its bytes.
    """

    name: str
    stamp: str
    digest: str


@dataclass(frozen=True)
class Outcome:
    """What became of one content in a night.

    Attributes:
        digest: Of its bytes.
        slide: Its id in the night's run.
        reason: Why it failed; empty: it is done.
        mask: Path of its mask below OUT.
        model_digest: Of what predicted it.
        scanner: That made it.
        values: To be watched for drift, by name.
    """

    digest: str
    slide: str
    reason: str = ""
    mask: str = ""
    model_digest: str = ""
    scanner: str = ""
    values: Mapping[str, float] = field(default_factory=dict)


def read_catalog(out: str) -> Catalog:
    """Read the rows by digest; empty when there is no catalog yet.

    Raises:
        FormatError: The file is not parquet.
        StoreError: It cannot be read.
    """
    uri = _uri(out)
    if not files.exists(uri):
        return {}
    return {row["digest"]: row for row in files.read_table(uri).to_pylist()}


def write_catalog(out: str, catalog: Catalog) -> None:
    """Write the whole catalog: a reader sees the old one or the new one."""
    rows = [catalog[digest] for digest in sorted(catalog)]
    watched = sorted({name for row in rows for name in row} - set(COLUMNS.names))
    fields = [*COLUMNS, *(pa.field(name, pa.float64()) for name in watched)]
    files.write_table(_uri(out), pa.Table.from_pylist(rows, pa.schema(fields)))


def _uri(out: str) -> str:
    return files.join(out, "catalog.parquet")


def current(catalog: Catalog) -> dict[str, Found]:
    """Give what each name stood for when it was last looked at."""
    return {
        name: Found(name, stamp, row["digest"])
        for row in catalog.values()
        for name, stamp in zip(row["names"], row["stamps"], strict=True)
        if stamp
    }


def note_files(catalog: Catalog, found: Iterable[Found], night: str) -> None:
    """Note which names stand for which bytes now; what they stood for is replaced."""
    named: dict[str, list[Row]] = {}
    for row in catalog.values():
        for name in row["names"]:
            named.setdefault(name, []).append(row)
    for file in found:
        row = catalog.setdefault(file.digest, _new(file.digest, night))
        _set_stamp(row, file.name, file.stamp)
        row["replaced_by"] = ""
        others = named.setdefault(file.name, [])
        for other in others:
            if other is not row:
                _set_stamp(other, file.name, "")
                if not any(other["stamps"]):
                    other["replaced_by"] = file.digest
        others.append(row)


def _new(digest: str, night: str) -> Row:
    row: Row = dict.fromkeys(COLUMNS.names, "")
    return row | {
        "digest": digest,
        "names": [],
        "stamps": [],
        "tried": [],
        "first_seen": night,
        "status": "new",
    }


def _set_stamp(row: Row, name: str, stamp: str) -> None:
    if name not in row["names"]:
        row["names"].append(name)
        row["stamps"].append(stamp)
    row["stamps"][row["names"].index(name)] = stamp


def note_outcomes(
    catalog: Catalog, outcomes: Iterable[Outcome], night: str, tries: int
) -> None:
    """Note what became of contents that are in the catalog.

    Args:
        catalog: Is changed.
        outcomes: A content each.
        night: In which they were tried.
        tries: After so many nights a content that fails is given up.
    """
    for outcome in outcomes:
        row = catalog[outcome.digest]
        row["tried"] = sorted({*row["tried"], night})
        row |= {
            "night": night,
            "slide": outcome.slide,
            "reason": outcome.reason,
            "mask": outcome.mask,
            "model_digest": outcome.model_digest,
            "scanner": outcome.scanner,
        }
        row |= outcome.values
        row["status"] = "done"
        if outcome.reason:
            row["status"] = "failed" if len(row["tried"]) < tries else "given up"


def values_of(row: Row) -> dict[str, float]:
    """Give the values of a row that are watched for drift."""
    return {
        name: value
        for name, value in row.items()
        if name not in COLUMNS.names and value is not None
    }
