"""A model that answers for one image at a time: what `medray serve` serves.

The path of an image, top to bottom:

    read     check its size by the header, then read its pixels as `medray infer` does
    predict  windows, or whole images, of several requests share the model's batches
    finish   return a class with probabilities, or a mask as PNG or GeoJSON

The code is that of `medray infer` and `medray evaluate`, so the answers are the same.
Nothing here uses Ray or HTTP: any thread may read and finish, one thread predicts.

One file, because reading, predicting and finishing share the settings of one model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from medray.apps.serve.images import as_png, check_header, check_pixels
from medray.datasets import read_resized
from medray.errors import CompileError, ConfigError, SlideError
from medray.evaluation import scaled
from medray.geometry import Rectangle
from medray.inference import (
    Blocks,
    Options,
    RunSettings,
    SlideFacts,
    as_geojson,
    counted,
    load_classifier,
    plan_slide,
    read_pixels,
    region_pixels,
    settings_of,
    trace,
)
from medray.models import (
    Compile,
    ModelConfig,
    Precision,
    Prediction,
    Predictor,
    RegionClasses,
    RegionPixels,
    load_model,
    read_config,
)
from medray.slides import open_slide
from medray.storage import files
from medray.types import Row, UInt8

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]
Format = Literal["png", "geojson"]
Kind = Literal["classify", "segment"]


@dataclass(frozen=True)
class PreparedRegion:
    """A region of an image.

    Attributes:
        region: Its position, pixels at the model's resolution.
        blocks: (rows, columns) bool, which of its blocks are predicted.
        source: Input of the model; None where there is no tissue.
    """

    region: Rectangle
    blocks: Blocks
    source: RegionPixels | None


@dataclass(frozen=True)
class Prepared:
    """An image, ready for the model.

    Attributes:
        height: Height of the image (level 0), pixels.
        width: Width of the image (level 0), pixels.
        mpp: Microns per pixel of the image; None: unknown and not needed.
        mpp_from: Source of `mpp`: `image`, `request` or `unknown`.
        note: Remark for the user on how it was read, or "".
        pixels: (S, S, 3) uint8, for a classifier of whole images; else None.
        facts: Facts of the plan, for any other model; else None.
        regions: Regions of the plan.
    """

    height: int
    width: int
    mpp: float | None
    mpp_from: str
    note: str
    pixels: UInt8 | None = None
    facts: SlideFacts | None = None
    regions: Sequence[PreparedRegion] = ()


@dataclass(frozen=True)
class Answer:
    """The answer to a request.

    Attributes:
        body: Bytes of the answer.
        media_type: Content type.
        headers: Additional HTTP headers.
        pixels: Number of pixels of the image.
    """

    body: bytes
    media_type: str
    headers: dict[str, str]
    pixels: int


class Served:
    """A model, loaded once."""

    def __init__(
        self,
        model: str,
        *,
        report: str = "",
        precision: Precision = "auto",
        compile: Compile = "auto",
        max_pixels: int = 64_000_000,
        threads: int | None = None,
    ) -> None:
        """Load a model folder.

        Args:
            model: Folder from `medray train` or `medray export`.
            report: Report of `medray evaluate` of this classifier, for its
                temperature; "": probabilities are not calibrated.
            precision: Precision of the arithmetic; classifiers of whole images use
                float32.
            compile: Compile the network for the device; auto: for a GPU. Classifiers of
                whole images are not compiled.
            max_pixels: Most pixels of an image, as sent and at the model's resolution.
            threads: Threads that predict on a CPU; by default one per core.

        Raises:
            ConfigError: The folder is not a model, the model needs more than pixels, or
                the report is of another model.
            FormatError: The weights are damaged.
            CompileError: The network cannot be compiled, although this was requested
                (`on`); with `auto` it is then run without.
        """
        self._settings, self._config = _read_config(model, precision, compile)
        self._max = max_pixels
        self._whole = self._config.classifies and self._config.mpp is None
        self.temperature = _temperature(report, self._settings) if report else None
        if self._whole:
            self._classify = load_classifier(model)
        else:
            how = self._settings.options.prediction
            try:
                self._predictor = Predictor.from_folders([model], how, threads=threads)
            except CompileError as error:
                if compile != "auto":
                    raise
                log.warning("%s; it is served not compiled", error)
                how = replace(how, compile="off")
                self._predictor = Predictor.from_folders([model], how, threads=threads)
            self._predictor.warm_up()

    @property
    def kind(self) -> Kind:
        """Endpoints that it supports."""
        return "classify" if self._config.classifies else "segment"

    def describe(self) -> Row:
        """Describe the model, as plain values."""
        config, settings = self._config, self._settings
        return {
            "name": settings.names,
            "digest": settings.model_digest,
            "architecture": config.architecture.name,
            "encoder": config.architecture.encoder,
            "endpoint": f"/{self.kind}",
            "classes": list(config.classes.names),
            "mpp": config.mpp,
            "window": config.window.size,
            "stride": config.window.stride,
            "temperature": self.temperature,
        }

    # --- read -------------------------------------------------------------------------

    def read(self, path: str, mpp: float | None = None) -> Prepared:
        """Read an image; one with too many pixels is refused before it is decoded.

        Args:
            path: A file with a suffix of `SUFFIXES`.
            mpp: Microns per pixel, instead of the image's own.

        Raises:
            TooLargeError: It has more pixels than the limit.
            SlideError: It is not an image, is damaged, or does not suit the model.
        """
        check_header(path, self._max)
        if self._whole:
            return self._read_whole(path, mpp)
        settings = self._settings
        with open_slide(path) as slide:
            level = slide.levels[0]
            check_pixels(level.height, level.width, self._max)
            if self._config.mpp and not (mpp or slide.mpp):
                raise SlideError(
                    f"{path}: does not say how many microns a pixel has, and the model "
                    f"works at {self._config.mpp:g}; give ?mpp="
                )
            facts, planned = plan_slide(slide, settings, given_mpp=mpp)
            working = facts.working
            check_pixels(working.height, working.width, self._max)
            regions = []
            for one in planned:
                seen, pixels = read_pixels(slide, facts, one.region, one.part, settings)
                if seen.damaged:
                    raise SlideError(seen.why)
                source = None
                if seen.blocks.any():
                    source = region_pixels(settings, working, one.region, seen, pixels)
                regions.append(PreparedRegion(one.region, seen.blocks, source))
        return Prepared(
            level.height,
            level.width,
            *_resolution(slide.mpp, mpp),
            working.note.replace("--mpp ", "?mpp="),
            facts=facts,
            regions=regions,
        )

    def _read_whole(self, path: str, mpp: float | None) -> Prepared:
        with open_slide(path) as slide:
            level, found = slide.levels[0], slide.mpp
        check_pixels(level.height, level.width, self._max)
        side = self._config.window.size
        pixels = read_resized(path, side)
        note = ""
        if (level.height, level.width) != (side, side):
            note = f"resized from {level.height} x {level.width} to {side} x {side}"
        resolution = _resolution(found, mpp)
        return Prepared(level.height, level.width, *resolution, note, pixels)

    # --- predict ----------------------------------------------------------------------

    def predict(self, images: Sequence[Prepared]) -> list[Any]:
        """Run the model over images of several requests.

        Returns:
            One input of `finish` per image: logits (C,) of a whole image, else the
            result of each region.
        """
        if self._whole:
            pixels = [image.pixels for image in images if image.pixels is not None]
            return list(self._classify(np.stack(pixels), None))
        regions = [one for image in images for one in image.regions]
        done = self._predictor.predict([r.source for r in regions if r.source])
        return [
            [next(done) if one.source else None for one in image.regions]
            for image in images
        ]

    # --- finish -----------------------------------------------------------------------

    def finish(self, image: Prepared, found: Any, form: Format = "png") -> Answer:
        """Return the answer for a model's output.

        Raises:
            SlideError: The output has NaN or infinity.
        """
        if self.kind == "segment":
            return self._mask(image, found, form)
        if self._whole:
            _check_finite(bool(np.isfinite(found).all()))
            shares = scaled(found[None], self.temperature or 1.0)[0]
            label = int(found.argmax())
        else:
            label, shares = self._shares(found)
        names = self._config.classes.names
        values = {
            "class": names[label],
            "label": label,
            "probabilities": dict(zip(names, shares.tolist(), strict=True)),
            "temperature": self.temperature,
            "height": image.height,
            "width": image.width,
            "mpp": image.mpp,
            "mpp_from": image.mpp_from,
            "note": image.note,
            "model_digest": self._settings.model_digest,
        }
        body = json.dumps(values).encode()
        return Answer(body, "application/json", {}, image.height * image.width)

    def _shares(self, found: Sequence[RegionClasses | None]) -> tuple[int, Floats]:
        """Return most frequent class and mean probabilities, as in slides.parquet."""
        counts = np.zeros(len(self._config.classes), np.int64)
        sums = np.zeros(len(self._config.classes), np.float64)
        for one in found:
            if one is None or one.probabilities is None:
                raise RuntimeError("a classifier predicts everywhere")
            _check_finite(one.finite)
            counts += np.bincount(one.labels.ravel(), minlength=len(counts))
            sums += one.probabilities.sum(axis=(1, 2), dtype=np.int64)
        return int(counts.argmax()), sums / sums.sum()

    def _mask(
        self, image: Prepared, found: Sequence[RegionClasses | None], form: Format
    ) -> Answer:
        assert image.facts is not None
        working, classes = image.facts.working, self._config.classes
        labels = np.zeros((working.height, working.width), np.uint8)
        for part, one in zip(image.regions, found, strict=True):
            if one is None:
                continue
            _check_finite(one.finite)
            inside = counted(image.facts, part.region, part.blocks)
            labels[part.region.slices()] = one.labels * inside
        headers = {
            "medray-model": self._settings.model_digest,
            "medray-mpp": "unknown" if image.mpp is None else f"{image.mpp:.6g}",
            "medray-mpp-from": image.mpp_from,
            "medray-note": image.note.encode("ascii", "replace").decode(),
        }
        if form == "geojson":
            areas = trace(labels, classes, downsample=working.downsample)
            body, media_type = as_geojson(areas, classes), "application/geo+json"
        else:
            body, media_type = as_png(labels, image.height, image.width), "image/png"
        return Answer(body, media_type, headers, image.height * image.width)


def _resolution(found: float | None, given: float | None) -> tuple[float | None, str]:
    """Return an image's microns per pixel, and the source of the value."""
    if given:
        return given, "request"
    return found, "image" if found else "unknown"


def _check_finite(finite: bool) -> None:
    if not finite:
        raise SlideError(
            "the model gives NaN or infinity; serve it with --precision float32, or "
            "look at what is special in the image"
        )


def check_model(
    model: str, report: str, precision: Precision, compile: Compile = "auto"
) -> Kind:
    """Check that a model can be served, without a device; return its endpoints.

    Raises:
        ConfigError: As for `Served`.
        FormatError: As for `Served`.
    """
    settings, config = _read_config(model, precision, compile)
    if report:
        _temperature(report, settings)
    load_model(model)
    return "classify" if config.classifies else "segment"


def _read_config(
    model: str, precision: Precision, compile: Compile
) -> tuple[RunSettings, ModelConfig]:
    config = read_config(model)
    if compile == "on" and config.classifies and config.mpp is None:
        raise ConfigError(
            f"compile: {model} is a classifier of whole images, which is not compiled: "
            f"its answers are those of `medray evaluate`; leave --compile out"
        )
    # A classifier also classifies glass; probabilities show how sure it is.
    prediction = Prediction(
        precision=precision, compile=compile, probabilities=config.classifies
    )
    options = Options(prediction=prediction, everywhere=config.classifies)
    return settings_of([model], options), config


def _temperature(report: str, settings: RunSettings) -> float:
    """Read the temperature of a report.

    Raises:
        ConfigError: There is no report, it is of another model, or has no temperature.
    """
    uri = files.join(report, "metrics.json")
    if not files.exists(uri):
        raise ConfigError(
            f"{report}: expected a report with metrics.json; `medray evaluate MODEL` "
            f"of a classifier writes one"
        )
    metrics = files.read_json(uri)
    found, digest = metrics.get("model_digest"), settings.model_digest
    if found != digest:
        raise ConfigError(
            f"{report}: is of the model {found}, this one is {digest}; give the report "
            f"of `medray evaluate` of this model"
        )
    calibration = metrics.get("calibration") or {}
    if "temperature" not in calibration:
        why = calibration.get("why", "only classifiers of whole images have one")
        raise ConfigError(f"{report}: has no temperature: {why}; leave the report out")
    return float(calibration["temperature"])
