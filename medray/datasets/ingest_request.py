"""The request of an ingest of slides, checked before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medray.annotations import match_annotations
from medray.classes import Classes
from medray.datasets.dataset import DatasetSettings
from medray.datasets.join_tables import Unknown, join_divisions
from medray.datasets.names import names_of_slides
from medray.datasets.overrides import with_overrides
from medray.datasets.splits import check_fractions
from medray.slides import SlideFile, find_slides
from medray.storage import files


@dataclass(frozen=True, kw_only=True)
class IngestRequest:
    """Which slides to ingest, and how.

    Attributes:
        out: Folder of the dataset.
        settings: Of the dataset.
        slides: Of the request, with what the user says of each.
        annotations: Address of each slide's annotation by the slide's id.
        annotated_by: Folder of the annotations; None: there is none.
        groups: CSV of groups; None: there is none.
        splits: CSV of splits; None: there is none.
        group_of: Group of each slide that GROUPS names.
        split_of: Split by slide, as SPLITS says; None: splits are dealt.
        fractions: Shares of slides in train, val and test.
        seed: Decides the splits.
        remove_missing: Whether slides that are not named are taken out of OUT.
    """

    out: str
    settings: DatasetSettings
    slides: Sequence[SlideFile]
    annotations: Mapping[str, str]
    annotated_by: str | None
    groups: str | None
    splits: str | None
    group_of: Mapping[str, str]
    split_of: Mapping[str, str] | None
    fractions: tuple[float, float, float]
    seed: int
    remove_missing: bool

    @property
    def dealt_by(self) -> str:
        """What decides the splits, in words."""
        if self.splits is not None:
            return "--splits"
        shares = ",".join(f"{share:g}" for share in self.fractions)
        return f"fractions {shares} and seed {self.seed}"


def settle_ingest(
    slides: Sequence[str],
    *,
    out: str,
    annotations: str | None = None,
    classes: tuple[str, ...] = ("background", "tumour"),
    mpp: float | str | None = None,
    scene: int | None = None,
    plane: int | None = None,
    groups: str | None = None,
    splits: str | None = None,
    ignore_unknown: bool = False,
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15),
    seed: int = 0,
    remove_missing: bool = False,
) -> IngestRequest:
    """Return the request that `ingest` makes of the same arguments; write nothing.

    Raises:
        ConfigError: The request is wrong.
    """
    mpp = files.absolute(mpp) if isinstance(mpp, str) else mpp
    settings = DatasetSettings(classes=Classes(tuple(classes)), mpp=mpp)
    out = files.absolute(out)
    check_fractions(fractions)
    found = find_slides(slides)
    before = _ingested_before(out, found)
    unknown: Unknown = "ignore" if ignore_unknown else "refuse"
    wanted = with_overrides(
        found, mpp=mpp, scene=scene, plane=plane, unknown=unknown, known=before
    )
    matched = match_annotations(wanted, annotations)
    group_of, split_of = join_divisions(
        groups,
        splits,
        names_of_slides(wanted),
        unknown=unknown,
        known=names_of_slides(before),
    )
    return IngestRequest(
        out=out,
        settings=settings,
        slides=wanted,
        annotations=matched,
        annotated_by=annotations,
        groups=groups,
        splits=splits,
        group_of=group_of,
        split_of=split_of,
        fractions=fractions,
        seed=seed,
        remove_missing=remove_missing,
    )


def _ingested_before(out: str, wanted: Sequence[SlideFile]) -> list[SlideFile]:
    """Return the slides of an earlier request, which tables may name too."""
    uri = files.join(out, "slides.parquet")
    if not files.exists(uri):
        return []
    asked = {file.slide for file in wanted}
    rows = files.read_table(uri).to_pylist()
    return [
        SlideFile(row["slide"], row.get("uri") or row["slide"])
        for row in rows
        if row["slide"] not in asked
    ]
