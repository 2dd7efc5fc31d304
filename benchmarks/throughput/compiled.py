"""What a compiled network gains, and what it rounds otherwise.

In one run, interleaved, over the same windows, with the same weights and batch:

    autocast   eager, in the working precision by autocast: `--compile off`
    cast       eager, weights and input in the working precision, without autocast
    compiled   that compiled: `--compile on`

Then how long it takes to make a package and to load one, and the masks: which pixels
differ, and F1 of the foreground, against eager float32.

Run: python -m benchmarks.throughput.compiled --model MODEL --slide SLIDE.svs
"""

import copy
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from benchmarks import harness
from benchmarks.random_model import random_model
from medray.datasets.synthetic_scene import draw_scene
from medray.models.compiled import FOLDER_VARIABLE
from medray.models.config import ModelConfig, Precision, Prediction
from medray.models.folder import load_model
from medray.models.network import Network
from medray.models.predict import Predictor
from medray.slides.opening import open_slide
from medray.types import UInt8

Forward = Callable[[torch.Tensor], torch.Tensor]


def windows_of(slide: str | None, size: int, count: int) -> UInt8:
    """Return windows (count, size, size, 3) of tissue: of a slide, or drawn."""
    if slide is None:
        side = size * int(np.ceil(count**0.5))
        pixels = draw_scene(1, height=side, width=side).pixels
        places = itertools.product(range(0, side, size), repeat=2)
        tiles = [pixels[y : y + size, x : x + size] for y, x in places]
        return np.stack(tiles[:count])
    tiles = []
    with open_slide(slide) as opened:
        level = opened.levels[0]
        rows = range(0, level.height - size + 1, size)
        columns = range(0, level.width - size + 1, size)
        for y, x in itertools.product(rows, columns):
            tile = opened.read(y, x, size, size)
            if tile.mean() < 230:  # no glass
                tiles.append(tile)
            if len(tiles) == count:
                break
    return np.stack(tiles)


class Cast(Network):
    """A network with weights and input in the working precision, without autocast."""

    def __init__(
        self,
        model: torch.nn.Module,
        config: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(copy.deepcopy(model), config, device, torch.float32)
        network = copy.deepcopy(self._run).to(dtype)  # type: ignore[attr-defined]
        self._run = lambda inputs: network(inputs.to(dtype))


def rate(forward: Forward, batches: list[torch.Tensor], threads: int) -> float:
    """Return windows per second, as many threads as the predictor has at work."""

    @torch.inference_mode()
    def one(batch: torch.Tensor) -> int:
        forward(batch)
        return len(batch)

    with ThreadPoolExecutor(
        threads, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        list(pool.map(one, batches[:threads]))
        _finish()
        start = time.perf_counter()
        done = sum(pool.map(one, batches))
        _finish()
        return done / (time.perf_counter() - start)


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.inference_mode()
def labels_of(forward: Forward, batches: list[torch.Tensor]) -> torch.Tensor:
    """Return the classes of all pixels, on the CPU."""
    parts = [forward(batch).float().argmax(dim=1).cpu() for batch in batches]
    return torch.cat(parts)


def f1(mask: torch.Tensor, truth: torch.Tensor) -> float:
    """Return F1 of the foreground."""
    both = int(((mask > 0) & (truth > 0)).sum())
    either = int((mask > 0).sum()) + int((truth > 0).sum())
    return 2 * both / either if either else 1.0


def main(
    model: str | None = None,
    slide: str | None = None,
    encoder: str = "resnet18",
    precision: Precision = "auto",
    windows: int = 400,
    rounds: int = 5,
    batch: int | None = None,
) -> Iterator[harness.Result]:
    """Compare a network compiled with the same as it is.

    Args:
        model: Model folder; without one a U-Net of random weights, of whose masks
            nothing can be said.
        slide: Whose tissue is predicted; without one it is drawn.
        encoder: Of the random U-Net.
        precision: The working precision, as of `medray infer`.
        windows: How many are predicted in a round.
        rounds: Number of rounds.
        batch: Windows of a batch; by default as `medray infer`.
    """
    with tempfile.TemporaryDirectory() as name:
        os.environ[FOLDER_VARIABLE] = str(Path(name, "packages"))
        folder = model or random_model(Path(name, "model"), encoder=encoder)
        network, config = load_model(folder)

        def predictor(how: Prediction) -> Predictor:
            return Predictor([(copy.deepcopy(network), config)], how, batch=batch)

        eager = predictor(Prediction(precision=precision, compile="off"))
        seconds = []
        for _ in range(2):  # made, then loaded
            start = time.perf_counter()
            compiled = predictor(Prediction(precision=precision, compile="on"))
            compiled.warm_up()
            seconds.append(time.perf_counter() - start)
        packages = sum(p.stat().st_size for p in Path(name, "packages").rglob("*"))
        cast = Cast(network, config, eager.device, eager.dtype)
        exact = predictor(Prediction(precision="float32", compile="off"))

        pixels = torch.from_numpy(windows_of(slide, config.window.size, windows))
        batches = list(pixels.to(eager.device).split(eager.batch))
        forwards: dict[str, Forward] = {
            "autocast": eager.logits,
            "cast": cast,
            "compiled": compiled.logits,
        }
        yield harness.interleaved(
            {
                name: lambda forward=forward: {  # type: ignore[misc]
                    "windows/s": rate(forward, batches, eager.threads)
                }
                for name, forward in forwards.items()
            },
            rounds,
            device=str(eager.device),
            precision=str(eager.dtype),
            network=f"{config.architecture.name} on {config.architecture.encoder}",
            window=config.window.size,
            batch=eager.batch,
            windows=len(pixels),
        )
        truth = labels_of(exact.logits, batches)
        masks = {name: labels_of(one, batches) for name, one in forwards.items()}
        yield {
            "made, s": seconds[0],
            "loaded, s": seconds[1],
            "packages, MB": packages / 1e6,
            "foreground of float32": float((truth > 0).float().mean()),
            "pixels that differ from float32": {
                name: float((mask != truth).float().mean())
                for name, mask in masks.items()
            },
            "F1 against float32": {name: f1(m, truth) for name, m in masks.items()},
            "pixels that differ, compiled from autocast": float(
                (masks["compiled"] != masks["autocast"]).float().mean()
            ),
        }


if __name__ == "__main__":
    harness.run(main)
