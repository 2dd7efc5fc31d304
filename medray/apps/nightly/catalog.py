"""All contents that were ever processed: one row per content, in catalog.parquet.

A content is named by its digest. A file name may stand for one content after the other,
and one content may lie under several names, so a row lists its names, each with the
fingerprint (size and time) of the file when it was last seen with these bytes. A name
whose fingerprint is empty stands for other bytes now.

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

QC = "qc_"
"""Start of the names of columns with values of slide quality control."""

COLUMNS = pa.schema(
    [
        ("digest", pa.string()),
        ("names", pa.list_(pa.string())),
        ("fingerprints", pa.list_(pa.string())),
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
"""Columns of the table; those that follow are values that are watched for drift or by
slide quality control.

status is `done`, `failed` (to be tried again), `given up`, `quarantined` (by slide
quality control, see `medray.apps.nightly.quality`), or `new` (seen, not tried).
night is that of the last try, tried those of all. mask is a path below OUT. replaced_by
is the digest of what stands under the last of the names now, if none has these bytes.
"""


@dataclass(frozen=True)
class Found:
    """A file of the inbox whose bytes are known.

    Attributes:
        name: Its path below the inbox.
        fingerprint: Size and time.
        digest: Of its bytes.
    """

    name: str
    fingerprint: str
    digest: str


@dataclass(frozen=True)
class Outcome:
    """The outcome of one content in a night.

    Attributes:
        digest: Of its bytes.
        slide: Its id in the night's run.
        reason: Why it failed or was not tried; empty: it is done.
        quarantined: It was not tried.
        mask: Path of its mask below OUT.
        model_digest: Of what predicted it.
        scanner: That made it.
        values: To be watched for drift, and of quality control, by name.
    """

    digest: str
    slide: str
    reason: str = ""
    quarantined: bool = False
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
    table = files.read_table(uri)
    names = {"stamps": "fingerprints"}  # by their names in the catalogs of medray 0.1
    table = table.rename_columns([names.get(n, n) for n in table.column_names])
    return {row["digest"]: row for row in table.to_pylist()}


def write_catalog(out: str, catalog: Catalog) -> None:
    """Write the whole catalog: a reader sees the old one or the new one."""
    rows = [catalog[digest] for digest in sorted(catalog)]
    watched = sorted({name for row in rows for name in row} - set(COLUMNS.names))
    fields = [*COLUMNS, *(pa.field(name, pa.float64()) for name in watched)]
    files.write_table(_uri(out), pa.Table.from_pylist(rows, pa.schema(fields)))


def _uri(out: str) -> str:
    return files.join(out, "catalog.parquet")


def read_found(file: Row) -> Found:
    """Return a file of a night's plan, as `dataclasses.asdict` wrote it."""
    names = {"stamp": "fingerprint"}  # by their names in the plans of medray 0.1
    return Found(**{names.get(key, key): value for key, value in file.items()})


def current(catalog: Catalog) -> dict[str, Found]:
    """Return what each name stood for when it was last looked at."""
    return {
        name: Found(name, fingerprint, row["digest"])
        for row in catalog.values()
        for name, fingerprint in zip(row["names"], row["fingerprints"], strict=True)
        if fingerprint
    }


def note_files(catalog: Catalog, found: Iterable[Found], night: str) -> None:
    """Record which names stand for which bytes now; earlier bytes are replaced."""
    named: dict[str, list[Row]] = {}
    for row in catalog.values():
        for name in row["names"]:
            named.setdefault(name, []).append(row)
    for file in found:
        row = catalog.setdefault(file.digest, _new(file.digest, night))
        _set_fingerprint(row, file.name, file.fingerprint)
        row["replaced_by"] = ""
        others = named.setdefault(file.name, [])
        for other in others:
            if other is not row:
                _set_fingerprint(other, file.name, "")
                if not any(other["fingerprints"]):
                    other["replaced_by"] = file.digest
        others.append(row)


def _new(digest: str, night: str) -> Row:
    row: Row = dict.fromkeys(COLUMNS.names, "")
    return row | {
        "digest": digest,
        "names": [],
        "fingerprints": [],
        "tried": [],
        "first_seen": night,
        "status": "new",
    }


def _set_fingerprint(row: Row, name: str, fingerprint: str) -> None:
    if name not in row["names"]:
        row["names"].append(name)
        row["fingerprints"].append(fingerprint)
    row["fingerprints"][row["names"].index(name)] = fingerprint


def note_outcomes(
    catalog: Catalog, outcomes: Iterable[Outcome], night: str, tries: int
) -> None:
    """Record the outcomes of contents that are in the catalog.

    Args:
        catalog: Is changed.
        outcomes: A content each.
        night: In which they were tried.
        tries: After so many nights a content that fails is given up.
    """
    for outcome in outcomes:
        row = catalog[outcome.digest]
        if not outcome.quarantined:
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
        if outcome.quarantined:
            row["status"] = "quarantined"
        elif outcome.reason:
            row["status"] = "failed" if len(row["tried"]) < tries else "given up"


def values_of(row: Row) -> dict[str, float]:
    """Return the values of a row that are watched for drift, or of quality control."""
    return {
        name: value
        for name, value in row.items()
        if name not in COLUMNS.names and value is not None
    }


def quality_of(row: Row) -> dict[str, float]:
    """Return the values of slide quality control of a row."""
    return {
        name.removeprefix(QC): value
        for name, value in values_of(row).items()
        if name.startswith(QC)
    }
