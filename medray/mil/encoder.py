"""Frozen encoders of timm: the vectors of tiles, batch by batch on the device."""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import timm
import torch
from torch import nn

from medray.errors import ConfigError
from medray.mil.features import Encoder, Features
from medray.models import (
    Compiled,
    Precision,
    choose_device,
    choose_precision,
    load_encoder,
)
from medray.storage import files, named_digest

# Pixels of a batch on a CPU, see medray.models.predict; tiles of one on a GPU.
_CPU_BATCH_PIXELS = 512 * 512
_GPU_BATCH = 64


@dataclass(frozen=True)
class TilePixels:
    """What the reader passes to the encoder: (N, side, side, 3) uint8 RGB."""

    tiles: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class TileFeatures:
    """The features of a region's tiles.

    Attributes:
        features: (N, D) float16 or float32.
        finite: Whether all of them are finite numbers.
    """

    features: Features
    finite: bool


def settle_encoder(name: str, weights: str, *, tile: int, mpp: float) -> Encoder:
    """Return how an encoder is built and fed, found by building it once.

    Next to the weights there may be a `config.json` as timm writes it for the Hugging
    Face hub: its `model_args` and the normalisation of its `pretrained_cfg` count.

    Args:
        name: As timm has it.
        weights: File of its weights.
        tile: Side of a tile, pixels.
        mpp: Microns per pixel of the tiles.

    Raises:
        ConfigError: timm does not know it, the weights are not its, or it does not take
            tiles of that size.
    """
    name = name.removeprefix("tu-")
    if not timm.is_model(name):
        close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise ConfigError(f"encoder: timm has no model {name}{hint}")
    if not files.exists(weights) or files.is_folder(weights):
        raise ConfigError(f"weights: {weights}: there is no such file")
    arguments, told = _told_beside(name, weights)
    network = _build(name, arguments, weights)
    known = network.pretrained_cfg | told
    try:
        with torch.inference_mode():
            found = network(torch.zeros(2, 3, tile, tile))
    except (RuntimeError, ValueError, AssertionError) as error:
        size = known.get("input_size", (3, 224, 224))[-1]
        problem = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"encoder: {name} does not take tiles of {tile} px ({problem}); "
            f"try --tile {size}"
        ) from error
    if found.ndim != 2:
        raise ConfigError(
            f"encoder: {name} gives {tuple(found.shape)} of two tiles, expected a "
            f"vector of each; take another encoder"
        )
    return Encoder(
        name=name,
        arguments=arguments,
        weights_digest=named_digest(files.read_bytes(weights)),
        dimensions=int(found.shape[1]),
        tile=tile,
        mpp=mpp,
        mean=_three(known["mean"]),
        std=_three(known["std"]),
    )


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _told_beside(name: str, weights: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return arguments and normalisation of a config.json next to the weights."""
    uri = files.join(weights.rpartition("/")[0], "config.json")
    try:
        config = json.loads(files.read_bytes(uri))
    except FileNotFoundError:
        return {}, {}
    except ValueError as error:
        raise ConfigError(f"{uri}: expected JSON, found {error}") from error
    if not isinstance(config, dict) or "architecture" not in config:
        return {}, {}  # of another library
    if config["architecture"] != name.split(".")[0]:
        raise ConfigError(
            f"{uri}: says that the weights are of {config['architecture']}; give "
            f"--encoder {config['architecture']}, or move the weights elsewhere"
        )
    arguments = dict(config.get("model_args") or {})
    arguments.pop("num_classes", None)
    # What makes timm load or download something is no part of an architecture.
    wrong = sorted(arguments.keys() & inspect.signature(timm.create_model).parameters)
    if wrong:
        raise ConfigError(f"{uri}: model_args may not hold {wrong}; remove them")
    told = config.get("pretrained_cfg") or {}
    known = ("mean", "std", "input_size")
    return arguments, {key: told[key] for key in known if key in told}


def _build(name: str, arguments: dict[str, Any], weights: str) -> Any:
    network: Any
    try:
        network = timm.create_model(name, pretrained=False, num_classes=0, **arguments)
    except (RuntimeError, ValueError, TypeError) as error:
        problem = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"encoder: cannot build {name} with {arguments}: {problem}"
        ) from error
    unused = load_encoder(network, weights)
    told: Any = network.pretrained_cfg
    heads = told.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    # Besides a head, and what only a training needs.
    known = (*(f"{head}." for head in heads), "head", "fc.", "mask_token")
    strange = [key for key in unused if not key.startswith(known)]
    if strange:
        raise ConfigError(
            f"{weights}: holds {len(strange)} tensors that {name} with arguments "
            f"{arguments} has not, such as {', '.join(strange[:3])}; without them its "
            f"features would be wrong. Put timm's config.json with the model_args of "
            f"these weights beside the file, or name another encoder"
        )
    return network.eval()


class Embedder:
    """An encoder, loaded once, applied to a stream of regions.

    A batch holds tiles of one region, in their order: what comes of a region does not
    depend on what else is embedded, so a region that is done again gives the same
    bytes. While one region is encoded the next is waited for.
    """

    def __init__(
        self,
        network: nn.Module,
        encoder: Encoder,
        precision: Precision,
        dtype: np.dtype[Any],
        *,
        compiled: bool = False,
        threads: int | None = None,
    ) -> None:
        """Move the network to its device.

        Args:
            network: Maps (N, 3, S, S) float32 to (N, D).
            encoder: How it is fed.
            precision: Of its arithmetic.
            dtype: Of the features.
            compiled: Compile the network for the device.
            threads: That encode on a CPU; by default one a core.

        Raises:
            ConfigError: float16 on a CPU.
            CompileError: The network cannot be compiled.
        """
        self._device = choose_device()
        self._autocast = choose_precision(precision, self._device)
        self._encoder, self._dtype = encoder, dtype
        network = network.eval().to(self._device)
        self._network: Callable[[torch.Tensor], torch.Tensor] = network
        self._batch, self._pool = _GPU_BATCH, None
        if self._device.type == "cpu":
            self._batch = max(1, _CPU_BATCH_PIXELS // encoder.tile**2)
            threads = threads or os.cpu_count() or 1
            self._pool = ThreadPoolExecutor(
                threads, "embed", torch.set_num_threads, (1,)
            )
        if compiled:
            side = encoder.tile
            self._network = Compiled(
                network,
                (self._batch, 3, side, side),
                self._device,
                self._autocast,
                name=f"the encoder {encoder.name}",
                threads=threads or 1,
            )
            self._autocast = torch.float32  # of none: it has cast all there is
        std = torch.tensor(encoder.std, device=self._device).reshape(1, 3, 1, 1)
        mean = torch.tensor(encoder.mean, device=self._device).reshape(1, 3, 1, 1)
        self._scale, self._shift = 1 / (255 * std), -mean / std

    @classmethod
    def from_file(
        cls,
        encoder: Encoder,
        weights: str,
        precision: Precision,
        dtype: np.dtype[Any],
        *,
        compiled: bool = False,
        threads: int | None = None,
    ) -> Embedder:
        """Build the encoder with its weights.

        Raises:
            ConfigError: The file is not there, or is not the one it was; or as above.
        """
        network = _build(encoder.name, encoder.arguments, weights)
        if named_digest(files.read_bytes(weights)) != encoder.weights_digest:
            raise ConfigError(f"{weights}: changed while it was used; run again")
        return cls(
            network, encoder, precision, dtype, compiled=compiled, threads=threads
        )

    def warm_up(self) -> None:
        """Run a batch: what is chosen at first use is then ready."""
        side = self._encoder.tile
        shape = (self._batch, side, side, 3)
        self._finish(self._start(TilePixels(np.zeros(shape, np.uint8))))

    def predict(self, regions: Iterable[TilePixels]) -> Iterator[TileFeatures]:
        """Embed a stream of regions, in their order."""
        under_way: deque[list[Callable[[], torch.Tensor]]] = deque()
        for region in regions:
            under_way.append(self._start(region))
            if len(under_way) > 1:
                yield self._finish(under_way.popleft())
        while under_way:
            yield self._finish(under_way.popleft())

    def _start(self, region: TilePixels) -> list[Callable[[], torch.Tensor]]:
        tiles = torch.from_numpy(region.tiles)
        firsts = range(0, len(tiles), self._batch)
        batches = [tiles[first : first + self._batch] for first in firsts]
        if self._pool:
            return [self._pool.submit(self._encode, batch).result for batch in batches]
        # A GPU works behind the caller's back.
        return [functools.partial(_same, self._encode(batch)) for batch in batches]

    def _finish(self, started: list[Callable[[], torch.Tensor]]) -> TileFeatures:
        whole = torch.cat([result() for result in started]).cpu().numpy()
        with np.errstate(over="ignore"):  # infinity is found below
            features = whole.astype(self._dtype)
        return TileFeatures(features, bool(np.isfinite(features).all()))

    @torch.inference_mode()
    def _encode(self, tiles: torch.Tensor) -> torch.Tensor:
        """Map (N, S, S, 3) uint8 to (N, D) float32."""
        pixels = tiles.to(self._device).permute(0, 3, 1, 2)
        inputs = pixels.float().mul_(self._scale).add_(self._shift)
        enabled = self._autocast != torch.float32
        with torch.autocast(self._device.type, self._autocast, enabled=enabled):
            features = self._network(inputs)
        return features.float()


def _same(features: torch.Tensor) -> torch.Tensor:
    return features
