"""A run: one inference of one model over slides; its folder and its settings.

RUN/
run.yaml                    what decides the bytes of its masks (RunSettings)
slides.parquet              a row a slide: status, digests, timings
masks/SLIDE.ome.zarr        class of every pixel
masks/SLIDE.probabilities.ome.zarr   on request
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from medray.classes import Classes
from medray.errors import ConfigError
from medray.grid import Windows
from medray.settings import from_dict, read_yaml, to_dict, write_settings
from medray.store import files, omezarr


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What decides the bytes of a run's masks; stored as `run.yaml`.

    Attributes:
        model: Folder of the model (absolute, or an address).
        model_digest: Digest of its weights and configuration.
        classes: Names by label value.
        windows: Size and stride of the model's input, pixels.
        model_mpp: Microns per pixel that the model works at; None: level 0 as it is.
        mpp: Microns per pixel of slides whose files do not say; None: not given.
        precision: Of the model's arithmetic, as asked for: auto, float32, ...
        probabilities: Store them too, as (class, y, x) uint8.
        everywhere: Predict glass as well as tissue.
        region: Side of a region in pixels.
        versions: Of the packages that decide the result.
    """

    model: str
    model_digest: str
    classes: Classes
    windows: Windows
    model_mpp: float | None
    mpp: float | None = None
    precision: str = "auto"
    probabilities: bool = False
    everywhere: bool = False
    region: int = omezarr.REGION
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the size of a region."""
        if self.region < omezarr.PATCH or self.region % omezarr.PATCH:
            raise ConfigError(
                f"region must be a multiple of {omezarr.PATCH}, found {self.region}"
            )

    def digest(self) -> str:
        """Name the run: equal digests give equal masks."""
        decisive = to_dict(self) | {"model": None}
        text = json.dumps(decisive, sort_keys=True)
        return f"blake2b:{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"


def open_run(out: str, settings: RunSettings) -> None:
    """Make the run's folder, or check that it is a run of the same digest."""
    uri = files.join(out, "run.yaml")
    if not files.exists(uri):
        write_settings(uri, settings)
        return
    before = from_dict(RunSettings, read_yaml(uri), uri)
    if before.digest() == settings.digest():
        return
    old, new = to_dict(before), to_dict(settings)
    changed = ", ".join(
        f"{key}: {old[key]} -> {new[key]}" for key in old if old[key] != new[key]
    )
    raise ConfigError(
        f"{out}: holds a run with other settings ({changed}); choose another --out, "
        f"or delete this run"
    )


def read_run(out: str) -> RunSettings:
    """Read the settings of a run.

    Raises:
        ConfigError: There is no run.
    """
    uri = files.join(out, "run.yaml")
    if not files.exists(uri):
        raise ConfigError(
            f"{out}: expected a run with a run.yaml; `medray infer` writes one"
        )
    return from_dict(RunSettings, read_yaml(uri), uri)


def mask_uri(out: str, slide: str) -> str:
    """Give the place of a slide's mask in a run."""
    return files.join(out, "masks", f"{slide}.ome.zarr")


def create_mask(
    slide: str, digest: str, facts: dict[str, Any], settings: RunSettings, out: str
) -> None:
    """Make the empty mask, unless it is there for this very slide and run.

    A plan task may be repeated while regions are already being written, so a mask
    with the right attributes is never touched.
    """
    provenance = {
        "kind": "mask",
        "slide": slide,
        "slide_digest": digest,
        "run_digest": settings.digest(),
        "model_digest": settings.model_digest,
        "mpp": facts["mpp"],
        "level": facts["level"],
        "downsample": facts["downsample"],
        "settings": to_dict(settings) | {"model": settings.model.rsplit("/", 1)[-1]},
    }
    size = (facts["height"], facts["width"])
    common: Any = {"mpp": facts["mpp"], "name": slide, "attributes": provenance}
    common |= {"region": settings.region}
    mask, probabilities = mask_uri(out, slide), probabilities_uri(out, slide)
    if omezarr.read_attributes(mask) != provenance:
        omezarr.create_labels(mask, *size, classes=settings.classes, **common)
    if settings.probabilities and omezarr.read_attributes(probabilities) != provenance:
        classes = settings.classes
        channels = list(zip(classes.names, classes.colors, strict=True))
        omezarr.create_image(
            probabilities, *size, channels=channels, fill_value=0, **common
        )


def probabilities_uri(out: str, slide: str) -> str:
    """Give the place of a slide's class probabilities in a run."""
    return files.join(out, "masks", f"{slide}.probabilities.ome.zarr")
