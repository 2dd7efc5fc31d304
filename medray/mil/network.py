"""Slides as bags of tiles: gated attention or a mean, written out; and its training."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional

from medray.errors import FormatError, MedrayError
from medray.mil.config import SlideHead, SlideModel, SlideRecipe, read_slide_model
from medray.models import choose_device
from medray.storage import files, write_settings
from medray.types import Row

log = logging.getLogger(__name__)
Floats = npt.NDArray[np.float32]


class SlideNetwork(nn.Module):
    """The classes of a slide by the vectors of its tiles.

    Vectors are standardised as those of the training slides were. `attention` is the
    gated attention of Ilse et al. 2018 (equation 9): with h a tile's hidden vector,

        a = softmax over the tiles of  w (tanh(V h) * sigmoid(U h))

    and the class scores are a linear layer of the sum of a h. `linear` has a = 1 / N
    and no hidden layer.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, head: SlideHead, dimensions: int, classes: int) -> None:
        """Build it with random weights; `mean` 0 and `scale` 1."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(dimensions))
        self.register_buffer("scale", torch.ones(dimensions))
        self.hidden: nn.Module = nn.Identity()
        self.attends = head.name == "attention"
        if self.attends:
            self.hidden = nn.Sequential(
                nn.Linear(dimensions, head.hidden), nn.ReLU(), nn.Dropout(head.dropout)
            )
            dimensions = head.hidden
            self.gate_tanh = nn.Linear(dimensions, head.attention)
            self.gate_sigmoid = nn.Linear(dimensions, head.attention)
            self.weigh = nn.Linear(head.attention, 1)
        self.classify = nn.Linear(dimensions, classes)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map (N, D) features of one slide to logits (C,) and attention (N,)."""
        hidden = self.hidden((features - self.mean) * self.scale)
        if self.attends:
            gated = torch.tanh(self.gate_tanh(hidden))
            gated = gated * torch.sigmoid(self.gate_sigmoid(hidden))
            attention = torch.softmax(self.weigh(gated)[:, 0], dim=0)
        else:
            attention = torch.full_like(hidden[:, 0], 1 / len(hidden))
        logits: torch.Tensor = self.classify(attention @ hidden)
        return logits, attention


def fit(
    model: SlideModel,
    recipe: SlideRecipe,
    bags: Callable[[int], Floats],
    labels: Sequence[int],
    train: Sequence[int],
    val: Sequence[int],
) -> tuple[SlideNetwork, list[Row], npt.NDArray[np.int64]]:
    """Train on the labels of slides, and keep the epoch of the least validation loss.

    On a CPU the same request gives the same weights.

    Args:
        model: The configuration.
        recipe: How.
        bags: Returns the (N, D) float32 features of a slide by its number; N > 0.
        labels: Class of each slide.
        train: Numbers of the slides to learn from.
        val: Numbers of the slides that choose.

    Returns:
        The network, on the CPU; one row per epoch: epoch, train_loss, val_loss,
        val_accuracy; and the classes it sees in the validation slides.

    Raises:
        MedrayError: The loss is no number.
    """
    device = choose_device()
    classes = len(model.classes)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        network = SlideNetwork(model.head, model.encoder.dimensions, classes)
        mean, std = _moments(bags, train)
        network.mean.copy_(torch.from_numpy(mean))
        network.scale.copy_(torch.from_numpy(1 / np.maximum(std, 1e-6)))
        network.to(device)
        counts = np.bincount([labels[number] for number in train], minlength=classes)
        weights = len(train) / (classes * np.maximum(counts, 1))
        if not recipe.balance:
            weights = np.ones(classes)
        optimizer = torch.optim.AdamW(
            network.parameters(), recipe.lr, weight_decay=recipe.weight_decay
        )

        def loss_of(number: int) -> tuple[torch.Tensor, int]:
            bag = torch.from_numpy(bags(number)).to(device)
            logits, _ = network(bag)
            label = torch.tensor(labels[number], device=device)
            loss = functional.cross_entropy(logits, label) * weights[labels[number]]
            return loss, int(logits.argmax())

        truth = np.array([labels[number] for number in val])
        history: list[Row] = []
        best: Row = {"val_loss": np.inf}
        for epoch in range(1, recipe.epochs + 1):
            network.train()
            order = np.random.default_rng((recipe.seed, epoch)).permutation(train)
            total = 0.0
            for first in range(0, len(order), recipe.batch):
                step = order[first : first + recipe.batch]
                optimizer.zero_grad()
                for number in step:
                    loss, _ = loss_of(int(number))
                    (loss / len(step)).backward()  # type: ignore[no-untyped-call]
                    total += float(loss.detach())
                optimizer.step()
            network.eval()
            with torch.inference_mode():
                checked = [loss_of(number) for number in val]
            predicted = np.array([guess for _, guess in checked], np.int64)
            row: Row = {
                "epoch": epoch,
                "train_loss": total / len(train),
                "val_loss": float(sum(float(loss) for loss, _ in checked)) / len(val),
                "val_accuracy": float((predicted == truth).mean()),
            }
            history.append(row)
            log.info(
                "epoch %d: loss %.4f, on validation slides %.4f, accuracy %.3f",
                *(row[name] for name in row),
            )
            if not np.isfinite(row["train_loss"] + row["val_loss"]):
                raise MedrayError(
                    f"the loss is no number in epoch {epoch}; try a smaller lr than "
                    f"{recipe.lr:g}"
                )
            if row["val_loss"] < best["val_loss"]:
                best = row | {"state": copy.deepcopy(network.state_dict())}
                best["predicted"] = predicted
            elif epoch - best["epoch"] >= recipe.patience:
                break
    network.load_state_dict(best["state"])
    return network.cpu().eval(), history, best["predicted"]


def _moments(
    bags: Callable[[int], Floats], numbers: Sequence[int]
) -> tuple[Floats, Floats]:
    """Return mean and deviation of each dimension over all tiles, bag by bag."""
    total: Any = 0
    count, squares = 0, total
    for number in numbers:
        bag = bags(number)
        total, count = total + bag.sum(axis=0, dtype=np.float64), count + len(bag)
    mean = total / count
    for number in numbers:
        squares = squares + ((bags(number) - mean) ** 2).sum(axis=0)
    std = np.sqrt(squares / count)
    return mean.astype(np.float32), std.astype(np.float32)


def save_slide_model(
    folder: str, model: SlideModel, network: nn.Module, metrics: Row
) -> None:
    """Write a model folder; `model.yaml` comes last, so a folder with it is whole."""
    state = {k: v.detach().contiguous() for k, v in network.state_dict().items()}
    weights = safetensors.torch.save(state, {"format": "pt"})
    files.write_bytes(files.join(folder, "weights.safetensors"), weights)
    files.write_json(files.join(folder, "metrics.json"), metrics)
    encoder = model.encoder
    card = (
        "---\nlibrary_name: medray\npipeline_tag: image-classification\n"
        "tags: [pathology]\n---\n\n"
        f"# {model.head.name} over {encoder.name}\n\n"
        f"- classes: {', '.join(model.classes)}\n"
        f"- tiles: {encoder.tile} px at {encoder.mpp:g} um per pixel\n"
        f"- encoder: {encoder.name}, {encoder.weights_digest}\n\n"
        "Made by medray; `model.yaml` says from what. Not a medical device.\n"
    )
    files.write_bytes(files.join(folder, "README.md"), card.encode())
    write_settings(files.join(folder, "model.yaml"), model)


class SlideClassifier:
    """A trained model of slides, loaded once."""

    def __init__(self, folder: str) -> None:
        """Load it.

        Raises:
            ConfigError: The folder holds no model of slides.
            FormatError: The weights are not those of the model.
        """
        self.model = read_slide_model(folder)
        size = (self.model.encoder.dimensions, len(self.model.classes))
        self._network = SlideNetwork(self.model.head, *size).eval()
        uri = files.join(folder, "weights.safetensors")
        try:
            state = safetensors.torch.load(files.read_bytes(uri))
            self._network.load_state_dict(state)
        except (FileNotFoundError, safetensors.SafetensorError, RuntimeError) as error:
            problem = " ".join(str(error).split())[:300]
            raise FormatError(
                f"{uri}: expected the weights of head {self.model.head}, "
                f"found {problem}"
            ) from error

    @torch.inference_mode()
    def predict(self, features: npt.NDArray[Any]) -> tuple[Floats, Floats]:
        """Classify a slide.

        Args:
            features: (N, D), N > 0.

        Returns:
            (C,) probabilities and (N,) attention, float32.
        """
        bag = torch.from_numpy(features.astype(np.float32))
        logits, attention = self._network(bag)
        return torch.softmax(logits, 0).numpy(), attention.numpy()
