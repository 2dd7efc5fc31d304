"""The images that a classifier is most confidently wrong about, as pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from medray.datasets import slide_uri
from medray.errors import ConfigError
from medray.evaluation.html import as_png, data_uri
from medray.evaluation.image_metrics import Predicted
from medray.inference import DatasetImage
from medray.storage import ome_zarr
from medray.types import UInt8

_SHOWN = 12  # errors, the most confident ones


@dataclass(frozen=True)
class ConfidentError:
    """An image that was taken for another class, as the report shows it.

    Attributes:
        image: Its name.
        picture: Data URI.
        overlay: Data URI of what spoke for the class that it was taken for; None: not
            known.
        truth: Name of its class.
        predicted: Name of the class that it was taken for.
        confidence: Probability of that class.
    """

    image: str
    picture: str
    overlay: str | None
    truth: str
    predicted: str
    confidence: float


def confident_errors(
    rows: Sequence[Predicted],
    images: Iterable[DatasetImage],
    data: str,
    names: Sequence[str],
    model: str | None,
) -> list[ConfidentError]:
    """Return the most confident errors, with their pictures.

    Args:
        rows: All predictions.
        images: That they are of, or more.
        data: Dataset of the images.
        names: Of the classes.
        model: Folder of the one classifier; None of several: what spoke for a class is
            a question to one model.
    """
    wrong = [row for row in rows if row.truth != row.predicted]
    wrong.sort(key=lambda row: -row.probabilities[row.predicted])
    of_digest = {image.digest: image for image in images}
    shown = wrong[:_SHOWN]
    seen = [(read_pixels(of_digest[row.digest], data), row.predicted) for row in shown]
    drawn = overlays(model, seen) if model else [None] * len(seen)
    return [
        ConfidentError(
            image=row.name,
            picture=data_uri(as_png(pixels)),
            overlay=overlay,
            truth=names[row.truth],
            predicted=names[row.predicted],
            confidence=float(row.probabilities[row.predicted]),
        )
        for row, (pixels, _), overlay in zip(shown, seen, drawn, strict=True)
    ]


def read_pixels(image: DatasetImage, data: str) -> UInt8:
    """Return an image (H, W, 3), read from its sheet."""
    sheet = ome_zarr.open_level(slide_uri(data, image.sheet))
    pixels: UInt8 = np.moveaxis(sheet[(slice(None), *image.place.slices())], 0, 2)
    return pixels


def overlays(model: str, seen: Sequence[tuple[UInt8, int]]) -> list[str | None]:
    """Draw what spoke for the classes that images were taken for, as data URIs.

    Args:
        model: Folder of the classifier.
        seen: (S, S, 3) uint8 and the predicted label of each image.

    Returns:
        None for each where it is not known: without grad-cam, for an exported model,
        for one that takes measures too, for an encoder without a feature map.
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
