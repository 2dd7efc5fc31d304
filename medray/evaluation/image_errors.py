"""The images that a classifier is most confidently wrong about, as pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medray.datasets import slide_uri
from medray.errors import ConfigError
from medray.evaluation.html import as_png, data_uri
from medray.storage import ome_zarr
from medray.types import Row, UInt8

_SHOWN = 12  # errors, the most confident ones


def confident_errors(
    rows: list[Row], data: str, names: Sequence[str], model: str | None
) -> list[Row]:
    """Return the most confident errors, with their pictures.

    Args:
        rows: Of all images, with `truth`, `predicted` and `probabilities`.
        data: Dataset of the images.
        names: Of the classes.
        model: Folder of the one classifier; None of several: what spoke for a class is
            a question to one model.
    """
    wrong = [row for row in rows if row["truth"] != row["predicted"]]
    wrong.sort(key=lambda row: -row["probabilities"][row["predicted"]])
    shown: list[Row] = []
    seen = []
    for row in wrong[:_SHOWN]:
        pixels = _pixels(row, data)
        seen.append((pixels, row["predicted"]))
        shown.append(
            {
                "image": row["image"],
                "picture": data_uri(as_png(pixels)),
                "truth": names[row["truth"]],
                "predicted": names[row["predicted"]],
                "confidence": float(row["probabilities"][row["predicted"]]),
            }
        )
    drawn = overlays(model, seen) if model else [None] * len(seen)
    for error, overlay in zip(shown, drawn, strict=True):
        error["overlay"] = overlay
    return shown


def _pixels(row: Row, data: str) -> UInt8:
    """Read an image (H, W, 3) from its sheet."""
    sheet = ome_zarr.open_level(slide_uri(data, row["slide"]))
    y, x, h, w = (row[name] for name in ("y", "x", "height", "width"))
    pixels: UInt8 = np.moveaxis(sheet[:, y : y + h, x : x + w], 0, 2)
    return pixels


def overlays(model: str, seen: Sequence[tuple[UInt8, int]]) -> list[str | None]:
    """Draw what spoke for the classes that images were taken for, as data URIs.

    Args:
        model: Folder of the classifier.
        seen: (S, S, 3) uint8 and the predicted label of each image.

    Returns:
        None for each where it cannot be told: without grad-cam, of an exported model,
        of one that takes measures too, of an encoder without a feature map.
    """
    from medray.evaluation.grad_cam import Explainer

    try:
        explainer = Explainer(model) if seen else None
        return [
            data_uri(as_png(explainer.explain(pixels, label).overlay))
            for pixels, label in seen
            if explainer
        ]
    except ConfigError:
        return [None] * len(seen)
