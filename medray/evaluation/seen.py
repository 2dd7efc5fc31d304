"""Which slides of an evaluation the model has seen, and whose slides they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medray.datasets import labels_uri
from medray.models import seen_by
from medray.slides import scan_digest
from medray.storage import files, group_attributes
from medray.types import Row


@dataclass(frozen=True)
class SeenSlides:
    """Slides of an evaluation that the model has seen, by their ids.

    Attributes:
        train: The weights have learned from them.
        val: They chose the epoch that was kept.
    """

    train: list[str]
    val: list[str]

    def __str__(self) -> str:
        parts = [
            f"{len(slides)} of these slides {what}"
            for slides, what in (
                (self.train, "trained the model"),
                (self.val, "chose the epoch of its training"),
            )
            if slides
        ]
        return " and ".join(parts)


def find_seen(
    slides: Sequence[Row], run: str, dataset: Mapping[str, Row]
) -> SeenSlides | None:
    """Return which slides the models of a run have seen; None: that is not known.

    Args:
        slides: Rows of the run.
        run: Its folder.
        dataset: Rows of the dataset that is the truth, see `rows_of_truth`.
    """
    seen = seen_by([run])
    if seen is None:
        return None
    found: dict[str, list[str]] = {"train": [], "val": []}
    for row in slides:
        names = [row["digest"] or "", _original(row)]
        if row["slide"] in dataset:
            names.append(dataset[row["slide"]]["digest"])
        hows = {seen.get(scan_digest(name)) for name in names}
        for how in ("train", "val"):
            if how in hows:
                found[how].append(row["slide"])
                break
    return SeenSlides(**found)


def _original(row: Row) -> str:
    """Return the digest of what a slide of a dataset was made of; "": it is none."""
    if not row["uri"].endswith(".zarr"):
        return ""
    attributes = group_attributes.read_attributes(row["uri"]) or {}
    return f"{attributes.get('digest', '')}"


def rows_of_truth(matched: Sequence[Row], truth: str) -> dict[str, Row]:
    """Return the dataset's row of each slide of a run; none if the truth is no dataset.

    Args:
        matched: Rows of the run with their `truth` and `kind`.
        truth: Dataset, or folder of annotations.
    """
    if not any(row["kind"] == "labels" for row in matched):
        return {}
    table = files.read_table(files.join(truth, "slides.parquet")).to_pylist()
    rows = {labels_uri(truth, row["slide"]): row for row in table}
    return {row["slide"]: rows[row["truth"]] for row in matched}


def describe_slides(
    slides: Sequence[str],
    dataset: Mapping[str, Row],
    patients: Mapping[str, str],
) -> str:
    """Return, in words, the splits and the number of patients of slides, where known.

    Args:
        slides: Their ids.
        dataset: Rows of the dataset that is the truth, by slide.
        patients: Whose they are, by slide, as a table says; "" where it does not.
    """
    rows = [dataset[slide] for slide in slides if slide in dataset]
    counts = Counter(row["split"] or "no split" for row in rows)
    said = [f"{count} of {split}" for split, count in sorted(counts.items())]
    known = {patients.get(slide, "") for slide in slides} - {""}
    groups = {row["group"] for row in rows}
    if known:
        said.append(f"of {len(known)} patients")
    elif groups - {row["slide"] for row in rows}:
        said.append(f"of {len(groups)} patients")
    else:
        said.append("nobody said of which patients")
    return ", ".join(said)
