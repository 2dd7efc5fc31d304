"""Slides of a dataset and their splits, with those of earlier requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from medray.datasets.earlier_request import names_of
from medray.datasets.ingest_request import IngestRequest
from medray.datasets.splits import (
    copies_apart,
    joined_groups,
    kept_splits,
    split_slides,
)
from medray.storage import files
from medray.types import Row


def assign_splits(rows: Sequence[Row], request: IngestRequest) -> list[str]:
    """Set the group, stratum and split of finished slides; splits that are known stay.

    Where a table says the splits, those stay that it does not have.

    Args:
        rows: Of slides.parquet, of all slides that are done; `split` of those that had
            one before.
        request: How splits are dealt.

    Returns:
        Warnings.
    """
    for row in rows:
        group = request.group_of.get(row["slide"], row.get("group"))
        row["group"] = group or row["slide"]
        present = (key for key in sorted(row) if key.startswith("px_") and row[key])
        row["stratum"] = "+".join(key.removeprefix("px_") for key in present)
    usable = [row for row in rows if row["annotated"]]
    split_of, moved = request.split_of, []
    if split_of is None:
        dealt = joined_groups(usable)
        keep = kept_splits(dealt)
        split_of = split_slides(
            dealt, fractions=request.fractions, seed=request.seed, keep=keep
        )
        moved = [
            f"{row['slide']} from {row['split']} to {split_of[row['slide']]}"
            for row in usable
            if row.get("split") not in (None, "", split_of[row["slide"]])
        ]
    for row in rows:
        split = split_of.get(row["slide"], row.get("split") or "")
        row["split"] = split if row["annotated"] else ""
    if not moved:
        return copies_apart(rows)
    return [
        f"{len(moved)} slides change their split, to be with others of their patient "
        f"or with the same scan: {names_of(moved)}"
    ]


def earlier_splits(rows: Mapping[str, Row], out: str) -> dict[str, str | None]:
    """Return the split that slides of a dataset had before a request.

    Args:
        rows: Of slides.parquet, by slide; it forgets a slide that changes.
        out: Folder of the dataset, whose patches know it still.
    """
    splits = {slide: row.get("split") for slide, row in rows.items()}
    uri = files.join(out, "patches.parquet")
    table = files.read_table(uri) if files.exists(uri) else None
    if table is None or "split" not in table.column_names:
        return splits
    pairs = table.group_by(["slide", "split"]).aggregate([]).to_pylist()
    return splits | {pair["slide"]: pair["split"] for pair in pairs}
