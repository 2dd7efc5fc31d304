"""A run: one inference of models over slides; its folder and its settings.

RUN/
run.yaml                    what decides the bytes of its masks (RunSettings)
slides.parquet              one row per slide: status, digests, timings
seen.txt                    digests of the slides that trained or chose the models
masks/SLIDE.ome.zarr        class of each pixel
    labels/LAYER            on request: uncertainty, disagreement, unreadable
masks/SLIDE.probabilities.ome.zarr   on request
raw/SLIDE.ome.zarr          masks that are not cleaned yet
outlines/SLIDE.geojson      on request
commits/SLIDE.json          records of its regions, and the digest of each of its files
plan.json                   what `medray plan --out RUN` expected
coarse/                     the run of the first pass, if there is one
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from medray.classes import Classes
from medray.errors import ConfigError, check_positive
from medray.geometry import Windows
from medray.inference.postprocess import Cleaning
from medray.models import Prediction
from medray.slides import Working
from medray.storage import (
    files,
    keep_settings,
    named_digest,
    ome_zarr,
    read_folder_settings,
    to_dict,
)

LAYERS = {
    "uncertainty": Classes(("certain", "uncertain")),
    "disagreement": Classes(("agreed", "disagreed")),
    "unreadable": Classes(("readable", "unreadable")),
}
"""Quality layers of a mask, and the meaning of their values (uncertainty: 0..255)."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which pixels are predicted, and how they are read.

    Attributes:
        prediction: How windows become classes.
        mpp: Microns per pixel of level 0, instead of the files', or CSV (slide,mpp).
            The CSV has those of some slides. None: as the files say.
        scene: Which of several slides in a file, from 0. None: by the format's rules.
        plane: Which of several focal planes, from 0. None: the one in focus, or the
            first.
        everywhere: Predict glass too, not only tissue.
        within: Folder of annotations: predict only inside their areas. They are named
            like the slides; slides that have none are left out. None: everywhere.
        coarse: Look first K times coarser, then only where that found something. That
            is: where it found a class other than 0. 1, 2, 4 or 8; 1: no first pass.
        outlines: Write the objects of the masks as GeoJSON for QuPath too.
        clean: How masks are cleaned.
        region: Side of a region, pixels, a multiple of 512 (0: fits the model).
        timeout: Timeout of reading or writing a region, seconds. A process that takes
            longer is taken to hang and ended; decides nothing about masks.
    """

    prediction: Prediction = field(default_factory=Prediction)
    mpp: float | str | None = None
    scene: int | None = None
    plane: int | None = None
    everywhere: bool = False
    within: str | None = None
    coarse: int = 1
    outlines: bool = False
    clean: Cleaning = field(default_factory=Cleaning)
    region: int = 0
    timeout: float = 300.0

    RENAMED: ClassVar[dict[str, str]] = {"patience": "timeout"}

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.region < 0 or self.region % ome_zarr.PATCH:
            raise ConfigError(
                f"region must be a multiple of {ome_zarr.PATCH}, found {self.region}"
            )
        if self.coarse not in (1, 2, 4, 8):
            raise ConfigError(f"coarse must be 1, 2, 4 or 8, found {self.coarse}")
        check_positive(timeout=self.timeout)
        if self.coarse > 1 and self.within:
            raise ConfigError("coarse and within cannot be combined; choose one")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Everything that determines the bytes of a run's masks; stored as `run.yaml`.

    Attributes:
        models: Folders of the models (absolute, or addresses).
        model_digest: Digest of their weights and configurations.
        classes: Names by label value.
        windows: Size and stride of the models' input, pixels.
        model_mpp: Microns per pixel at which to predict; None: level 0 as it is.
        options: Options of the request.
        versions: Versions of the packages that determine the result.
    """

    models: tuple[str, ...]
    model_digest: str
    classes: Classes
    windows: Windows
    model_mpp: float | None
    options: Options = field(default_factory=Options)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> str:
        """Names of the models."""
        return ", ".join(model.rsplit("/", 1)[-1] for model in self.models)

    @property
    def layers(self) -> tuple[str, ...]:
        """The quality layers that each mask has."""
        return tuple(LAYERS) if self.options.prediction.quality else ()

    def decisive(self) -> dict[str, Any]:
        """Return what determines the masks, as plain values."""
        values = to_dict(self) | {"models": None}
        options = values["options"]
        # What is said of single slides is part of their digests.
        del options["scene"], options["plane"]
        # `patience` is what the timeout was called when digests of runs began.
        del options["timeout"]
        options |= {"patience": None, "mpp": None}
        # Runs were not compiled when their digests began.
        if options["prediction"]["compile"] != "on":
            del options["prediction"]["compile"]
        return values

    def digest(self) -> str:
        """Name the run: equal digests give equal masks."""
        text = json.dumps(self.decisive(), sort_keys=True)
        return named_digest(text.encode())


def open_run(out: str, settings: RunSettings) -> None:
    """Create the run's folder, or check that it holds a run of the same settings."""
    keep_settings(files.join(out, "run.yaml"), settings)


def read_run(out: str) -> RunSettings:
    """Read the settings of a run.

    Raises:
        ConfigError: There is no run.
    """
    expected = ("a run", "medray infer")
    return read_folder_settings(RunSettings, out, "run.yaml", expected)


def against_plan(out: str, rows: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Compare what `medray plan` expected of a run with what it took.

    Args:
        out: Folder of the run.
        rows: Rows of its slides.parquet.

    Returns:
        One sentence per subject; empty if nothing was planned or done.
    """
    uri = files.join(out, "plan.json")
    done = [row for row in rows if row["status"] == "done" and row["windows"]]
    if not done or not files.exists(uri):
        return {}
    plan = files.read_json(uri)
    first = min(row["first_read_at"] for row in done)
    last = max(row["committed_at"] for row in done)
    least, most = plan["seconds"]
    windows = sum(row["windows"] for row in done)
    return {
        "windows": f"{windows}, planned {plan['windows']}",
        "seconds": f"{last - first:.0f}, planned {least:.0f} to {most:.0f}",
    }


def mask_uri(out: str, slide: str) -> str:
    """Return the address of a slide's mask in a run."""
    return files.join(out, "masks", f"{slide}.ome.zarr")


def layer_uri(out: str, slide: str, layer: str) -> str:
    """Return the address of a quality layer of a slide's mask."""
    return files.join(mask_uri(out, slide), "labels", layer)


def probabilities_uri(out: str, slide: str) -> str:
    """Return the address of a slide's class probabilities in a run."""
    return files.join(out, "masks", f"{slide}.probabilities.ome.zarr")


def raw_uri(out: str, slide: str) -> str:
    """Return the address of a slide's mask before it is cleaned."""
    return files.join(out, "raw", f"{slide}.ome.zarr")


def outlines_uri(out: str, slide: str) -> str:
    """Return the address of a slide's outlines in a run."""
    return files.join(out, "outlines", f"{slide}.geojson")


def record_uri(out: str, slide: str) -> str:
    """Return the address of the record of a finished slide."""
    return files.join(out, "commits", f"{slide}.json")


def groups_of(settings: RunSettings, out: str, slide: str) -> list[str]:
    """Return the sealed OME-Zarrs of a slide; quality layers lie within the mask's."""
    probabilities = settings.options.prediction.probabilities
    mask = mask_uri(out, slide)
    return [mask, probabilities_uri(out, slide)] if probabilities else [mask]


def stores_of(settings: RunSettings, out: str, slide: str) -> list[str]:
    """Return all OME-Zarrs that a slide can have in a run."""
    layers = [layer_uri(out, slide, layer) for layer in settings.layers]
    return groups_of(settings, out, slide) + layers


def create_mask(
    slide: str, digest: str, working: Working, settings: RunSettings, out: str
) -> None:
    """Create the empty mask, unless it exists for the same slide and run.

    A plan may be repeated while regions are being written, so a mask with the same
    attributes is kept.
    """
    provenance = {
        "kind": "mask",
        "slide": slide,
        "slide_digest": digest,
        "run_digest": settings.digest(),
        "model_digest": settings.model_digest,
        "mpp": working.mpp,
        "level": working.level,
        "downsample": working.downsample,
        "settings": settings.decisive() | {"models": settings.names},
    }
    size = (working.height, working.width)
    common: Any = {"mpp": working.mpp, "attributes": provenance}
    common |= {"region": settings.options.region}
    mask, classes = mask_uri(out, slide), settings.classes
    if settings.options.clean:
        raw = raw_uri(out, slide)
        ome_zarr.create_labels(raw, *size, classes=classes, name=slide, **common)
    ome_zarr.create_labels(mask, *size, classes=classes, name=slide, **common)
    if settings.options.prediction.probabilities:
        uri = probabilities_uri(out, slide)
        channels = list(zip(classes.names, classes.colors, strict=True))
        ome_zarr.create_image(
            uri, *size, channels=channels, fill_value=0, name=slide, **common
        )
    if settings.layers:
        ome_zarr.list_labels(mask, settings.layers)
    for layer in settings.layers:
        uri, means = layer_uri(out, slide, layer), LAYERS[layer]
        ome_zarr.create_labels(
            uri, *size, classes=means, name=layer, source="../../", **common
        )
