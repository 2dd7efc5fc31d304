"""A model and images -> overlays of what speaks for a class, and a page of them.

OUT/
explain.html         the gallery
explain.json         a row an image: class, probability, files, or why there is none
overlays/IMAGE.png   what speaks for the class (Grad-CAM)
overlays/IMAGE.attention.png   of a classifier with self-attention: where it looks
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import torch

from medray.datasets.given import as_given
from medray.datasets.image_folder import read_resized
from medray.errors import ConfigError, SlideError
from medray.evaluation.html import as_png, data_uri, render
from medray.models import explain as maps
from medray.models.config import ModelConfig, is_exported, model_digest, read_config
from medray.models.folder import load_model
from medray.models.network import Normalise
from medray.slides import open_slide
from medray.slides.discovery import SlideFile, find_slides
from medray.storage import files
from medray.training.probe_windows import fullest_window

UInt8 = npt.NDArray[np.uint8]
Row = dict[str, Any]


@dataclass(frozen=True)
class Explanation:
    """What was explained.

    Attributes:
        out: Folder of the overlays.
        report: The page to open.
        explained: Images.
        failed: Reason of each image that could not be, by its name.
    """

    out: str
    report: str
    explained: int
    failed: dict[str, str]


def explain(
    model: str,
    images: Sequence[str],
    *,
    out: str,
    name: str = "",
    mpp: float | str | None = None,
    scene: int | None = None,
    plane: int | None = None,
) -> Explanation:
    """Draw what in images speaks for a class, and write a page of it.

    Args:
        model: Folder of `medray train`.
        images: Files, globs, folders or addresses of images or slides.
        out: Folder to make.
        name: Of the class; "": the one predicted (of a segmenter the commonest after
            the background).
        mpp: Microns per pixel of level 0, over what the files say; or a CSV (slide,mpp)
            with those of some.
        scene: Which of several slides in a file, from 0 in the file's order.
        plane: Which of several focal planes, from 0.

    Raises:
        ConfigError: The request is wrong, grad-cam is missing, or the encoder has no
            feature map.
    """
    model, out = files.absolute(model), files.absolute(out)
    config = read_config(model)
    if name and name not in config.classes.names:
        raise ConfigError(
            f"--class: expected one of {list(config.classes.names)}, found {name!r}"
        )
    whole = config.classifies and config.mpp is None
    if whole and not (mpp is scene is plane is None):
        raise ConfigError(
            f"{model}: looks at whole images, whatever their resolution; leave --mpp, "
            f"--scene and --plane away"
        )
    explainer = Explainer(model)
    rows: list[Row] = []
    shown: list[Row] = []
    slides = as_given(find_slides(images), mpp=mpp, scene=scene, plane=plane)
    for slide in slides:
        row: Row = {"image": slide.slide}
        try:
            pixels = _read(slide, config)
            label = config.classes.names.index(name) if name else None
            found = explainer.explain(pixels, label)
            pictures = {"image": as_png(pixels), "overlay": as_png(found.overlay)}
            row["overlay"] = files.join("overlays", f"{slide.slide}.png")
            files.write_bytes(files.join(out, row["overlay"]), pictures["overlay"])
            if found.attention is not None:
                pictures["attention"] = as_png(found.attention)
                row["attention"] = f"overlays/{slide.slide}.attention.png"
                uri = files.join(out, row["attention"])
                files.write_bytes(uri, pictures["attention"])
            row |= {
                "class": config.classes.names[found.label],
                "predicted": config.classes.names[found.predicted],
                "share": found.share,
            }
            uris = {key: data_uri(picture) for key, picture in pictures.items()}
            shown.append(row | {"pictures": uris})
        except (SlideError, OSError) as error:
            row["error"] = str(error)
        rows.append(row)
    failed = {row["image"]: row["error"] for row in rows if "error" in row}
    digest = model_digest(model)
    page = render(
        "explain.html.jinja",
        title=f"Why a class: {model.rsplit('/', 1)[-1]}",
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        rows=shown,
        failed=failed,
        classifies=config.classifies,
        digest=digest,
    )
    report = files.join(out, "explain.html")
    files.write_bytes(report, page.encode())
    values = {"model_digest": digest, "images": rows}
    files.write_json(files.join(out, "explain.json"), values)
    return Explanation(out, report, len(shown), failed)


def _read(file: SlideFile, config: ModelConfig) -> UInt8:
    """Read what the model looks at: (S, S, 3) uint8.

    A classifier of images sees the whole, resized as ingest does; any other model a
    window at its resolution, the one with the most tissue.
    """
    if config.classifies and config.mpp is None:
        return read_resized({"uri": file.uri}, config.window.size)
    with open_slide(file.uri, scene=file.scene, plane=file.plane) as slide:
        return fullest_window(slide, config, file.mpp)


@dataclass(frozen=True)
class Explained:
    """What speaks for a class in one window.

    Attributes:
        label: Of the class.
        predicted: Label predicted; of a segmenter the commonest after the background.
        share: Probability of `label`; of a segmenter the share of pixels with it.
        overlay: (S, S, 3) uint8 RGB.
        attention: Likewise; None of a model without attention.
    """

    label: int
    predicted: int
    share: float
    overlay: UInt8
    attention: UInt8 | None


class Explainer:
    """A model that is asked why."""

    def __init__(self, model: str) -> None:
        """Load a model folder.

        Raises:
            ConfigError: It is exported, takes measures beside pixels, or grad-cam is
                missing.
        """
        maps.check_installed()
        if is_exported(model):
            raise ConfigError(
                f"{model}: comes from `medray export`, and has no gradients; give the "
                f"model folder that it was made from"
            )
        if read_config(model).morphology is not None:
            raise ConfigError(
                f"{model}: takes measures of contours beside the pixels, which images "
                f"alone have not; train with model.morphology=false"
            )
        self._model, self._config = load_model(model)
        self._normalise = Normalise(self._config)

    def explain(self, pixels: UInt8, label: int | None = None) -> Explained:
        """Explain a class, by default the predicted one.

        Args:
            pixels: (S, S, 3) uint8 RGB.
            label: Of the class.

        Raises:
            ConfigError: The encoder has no feature map.
            SlideError: A segmenter predicts the class nowhere.
        """
        batch = torch.from_numpy(pixels.copy())[None].permute(0, 3, 1, 2)
        inputs = self._normalise(batch).contiguous()
        with torch.inference_mode():
            logits = self._model(inputs)[0]
        if logits.ndim == 1:
            shares = torch.softmax(logits, dim=0)
            predicted = int(shares.argmax())
        else:
            counts = torch.bincount(logits.argmax(0).ravel(), minlength=len(logits))
            shares = counts / counts.sum()
            predicted = int(counts[1:].argmax()) + 1 if counts[1:].any() else 0
        label = predicted if label is None else label
        if logits.ndim > 1 and not shares[label]:
            raise SlideError(
                f"no pixel is predicted as {self._config.classes.names[label]}, so "
                f"nothing speaks for it; most are "
                f"{self._config.classes.names[int(shares.argmax())]}"
            )
        attention = maps.attention_map(self._model, inputs)
        return Explained(
            label,
            predicted,
            float(shares[label]),
            overlay(pixels, maps.grad_cam(self._model, inputs, label)),
            None if attention is None else overlay(pixels, attention),
        )


def overlay(pixels: UInt8, heat: npt.NDArray[np.float32]) -> UInt8:
    """Lay a map over an image.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        heat: (H, W), 0 to 1: from dark blue to red.
    """
    colours = matplotlib.colormaps["turbo"](heat)[..., :3] * 255
    mixed: UInt8 = np.rint(0.55 * pixels + 0.45 * colours).astype(np.uint8)
    return mixed
