"""Warnings where a request differs from its dataset: other splits, other slides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medray.datasets.dataset import slide_uri, write_patches
from medray.errors import ConfigError
from medray.slides import SlideFile
from medray.storage import Ledger, files
from medray.types import Row

_NAMED = 5  # slides that a warning names


def names_of(names: Sequence[str]) -> str:
    """Return some names and how many more there are."""
    left = len(names) - _NAMED
    more = f" and {left} more" if left > 0 else ""
    return f"{', '.join(names[:_NAMED])}{more}"


def note_request(out: str, by: str) -> list[str]:
    """Store what splits are dealt by; warn if it has no effect on existing ones.

    Args:
        out: The dataset.
        by: `--splits`, which has an effect on all, or fractions and seed.
    """
    said = warn_of_splits(out, by)
    if not said:
        files.write_json(_splits_uri(out), {"by": by})
    return said


def warn_of_splits(out: str, by: str) -> list[str]:
    """Return a warning if what splits are dealt by affects new slides only."""
    uri, table = _splits_uri(out), files.join(out, "slides.parquet")
    rows = files.read_table(table).to_pylist() if files.exists(table) else []
    kept = sum(bool(row.get("split")) for row in rows)
    before = files.read_json(uri)["by"] if files.exists(uri) else by
    if by in ("--splits", before) or not kept:
        return []
    return [
        f"{kept} slides keep the splits that they have by {before}; what is asked "
        f"now, {by}, decides of new slides only. For other splits give --splits, or "
        f"another --out"
    ]


def _splits_uri(out: str) -> str:
    return files.join(out, "splits.json")


@dataclass(frozen=True)
class Stock:
    """What a dataset has that a request does not name.

    Attributes:
        missing: Slides that are done.
        lost: Slides to take out, those that failed among them.
        warnings: Of the slides that stay.
    """

    missing: list[str]
    lost: list[str]
    warnings: list[str]


def check_stock(
    wanted: Sequence[SlideFile], out: str, rows: Mapping[str, Row], *, remove: bool
) -> Stock:
    """Return what the dataset has that the request does not name.

    Args:
        wanted: The slides of the request.
        out: The dataset.
        rows: Of its slides.parquet, by slide.
        remove: Whether they are to be taken out.

    Raises:
        ConfigError: Nothing would be left.
    """
    named = {file.slide for file in wanted}
    there = {slide for slide, row in rows.items() if row["status"] == "done"}
    gone = sorted(there - named)
    if not remove:
        said = (
            f"{len(gone)} slides of the dataset are not in the request and stay: "
            f"{names_of(gone)}; --remove-missing takes them out"
        )
        return Stock(gone, [], [said] if gone else [])
    if gone and there.isdisjoint(named):
        raise ConfigError(
            f"{out}: has none of the {len(named)} slides of the request, so "
            f"--remove-missing would take out all of its {len(gone)}; name the folder "
            f"that holds what is to stay, or choose another --out"
        )
    return Stock(gone, sorted(rows.keys() - named), [])


def take_stock(wanted: Sequence[SlideFile], out: str, *, remove: bool) -> list[str]:
    """Return a warning if the dataset has slides that the request does not name.

    Args:
        wanted: The slides of the request.
        out: The dataset.
        remove: Take them out of it. What is killed meanwhile is removed by the next
            command: patches go first, then pixels, then the row.

    Raises:
        ConfigError: Nothing would be left.
    """
    ledger = Ledger(out, keep_finished=True)
    stock = check_stock(wanted, out, ledger.slides, remove=remove)
    lost = stock.lost
    if not lost:
        return stock.warnings
    uri = files.join(out, "patches.parquet")
    if files.exists(uri):
        patches = files.read_table(uri).to_pylist()
        write_patches(out, [row for row in patches if row["slide"] not in lost])
    for slide in lost:
        files.remove(slide_uri(out, slide))
        ledger.drop_slide(slide)
    ledger.flush()
    return [
        f"{len(lost)} slides that are not in the request were taken out of the "
        f"dataset: {names_of(lost)}"
    ]
