"""The finished part of a folder of slides: regions in a journal, slides in a table.

    FOLDER/
      slides.parquet    one row per slide that is done or has failed
      journal/*.jsonl   committed regions of slides that are not done yet

A slide has one content at a time: the records of another, which it had before it was
replaced, are dropped with the first record of the new one.

One process, the driver, keeps the ledger. A region is committed when its shard is
stored and its line stands in the journal; a slide when all its regions are committed,
its pyramid is built and its row stands in slides.parquet. A run that dies loses only
what was not in the ledger, and writing that again stores the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from medray.errors import StoreError
from medray.storage import files
from medray.types import Row

# How long a committed row may wait in memory: what a killed driver can lose. The table
# is written whole, so with many slides it is written less often: a twentieth of the
# time. Regions are in the journal by then.
_FLUSH_S = 0.5
_TABLE_S, _TABLE_SHARE = 5.0, 0.05
# Parts of the journal before it is rewritten without the slides that are done.
_MOST_PARTS = 200


class Ledger:
    """The committed regions and slides of one folder.

    Attributes:
        folder: Its address.
        slides: Row of each finished or failed slide by its id.
        regions: Record of each committed region of unfinished slides: by slide key
            (see `slide_key`), then by the region's index.
    """

    def __init__(self, folder: str, *, keep_finished: bool = False) -> None:
        """Read what earlier runs have committed to `folder`.

        Args:
            folder: Of the run or dataset.
            keep_finished: Keep the regions of finished slides until `close`.
        """
        self.folder = folder
        self._keep_finished = keep_finished
        self._table_uri = files.join(folder, "slides.parquet")
        self._journal = files.join(folder, "journal")
        self.slides: dict[str, Row] = {}
        self.regions: dict[str, dict[int, Row]] = {}
        if files.exists(self._table_uri):
            rows = files.read_table(self._table_uri).to_pylist()
            for row in rows:
                if "stamp" in row:  # its name in the tables of medray 0.1
                    row["fingerprint"] = row.pop("stamp")
            self.slides = {row["slide"]: row for row in rows}
        self._forgotten: dict[str, Row] = {}
        self._key_of: dict[str, str] = {}  # the key of each slide's records
        done = {
            slide: slide_key(slide, row["digest"])
            for slide, row in self.slides.items()
            if row["status"] == "done"
        }
        parts = [p for p in files.list_folder(self._journal) if p.endswith(".jsonl")]
        for part in parts:
            for line in files.read_bytes(files.join(self._journal, part)).splitlines():
                record = json.loads(line)
                slide, key = record["key"].rpartition("@")[0], record["key"]
                if slide in done and not (keep_finished and done[slide] == key):
                    continue
                self._records(key)[record["index"]] = record["region"]
        self._parts = [int(part.split(".")[0]) for part in parts]
        self._table_s = _TABLE_S
        self._pending: list[str] = []
        self._finished: list[str] = []
        self._flushed_at = self._table_at = time.monotonic()
        self._table_dirty = False
        self._rewrite = False

    def commit_region(self, key: str, index: int, region: Row) -> None:
        """Record that a region's shard is stored; at most 0.5 s until it is durable."""
        self._records(key)[index] = region
        self._pending.append(_line(key, index, region))
        if time.monotonic() - self._flushed_at > _FLUSH_S:
            self._flush_journal()

    def _records(self, key: str) -> dict[int, Row]:
        """Return the records of a slide's content, and drop those of any other."""
        slide = key.rpartition("@")[0]
        before = self._key_of.get(slide, key)
        if before != key:
            self.regions.pop(before, None)
        self._key_of[slide] = key
        return self.regions.setdefault(key, {})

    def records_of(self, slide: str) -> tuple[str, dict[int, Row]]:
        """Return the digest and the region records of a slide that is under way."""
        key = self._key_of.get(slide, slide_key(slide, ""))
        return key.rpartition("@")[2], self.regions.get(key, {})

    def commit_slide(self, row: Row) -> None:
        """Record that a slide is done or has failed; durable with the next flush."""
        self.slides[row["slide"]] = row = {k: storable(v) for k, v in row.items()}
        if row["status"] == "done":
            key = slide_key(row["slide"], row["digest"])
            self._records(key)
            self._finished.append(key)
        self._table_dirty = True
        if time.monotonic() - self._table_at > self._table_s:
            self.flush()

    def forget_slide(self, slide: str) -> None:
        """Stop counting a slide as done; durable with the next flush."""
        self._forgotten[slide] = self.slides.pop(slide)
        self._table_dirty = True

    def drop_slide(self, slide: str) -> None:
        """Keep nothing of a slide; durable with the next flush."""
        self.slides.pop(slide, None)
        self.regions.pop(self._key_of.pop(slide, ""), None)
        self._table_dirty = self._rewrite = True

    def restore_slide(self, slide: str, changed: Mapping[str, Any]) -> None:
        """Count a slide as done again that `forget_slide` dropped.

        Args:
            slide: Its id.
            changed: Columns of its row that are different now.
        """
        self.commit_slide({**self._forgotten.pop(slide), **changed})

    def reopen(self, slide: str, digest: str, regions: dict[int, Row]) -> None:
        """Stop counting a slide as done, and all but some of its regions as committed.

        Durable with the next flush.
        """
        self._records(slide_key(slide, digest))
        self.regions[slide_key(slide, digest)] = regions
        # Regions that are forgotten cannot be noted, only left out of a new journal.
        self._rewrite = True
        if slide in self.slides:
            self.forget_slide(slide)

    def _flush_journal(self) -> None:
        if self._pending:
            part = 1 + max(self._parts, default=0)
            text = "\n".join(self._pending) + "\n"
            files.write_bytes(self._part_uri(part), text.encode())
            self._parts.append(part)
            self._pending = []
        self._flushed_at = time.monotonic()

    def _part_uri(self, part: int) -> str:
        return files.join(self._journal, f"{part:08d}.jsonl")

    def _compact(self) -> None:
        """Rewrite the journal as one part, with unfinished slides only."""
        old, self._parts = self._parts, [max(self._parts, default=0)]
        self._pending = [
            _line(key, index, region)
            for key, regions in self.regions.items()
            for index, region in regions.items()
        ]
        self._flush_journal()
        for part in old:
            files.remove(self._part_uri(part))
        self._parts = [part for part in self._parts if part not in old]

    def flush(self) -> None:
        """Make everything recorded so far durable."""
        if self._rewrite:
            self._compact()
            self._rewrite = False
        self._flush_journal()
        if self._table_dirty:
            start = time.monotonic()
            rows = [self.slides[slide] for slide in sorted(self.slides)]
            files.write_table(self._table_uri, pa.Table.from_pylist(_aligned(rows)))
            self._table_dirty = False
            self._table_s = max(_TABLE_S, (time.monotonic() - start) / _TABLE_SHARE)
            if not self._keep_finished:
                for key in self._finished:
                    self.regions.pop(key, None)
                if len(self._parts) > _MOST_PARTS:
                    self._compact()
            self._finished = []
        self._table_at = time.monotonic()

    def close(self) -> None:
        """Make everything durable and drop the journal when no slide is half done."""
        self.flush()
        if self._done().issuperset(self.regions):
            files.remove(self._journal)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Make durable what is committed within the context, however it ends."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(StoreError):
                self.flush()
            raise

    def _done(self) -> set[str]:
        return {
            slide_key(row["slide"], row["digest"])
            for row in self.slides.values()
            if row["status"] == "done"
        }


def _line(key: str, index: int, region: Row) -> str:
    record = {"key": key, "index": index, "region": region}
    return json.dumps(record, separators=(",", ":"))


def storable[V](value: V) -> V | str:
    """Escape what is not Unicode in a text: names of files may hold any bytes."""
    if not isinstance(value, str):
        return value
    return value.encode(errors="backslashreplace").decode()


def add_note(row: Row, said: str) -> None:
    """Append to the note in a slide's row, which is for the user."""
    row["note"] = f"{row['note']}; {said}" if row.get("note") else said


def slide_key(slide: str, digest: str) -> str:
    """Return a key of slide and content: a replaced file never takes over regions."""
    return f"{slide}@{digest}"


def _aligned(rows: list[Row]) -> list[Row]:
    """Return rows with every column (pyarrow takes the columns from the first row)."""
    columns: dict[str, None] = {}
    for row in rows:
        columns.update(dict.fromkeys(row))
    return [{column: row.get(column) for column in columns} for row in rows]
