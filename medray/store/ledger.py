"""What of a folder of slides is finished: regions in a journal, slides in a table.

    FOLDER/
      slides.parquet    a row a slide that is done or has failed
      journal/*.jsonl   committed regions of slides that are not done yet

One process, the driver, keeps the ledger. A region is committed when its shard is
stored and its line stands in the journal; a slide when all its regions are committed,
its pyramid is built and its row stands in slides.parquet. A run that dies loses only
what was not in the ledger, and writing that again stores the same bytes.
"""

from __future__ import annotations

import json
import time
from typing import Any

import pyarrow as pa

from medray.store import files

Row = dict[str, Any]

# How long a committed row may wait in memory: what a killed driver can lose.
_FLUSH_S = 0.5
_TABLE_S = 5.0


class Ledger:
    """The committed regions and slides of one folder.

    Attributes:
        slides: Row of each finished or failed slide by its id.
        regions: Record of each committed region of unfinished slides: by slide key
            (see `slide_key`), then by the region's index.
    """

    def __init__(self, folder: str) -> None:
        """Read what earlier runs have committed to `folder`."""
        self._table_uri = files.join(folder, "slides.parquet")
        self._journal = files.join(folder, "journal")
        self.slides: dict[str, Row] = {}
        self.regions: dict[str, dict[int, Row]] = {}
        if files.exists(self._table_uri):
            rows = files.read_table(self._table_uri).to_pylist()
            self.slides = {row["slide"]: row for row in rows}
        parts = [p for p in files.list_folder(self._journal) if p.endswith(".jsonl")]
        for part in parts:
            for line in files.read_bytes(files.join(self._journal, part)).splitlines():
                record = json.loads(line)
                committed = self.regions.setdefault(record["key"], {})
                committed[record["index"]] = record["region"]
        self._part = 1 + max((int(p.split(".")[0]) for p in parts), default=0)
        self._pending: list[str] = []
        self._flushed_at = self._table_at = time.monotonic()
        self._table_dirty = False

    def commit_region(self, key: str, index: int, region: Row) -> None:
        """Record that a region's shard is stored; at most 0.5 s until it is durable."""
        self.regions.setdefault(key, {})[index] = region
        record = {"key": key, "index": index, "region": region}
        self._pending.append(json.dumps(record, separators=(",", ":")))
        if time.monotonic() - self._flushed_at > _FLUSH_S:
            self._flush_journal()

    def commit_slide(self, row: Row) -> None:
        """Record that a slide is done or has failed; at most 5 s until durable."""
        self.slides[row["slide"]] = row
        self._table_dirty = True
        if time.monotonic() - self._table_at > _TABLE_S:
            self.flush()

    def forget_slide(self, slide: str) -> None:
        """Stop counting a slide as done; durable with the next flush."""
        del self.slides[slide]
        self._table_dirty = True

    def _flush_journal(self) -> None:
        if self._pending:
            name = f"{self._part:08d}.jsonl"
            text = "\n".join(self._pending) + "\n"
            files.write_bytes(files.join(self._journal, name), text.encode())
            self._part += 1
            self._pending = []
        self._flushed_at = time.monotonic()

    def flush(self) -> None:
        """Make everything recorded so far durable."""
        self._flush_journal()
        if self._table_dirty:
            rows = [self.slides[slide] for slide in sorted(self.slides)]
            files.write_table(self._table_uri, pa.Table.from_pylist(_aligned(rows)))
            self._table_dirty = False
        self._table_at = time.monotonic()

    def close(self) -> None:
        """Make everything durable and drop the journal when no slide is half done."""
        self.flush()
        done = {
            slide_key(row["slide"], row["digest"])
            for row in self.slides.values()
            if row["status"] == "done"
        }
        if done.issuperset(self.regions):
            files.remove(self._journal)


def slide_key(slide: str, digest: str) -> str:
    """Name a slide with its content: a replaced file never takes over regions."""
    return f"{slide}@{digest}"


def _aligned(rows: list[Row]) -> list[Row]:
    """Give every row every column (pyarrow takes the columns from the first row)."""
    columns: dict[str, None] = {}
    for row in rows:
        columns.update(dict.fromkeys(row))
    return [{column: row.get(column) for column in columns} for row in rows]
