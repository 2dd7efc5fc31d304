"""The configuration of a model folder; without torch, so quick to import."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from medray.classes import Classes
from medray.errors import ConfigError
from medray.geometry import Stitch, Windows
from medray.storage import files, read_folder_settings, to_dict

Precision = Literal["auto", "float32", "bfloat16", "float16"]
Compile = Literal["auto", "on", "off"]
Tta = Literal["none", "flips", "all"]
Stain = Literal["none", "macenko"]

TURNS: dict[Tta, tuple[tuple[int, bool], ...]] = {
    "none": ((0, False),),
    "flips": ((0, False), (0, True), (2, False), (2, True)),
    "all": tuple((turns, mirror) for mirror in (False, True) for turns in range(4)),
}
"""Symmetries of a square as (quarter turns, mirrored), the identity first."""

WEIGHTS = "weights.safetensors"
EXPORTED = ("model.pt2", "model.onnx", "tensorrt.pt2")
"""Files that hold a model's weights: trained, or made by `medray export`."""


@dataclass(frozen=True)
class Architecture:
    """A network of segmentation-models-pytorch, or a classifier of timm.

    Attributes:
        name: fcn8s, highres_unet, or a decoder of segmentation-models-pytorch: unet,
            unetplusplus, fpn, deeplabv3plus, segformer, upernet, ...;
            or `classifier`: one class for a whole window.
        encoder: Any encoder of segmentation-models-pytorch or `tu-` + any of timm.
        attention: Of a classifier: units of self-attention over the last features,
            which is concatenated to them; 0: none.
        hidden: Of a classifier: units of a layer (ReLU) before the last; 0: none.
        norm: Of a classifier: batch normalisation of that layer, before its ReLU.
        dropout: Of a classifier: share of what reaches the last layer that is dropped
            in training.
        morphology: Whether a classifier takes measures of a cell's contours in addition
            to its pixels (see medray.annotations.morphology).
    """

    name: str = "unet"
    encoder: str = "resnet18"
    attention: int = 0
    hidden: int = 0
    norm: bool = False
    dropout: float = 0.0
    morphology: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        if min(self.attention, self.hidden) < 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"model: expected attention and hidden of 0 or more and dropout from 0 "
                f"to 1, found {self.attention}, {self.hidden} and {self.dropout}"
            )
        if self.norm and not self.hidden:
            raise ValueError(
                "model.norm: normalises the hidden layer; set model.hidden, to 256 say"
            )
        head = self.attention or self.hidden or self.dropout or self.morphology
        if self.name != "classifier" and head:
            raise ValueError(
                f"model: {self.name} has no attention, no hidden, no norm, no dropout "
                f"and no morphology"
            )


@dataclass(frozen=True)
class Morphology:
    """How measures of a cell are normalised to a model's second input.

    Attributes:
        names: Names of the measures, with units; a dataset's must be the same.
        mean: Mean of each over the training images, which is subtracted.
        std: Standard deviation of each, by which they are then divided.
    """

    names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model and its input; the same configuration for training and inference.

    Attributes:
        architecture: Network and encoder.
        classes: Names by label value.
        window: Size and stride of the model's input, pixels at `mpp`.
        mpp: Microns per pixel that the model was trained at; None: whatever level 0 is.
        stain: Stain normalisation of each window, which comes first.
        zscore: Whether each channel of a window is then brought to mean 0 and standard
            deviation 1 by its own values.
        mean: RGB mean subtracted from pixels scaled to 0..1.
        std: RGB standard deviation they are then divided by.
        morphology: Normalisation of a cell's measures; None: the model takes none.
        provenance: Digests, versions and settings of the training.
    """

    architecture: Architecture
    classes: Classes
    window: Windows
    mpp: float | None
    stain: Stain = "none"
    zscore: bool = False
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    morphology: Morphology | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    RENAMED: ClassVar[dict[str, str]] = {"made_from": "provenance"}

    @property
    def classifies(self) -> bool:
        """Whether a whole window gets one class."""
        return self.architecture.name == "classifier"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """How windows become classes.

    Attributes:
        precision: Precision of the arithmetic. Blending is always float32.
        compile: Compile the networks for the device; auto: for a GPU.
        stitch: Keep the core of each window, or average overlaps.
        tta: Average over mirrored (flips), rotated (all) windows. Takes 4 or 8 times as
            long.
        vote: Take the class that most models predict, not the mean probability.
        thresholds: Least probability of each class, by label value. A pixel that
            reaches none is class 0. Empty: the likeliest class.
        crf: Iterations of boundary refinement. 0: none; see medray.models.crf.
        probabilities: Store the probabilities of the classes too.
        quality: Store uncertainty, disagreement and unreadable places too.
    """

    precision: Precision = "auto"
    compile: Compile = "auto"
    stitch: Stitch = "crop"
    tta: Tta = "none"
    vote: bool = False
    thresholds: tuple[float, ...] = ()
    crf: int = 0
    probabilities: bool = False
    quality: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        if any(not 0 <= value <= 1 for value in self.thresholds):
            raise ConfigError(f"thresholds lie in 0..1, found {self.thresholds}")
        if not 0 <= self.crf <= 20:
            raise ConfigError(f"crf takes 0 to 20 iterations, found {self.crf}")


def read_config(folder: str) -> ModelConfig:
    """Read `model.yaml`.

    Raises:
        ConfigError: The folder is no model folder.

    Examples:
        >>> from medray.models import read_config
        >>> config = read_config("model")
        >>> config.classes.names, config.window.size, config.mpp
        (('background', 'tumour'), 128, 0.5)
    """
    expected = ("a model folder", "medray train")
    return read_folder_settings(ModelConfig, folder, "model.yaml", expected)


def weights_uri(folder: str) -> str:
    """Return the file with a model's weights, trained or exported."""
    for name in (WEIGHTS, *EXPORTED):
        uri = files.join(folder, name)
        if files.exists(uri):
            return uri
    return files.join(folder, WEIGHTS)


def is_exported(folder: str) -> bool:
    """Return whether a model folder was made by `medray export`."""
    return weights_uri(folder).endswith(EXPORTED)


def check_runtime(folder: str) -> None:
    """Refuse a model whose file needs a package that is not here.

    Raises:
        ConfigError: The package is not installed.
    """
    uri = weights_uri(folder)
    for end, module, package in (
        (".onnx", "onnxruntime", "onnxruntime; install medray with the extra `export`"),
        ("tensorrt.pt2", "torch_tensorrt", "torch-tensorrt; install it"),
    ):
        if uri.endswith(end) and importlib.util.find_spec(module) is None:
            raise ConfigError(f"{uri}: needs {package}")


def model_digest(folder: str) -> str:
    """Digest what determines a model's predictions: weights and configuration."""
    return digest_of(read_config(folder), weights_uri(folder))


def digest_of(settings: Any, weights: str) -> str:
    """Digest a model's configuration, without its provenance, and its weights.

    Args:
        settings: Dataclass with the field `provenance`.
        weights: File of the weights.
    """
    config = to_dict(settings) | {"made_from": None}
    del config["provenance"]  # called made_from when digests began
    digest = hashlib.blake2b(repr(sorted(config.items())).encode(), digest_size=16)
    digest.update(files.read_bytes(weights))
    return f"blake2b:{digest.hexdigest()}"
