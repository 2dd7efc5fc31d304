"""The labels of slides: a CSV with the columns slide, label and, if known, patient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medray.datasets import (
    PATIENT,
    Unknown,
    join_table,
    names_of_slides,
    read_labels,
)
from medray.errors import ConfigError
from medray.slides import SlideFile
from medray.types import Row


@dataclass(frozen=True)
class SlideLabel:
    """What is known of a slide.

    Attributes:
        label: Name of its class.
        patient: Whose it is; the slide itself where the patient is not known.
    """

    label: str
    patient: str


def join_labels(
    uri: str, rows: Mapping[str, Row], *, ignore_unknown: bool
) -> tuple[dict[str, SlideLabel], str]:
    """Return the label of each slide that has one by its id, and how many matched.

    Args:
        uri: CSV (slide,label[,patient]); slides are named as in any table.
        rows: Of the slides that have features, by id.
        ignore_unknown: Leave out lines of the CSV that name no slide.

    Raises:
        ConfigError: The CSV cannot be read, a label is missing, slides are named that
            are not there, or a slide has two labels.
    """
    slides = [SlideFile(slide, row.get("uri") or slide) for slide, row in rows.items()]
    unknown: Unknown = "ignore" if ignore_unknown else "refuse"
    joined = join_table(
        read_labels(uri), names_of_slides(slides), unknown=unknown, every=False
    )
    patients = joined.column(PATIENT) if PATIENT in joined.table.columns else {}
    labels = {
        slide: SlideLabel(label, patients.get(slide) or slide)
        for slide, label in joined.column("label").items()
    }
    return labels, str(joined)


def classes_of(
    uri: str, labels: Sequence[str], wanted: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return the classes of labels, in their order.

    Args:
        uri: The file of the labels.
        labels: One a slide.
        wanted: The order, if it is said; else by name.

    Raises:
        ConfigError: There is only one, or they are not the wanted ones.
    """
    found = sorted(set(labels))
    if len(found) < 2:
        raise ConfigError(
            f"{uri}: expected two classes or more among the slides that have features, "
            f"found {found}"
        )
    if wanted and sorted(wanted) != found:
        raise ConfigError(
            f"classes: the recipe has {list(wanted)}, the slides of {uri} have {found}"
        )
    return tuple(wanted) or tuple(found)
