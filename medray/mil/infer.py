"""Classify slides by their features: class probabilities and attention maps.

RUN/
predictions.yaml            settings of the run (Predictions)
slides.parquet              one row per slide: status, label, p_CLASS, digests
attention/SLIDE.parquet     y, x (level 0) and attention of each tile; sums to 1
heatmaps/SLIDE.png          the same over the slide's thumbnail
seen.csv                    slides that trained and chose the model
"""

from __future__ import annotations

import datetime
import io
import logging
import time
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from medray.errors import ConfigError, FormatError
from medray.evaluation import as_png
from medray.execution import Progress, Summary
from medray.mil.config import read_slide_model, slide_model_digest
from medray.mil.features import SlideFeatures, read_features, read_slide, thumbnail_uri
from medray.storage import files, from_dict, keep_settings, locked, read_yaml, to_dict
from medray.types import Row, UInt8

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Settings of a run over features; stored as `predictions.yaml`.

    Attributes:
        features: Folder of the features.
        model: Folder of the model.
        model_digest: Digest of the model's weights and configuration.
        encoder_digest: Digest of the encoder, the same for features and model.
        classes: Names of the classes.
    """

    features: str
    model: str
    model_digest: str
    encoder_digest: str
    classes: tuple[str, ...]

    def decisive(self) -> dict[str, Any]:
        """Return what determines the predictions, as plain values."""
        return to_dict(self) | {"model": None, "features": None}


def read_predictions(run: str) -> Predictions:
    """Read the settings of a run over features."""
    uri = predictions_uri(run)
    return from_dict(Predictions, read_yaml(uri), uri)


def predictions_uri(run: str) -> str:
    """Return the address of the settings of a run over features."""
    return files.join(run, "predictions.yaml")


def heatmap_uri(run: str, slide: str) -> str:
    """Return the address of a slide's attention as a picture."""
    return files.join(run, "heatmaps", f"{slide}.png")


def attention_uri(run: str, slide: str) -> str:
    """Return the address of a slide's attention by tile."""
    return files.join(run, "attention", f"{slide}.parquet")


def infer_slides(features: str, *, model: str, out: str) -> Summary:
    """Classify slides by their features.

    Args:
        features: Folder that `medray embed` wrote.
        model: Folder of a model of whole slides.
        out: Folder of the run; created if needed. Running again classifies all slides
            again.

    Raises:
        ConfigError: Features and model have different encoders, OUT holds another
            run, or another process works there.
    """
    features, model, out = (files.absolute(p) for p in (features, model, out))
    slide_model = read_slide_model(model)
    settings, rows = read_features(features)
    if settings.encoder != slide_model.encoder:
        ours, theirs = to_dict(settings.encoder), to_dict(slide_model.encoder)
        apart = ", ".join(
            f"{key}: {ours[key]} here, {theirs[key]} in the model"
            for key in ours
            if ours[key] != theirs[key]
        )
        raise ConfigError(
            f"{features}: these features are not those that {model} was trained with "
            f"({apart}); embed the slides as the model wants them"
        )
    what = Predictions(
        features=features,
        model=model,
        model_digest=slide_model_digest(model),
        encoder_digest=slide_model.encoder.digest(),
        classes=slide_model.classes,
    )
    with locked(out, "infer") as check:
        keep_settings(predictions_uri(out), what)
        seen = files.read_bytes(files.join(model, "slides.csv"))
        files.write_bytes(files.join(out, "seen.csv"), seen)
        return _infer(rows, what, out, check)


def _infer(rows: dict[str, Row], what: Predictions, out: str, check: Any) -> Summary:
    from medray.mil.network import SlideClassifier

    start = time.perf_counter()
    classifier = SlideClassifier(what.model)
    done, failed = [], {}
    with Progress("infer", len(rows)) as progress:
        for slide, row in sorted(rows.items()):
            check()
            try:
                found = _classify(row, classifier, what, out)
                progress.slide(slide, f"done {found['label']}")
            except (FormatError, _NothingError) as error:
                failed[slide] = f"{error}"
                found = {"status": "failed", "message": f"{error}", "label": None}
                progress.slide(slide, f"failed: {error}")
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            kept = {name: row.get(name) for name in ("slide", "uri", "digest", "mpp")}
            nothing = {f"p_{name}": None for name in what.classes} | {"tiles": None}
            done.append(kept | nothing | found | {"finished_at": now})
    files.write_table(files.join(out, "slides.parquet"), pa.Table.from_pylist(done))
    count = len(rows) - len(failed)
    return Summary(out, count, 0, failed, 0, time.perf_counter() - start)


class _NothingError(Exception):
    """No slide can be classified."""


def _classify(row: Row, classifier: Any, what: Predictions, out: str) -> Row:
    slide = row["slide"]
    if row["status"] != "done":
        raise _NothingError(f"has no features: {row['message']}")
    if not row["tiles"]:
        raise _NothingError(f"{row['uri']}: no tissue, so no tile to classify")
    bag = read_slide(what.features, slide)
    probabilities, attention = classifier.predict(bag.features)
    table = {"y": bag.coords[:, 0], "x": bag.coords[:, 1], "attention": attention}
    files.write_table(attention_uri(out, slide), pa.table(table))
    if classifier.model.head.name == "attention":
        picture = files.read_bytes(thumbnail_uri(what.features, slide))
        drawn = draw_heatmap(
            np.asarray(Image.open(io.BytesIO(picture))), bag, attention
        )
        files.write_bytes(heatmap_uri(out, slide), as_png(drawn))
    return {
        "status": "done",
        "message": "",
        "label": what.classes[int(probabilities.argmax())],
        "tiles": len(attention),
    } | {
        f"p_{name}": float(share)
        for name, share in zip(what.classes, probabilities, strict=True)
    }


def draw_heatmap(
    thumbnail: UInt8, bag: SlideFeatures, attention: npt.NDArray[np.float32]
) -> UInt8:
    """Draw attention over a slide, from dark (least) to light (most), by rank.

    Args:
        thumbnail: (h, w, 3) uint8 RGB of the slide.
        bag: Features and coordinates of its tiles.
        attention: (N,), one value per tile.

    Returns:
        (h, w, 3) uint8.
    """
    height, width = thumbnail.shape[:2]
    down = bag.attributes["level0_height"] / height
    across = bag.attributes["level0_width"] / width
    side = bag.attributes["level0_tile"]
    # Ranks: a few tiles hold most of the attention, and all others would look alike.
    rank = np.searchsorted(np.sort(attention), attention, side="right") / len(attention)
    colors = matplotlib.colormaps["inferno"](rank)[:, :3] * 255
    drawn = thumbnail.astype(np.float32)
    for (y, x), color in zip(bag.coords, colors, strict=True):
        rows = slice(round(y / down), max(round((y + side) / down), 1))
        columns = slice(round(x / across), max(round((x + side) / across), 1))
        drawn[rows, columns] = 0.45 * thumbnail[rows, columns] + 0.55 * color
    return drawn.round().astype(np.uint8)
