"""Results of single folds, kept in files so that a fold is run once."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path


def digest_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_record(places: Sequence[Path], made_of: str) -> dict[str, object] | None:
    """Take a fold's result that is made of the same, if it is in one of the places."""
    for file in places:
        if file.exists():
            values = dict(json.loads(file.read_text()))
            if values.get("made_of") == made_of:
                return values
    return None


def write_record(places: Sequence[Path], values: Mapping[str, object]) -> None:
    for file in places:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values) + "\n")


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
