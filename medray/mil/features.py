"""A folder of features: its layout and settings, reading and writing it.

FEATURES/
features.yaml               what determines the features (FeatureSettings)
slides.parquet              one row per slide: status, tiles, digests, timings
features/SLIDE.zarr         zarr v3: `features` (tiles, dimensions), `coords` (tiles, 2)
thumbnails/SLIDE.jpg        the slide, at most 1024 px
parts/SLIDE/INDEX.safetensors    finished regions of unfinished slides
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from medray.errors import ConfigError, FormatError, check_positive
from medray.execution import PlannedSlide
from medray.inference import SlideFacts
from medray.models import Compile, Precision
from medray.storage import (
    files,
    from_dict,
    named_digest,
    read_arrays,
    read_yaml,
    to_dict,
)

Features = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A frozen timm network that maps a tile to a vector.

    Attributes:
        name: timm's name of it.
        arguments: Keyword arguments of timm.create_model.
        weights_digest: Digest of the weights file.
        dimensions: Length of a vector.
        tile: Side of a tile in pixels at `mpp`, the network's input.
        mpp: Microns per pixel of the tiles.
        mean: RGB mean subtracted from pixels scaled to 0..1.
        std: RGB standard deviation they are then divided by.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    weights_digest: str
    dimensions: int
    tile: int
    mpp: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_positive(mpp=self.mpp)

    def digest(self) -> str:
        """Return the encoder's digest: features of equal digests may be mixed."""
        text = json.dumps(to_dict(self), sort_keys=True)
        return named_digest(text.encode())


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """Everything that determines a folder of features; stored as `features.yaml`.

    Attributes:
        encoder: The network that maps a tile to a vector.
        weights: File of its weights (absolute path, or an address).
        tissue: Least share of tissue in a tile, 0 to 1.
        precision: Precision of the encoder's arithmetic.
        compile: Whether it is compiled for the device.
        region: Side of a region, tiles.
        timeout: Timeout for reading or writing a region, seconds. Does not change the
            result.
        versions: Versions of the packages that determine the result.
    """

    encoder: Encoder
    weights: str
    tissue: float
    precision: Precision
    region: int
    compile: Compile = "off"
    timeout: float = 300.0
    versions: dict[str, str] = field(default_factory=dict)

    RENAMED: ClassVar[dict[str, str]] = {"patience": "timeout"}

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 <= self.tissue <= 1:
            raise ConfigError(f"tissue lies in 0..1, found {self.tissue}")
        if self.region < 1:
            raise ConfigError(f"region: expected 1 tile or more, found {self.region}")

    @property
    def dtype(self) -> np.dtype[Any]:
        """Data type of stored features: float16, the precision that encoders have."""
        name = "float32" if self.precision == "float32" else "float16"
        return np.dtype(name)

    def decisive(self) -> dict[str, Any]:
        """Return what determines the features, as plain values."""
        values = to_dict(self) | {"weights": None, "patience": None}
        del values["timeout"]
        # Encoders were not compiled when features began.
        if self.compile != "on":
            del values["compile"]
        return values


@dataclass(frozen=True)
class SlideFeatures:
    """The tiles of a slide.

    Attributes:
        features: (N, D) float16 or float32.
        coords: (N, 2) int32: y and x of a tile's top left pixel at level 0.
        attributes: The settings that made them, and the slide's size.
    """

    features: Features
    coords: npt.NDArray[np.int32]
    attributes: dict[str, Any]


def features_uri(folder: str, slide: str) -> str:
    """Return the address of a slide's features."""
    return files.join(folder, "features", f"{slide}.zarr")


def thumbnail_uri(folder: str, slide: str) -> str:
    """Return the address of a slide's thumbnail."""
    return files.join(folder, "thumbnails", f"{slide}.jpg")


def parts_uri(folder: str, slide: str) -> str:
    """Return the folder of an unfinished slide's regions."""
    return files.join(folder, "parts", slide)


def read_features(folder: str) -> tuple[FeatureSettings, dict[str, dict[str, Any]]]:
    """Read a folder of features.

    Returns:
        Its settings, and the rows of slides.parquet by slide.

    Raises:
        ConfigError: It is not a folder of features, or holds no slide yet.
    """
    uri = files.join(folder, "features.yaml")
    if not files.exists(uri):
        raise ConfigError(
            f"{folder}: expected a folder of features with a features.yaml; "
            f"`medray embed SLIDES --encoder NAME --weights FILE --out FEATURES` "
            f"writes one"
        )
    settings = from_dict(FeatureSettings, read_yaml(uri), uri)
    table = files.join(folder, "slides.parquet")
    if not files.exists(table):
        raise ConfigError(f"{folder}: no slide is embedded yet; run `medray embed`")
    rows = files.read_table(table).to_pylist()
    return settings, {row["slide"]: row for row in rows}


def read_slide(folder: str, slide: str) -> SlideFeatures:
    """Read the features of a finished slide.

    Raises:
        FormatError: They are damaged.
        StoreError: They cannot be reached.
    """
    uri = features_uri(folder, slide)
    arrays, attributes = read_arrays(uri)
    if arrays.keys() != {"features", "coords"} or len(arrays["features"]) != len(
        arrays["coords"]
    ):
        raise FormatError(f"{uri}: expected features and coords of as many tiles")
    coords = arrays["coords"].astype(np.int32)
    return SlideFeatures(arrays["features"], coords, attributes)


def provenance(
    settings: FeatureSettings, slide: PlannedSlide[SlideFacts]
) -> dict[str, Any]:
    """Return the attributes of a slide's features."""
    facts, working = slide.facts, slide.facts.working
    return {
        "kind": "features",
        "slide": slide.slide,
        "slide_digest": slide.digest,
        "encoder_digest": settings.encoder.digest(),
        "encoder": dataclasses.asdict(settings.encoder),
        "precision": settings.precision,
        "tissue": settings.tissue,
        "versions": settings.versions,
        # Of the slide; what a tile spans at level 0, where coordinates are.
        "level": working.level,
        "downsample": working.downsample,
        "mpp": working.mpp,
        "level0_height": facts.level0_height,
        "level0_width": facts.level0_width,
        "level0_tile": settings.encoder.tile * working.downsample,
    } | ({"compile": "on"} if settings.compile == "on" else {})
