"""Confusion matrices of records, as pictures of the pages.

A page that shows `](confusion-NAME.svg)` has it drawn by `make figures` from the first
result of the newest record NAME. The counts are in the file's description too, by
which `make lint` sees that a picture is older than its record.
"""

import html
import io
import json
import re
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay

PICTURE = re.compile(r"\]\((?P<file>confusion-(?P<name>[\w-]+)\.svg)\)")


def counts_of(record: dict[str, Any]) -> dict[str, list[int]]:
    """Return what images of each true class were taken for.

    Raises:
        ValueError: The record's first result has no confusion matrix.
    """
    found = record["results"][0].get("confusion")
    if not isinstance(found, dict):
        raise ValueError("the first result has no confusion matrix")
    return {truth: [row[name] for name in found] for truth, row in found.items()}


def draw_confusion(counts: dict[str, list[int]]) -> str:
    """Return a confusion matrix as SVG: rows are true classes; darker is more."""
    side = 2.2 + 0.75 * len(counts)
    figure = Figure(figsize=(side, side), layout="constrained")
    shown = ConfusionMatrixDisplay(
        np.array([*counts.values()]),
        display_labels=[name.removeprefix("im_") for name in counts],
    )
    shown.plot(ax=figure.subplots(), cmap="Blues", colorbar=False, xticks_rotation=35.0)
    shown.ax_.set_xlabel("predicted")
    shown.ax_.set_ylabel("true class")
    buffer = io.StringIO()
    about = {"Date": None, "Creator": None, "Description": json.dumps(counts)}
    with matplotlib.rc_context({"svg.hashsalt": "medray"}):
        figure.savefig(buffer, format="svg", metadata=about)
    return re.sub(r"[ \t]+$", "", buffer.getvalue(), flags=re.MULTILINE)


def is_of(picture: str, counts: dict[str, list[int]]) -> bool:
    """Return whether a picture shows these counts."""
    return json.dumps(counts) in html.unescape(picture)
