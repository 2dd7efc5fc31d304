"""OME-NGFF 0.5 metadata of an image or a label image.

Specification: https://ngff.openmicroscopy.org/0.5/
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from medray.classes import Classes, rgb_of

RGB = (("red", "#ff0000"), ("green", "#00ff00"), ("blue", "#0000ff"))
Kind = Literal["image", "labels"]


def _multiscales(levels: int, mpp: float | None, kind: Kind, name: str) -> Any:
    """Build `multiscales`: pixel size in micrometres, half-pixel shifts of levels."""
    unit = {} if mpp is None else {"unit": "micrometer"}
    space = [{"name": axis, "type": "space", **unit} for axis in "yx"]
    axes = [{"name": "c", "type": "channel"}, *space] if kind == "image" else space
    lead = [1.0] if kind == "image" else []
    pixel = mpp or 1.0
    datasets = []
    for level in range(levels):
        factor = 2**level
        shift = (factor - 1) / 2 * pixel
        datasets.append(
            {
                "path": str(level),
                "coordinateTransformations": [
                    {"type": "scale", "scale": [*lead, *[pixel * factor] * 2]},
                    {
                        "type": "translation",
                        "translation": [*[0.0] * len(lead), shift, shift],
                    },
                ],
            }
        )
    method = "mean of 2x2" if kind == "image" else "majority of 2x2"
    scales = {"name": name, "axes": axes, "datasets": datasets, "type": method}
    return [scales | {"metadata": {"method": "medray.storage.pyramid.halved"}}]


def _omero(
    name: str, channels: Sequence[tuple[str, str]], *, most: int = 255
) -> dict[str, Any]:
    """Build the rendering defaults: without them RGB is grey, and a mask black."""
    window = {"start": 0, "end": most, "min": 0, "max": 255}
    return {
        "name": name,
        "channels": [
            {
                "label": label,
                "color": color.removeprefix("#"),
                "active": True,
                "window": window,
            }
            for label, color in channels
        ],
        "rdefs": {"model": "color"},
    }


def _image_label(classes: Classes, source: str | None) -> dict[str, Any]:
    values = range(len(classes))
    rgba = [
        [*rgb_of(color), 0 if value == 0 else 160]
        for value, color in enumerate(classes.colors)
    ]
    label: dict[str, Any] = {
        "colors": [{"label-value": v, "rgba": rgba[v]} for v in values],
        "properties": [{"label-value": v, "class": classes.names[v]} for v in values],
    }
    return label | ({"source": {"image": source}} if source else {})


def image_metadata(
    levels: int,
    *,
    mpp: float | None,
    name: str,
    channels: Sequence[tuple[str, str]] = RGB,
) -> dict[str, Any]:
    """Return `ome` of an image: its levels and how to show it."""
    return {
        "version": "0.5",
        "multiscales": _multiscales(levels, mpp, "image", name),
        "omero": _omero(name, channels),
    }


def labels_metadata(
    levels: int,
    *,
    mpp: float | None,
    name: str,
    classes: Classes,
    source: str | None = None,
) -> dict[str, Any]:
    """Return `ome` of a label image: levels, and names and colours of its values."""
    return {
        "version": "0.5",
        "multiscales": _multiscales(levels, mpp, "labels", name),
        "omero": _omero(name, [(name, "#ffffff")], most=max(1, len(classes) - 1)),
        "image-label": _image_label(classes, source),
    }
