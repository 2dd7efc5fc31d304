"""The labels of slides: a CSV with the columns slide, label and, if known, patient."""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Container, Sequence
from dataclasses import dataclass

from medray.errors import ConfigError
from medray.slides import strip_suffix
from medray.storage import files


@dataclass(frozen=True)
class SlideLabel:
    """What is known of a slide.

    Attributes:
        label: Name of its class.
        patient: Whose it is; the slide itself where nobody says.
    """

    label: str
    patient: str


def read_labels(uri: str) -> dict[str, SlideLabel]:
    """Read the labels of slides; slides may be named with the suffix of their files.

    Raises:
        ConfigError: There is no such file, a column or a value is missing, or a slide
            is named twice with different values.
    """
    uri = files.absolute(uri)
    try:
        text = files.read_bytes(uri).decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as error:
        raise ConfigError(f"{uri}: expected a CSV file ({error})") from error
    reader = csv.DictReader(io.StringIO(text))
    names = reader.fieldnames or []
    if "slide" not in names or "label" not in names:
        raise ConfigError(
            f"{uri}: expected the columns slide and label, and patient if it is known, "
            f"found {list(names)}"
        )
    labels: dict[str, SlideLabel] = {}
    for row in reader:
        values = {key: (row.get(key) or "").strip() for key in (*names, "patient")}
        slide = strip_suffix(values["slide"]) or values["slide"]
        if not slide or not values["label"]:
            raise ConfigError(
                f"{uri}: line {reader.line_num} has no slide or no label; complete or "
                f"remove it"
            )
        found = SlideLabel(values["label"], values["patient"] or slide)
        if labels.setdefault(slide, found) != found:
            raise ConfigError(
                f"{uri}: slide {slide} is there twice, as {labels[slide]} and {found}"
            )
    if not labels:
        raise ConfigError(f"{uri}: holds no slide")
    return labels


def check_known(
    uri: str, labels: Container[str], slides: Sequence[str], where: str
) -> None:
    """Refuse labels of slides that are not there.

    Args:
        uri: The file of the labels.
        labels: Slides that are there.
        slides: Slides that have a label.
        where: What they were looked for in.

    Raises:
        ConfigError: There are such.
    """
    unknown = [slide for slide in slides if slide not in labels]
    if not unknown:
        return
    known = list(labels) if isinstance(labels, dict) else []
    close = difflib.get_close_matches(unknown[0], known, n=1)
    hint = f" (is it {close[0]}?)" if close else ""
    raise ConfigError(
        f"{uri}: names {len(unknown)} slides that {where} does not have, such as "
        f"{unknown[0]}{hint}; embed them too, or remove their lines"
    )


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
