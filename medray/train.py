"""A recipe and a dataset -> a model folder.

The way of a patch, top to bottom:

    order    which crop of which patch comes when: a function of (seed, position) alone
    read     CPU tasks of Ray Data cut crops straight from the zarr chunks
    step     each worker augments its share on its device, and steps with the others
    check    after each epoch the validation patches are counted, and all is saved
    keep     the best weights become the model folder
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray.data
import ray.train
import ray.train.torch
import torch
import torch.distributed
from torch import nn

from medray import cluster
from medray.dataset import read_dataset
from medray.errors import ConfigError, FormatError
from medray.metrics import class_scores, confusion, summary
from medray.models.augment import augment_batch, build_augmentation
from medray.models.config import ModelConfig, read_config
from medray.models.folder import save_model
from medray.models.losses import SegmentationLoss
from medray.models.network import choose_device, choose_precision
from medray.models.segmenters import build_segmenter
from medray.patches import read_train, read_val, usable_patches
from medray.recipe import Recipe, read_recipe
from medray.settings import from_dict, to_dict
from medray.store import files
from medray.store.lock import locked

log = logging.getLogger(__name__)
Row = dict[str, Any]


@dataclass(frozen=True)
class Training:
    """What a training did.

    Attributes:
        out: The model folder.
        trained: False if the model was there already.
        epochs: Epochs that were trained.
        f1: Best F1 on the validation patches; None if they hold no foreground.
        seconds: Wall time, Ray's start apart.
    """

    out: str
    trained: bool
    epochs: int
    f1: float | None
    seconds: float


def train(
    recipe: str, *, data: str, out: str, overrides: Sequence[str] = ()
) -> Training:
    """Train a model as a recipe says.

    Running the same command again goes on after the last epoch that was saved, and
    does nothing once the model is there.

    Args:
        recipe: YAML file, see recipes/.
        data: Dataset, as `medray ingest` writes it.
        out: Model folder to make.
        overrides: Keys of the recipe to change, such as `optimizer.lr=1e-4`.

    Raises:
        ConfigError: The recipe, the dataset or both together are wrong, OUT holds
            another model, or another process works there.
    """
    settings = read_recipe(recipe, overrides)
    data, out = files.absolute(data), files.absolute(out)
    with locked(out, "train"):
        return _train(settings, data, out)


def _train(settings: Recipe, data: str, out: str) -> Training:
    made_from = _made_from(settings, data)
    if (before := _trained_before(out, made_from)) is not None:
        return before
    patches = {
        split: usable_patches(data, split, settings) for split in ("train", "val")
    }
    _check_patches(patches, data)
    cluster.connect()
    _check_workers(settings.workers)
    log.info(
        "training on %d patches, validating on %d, into %s",
        len(patches["train"]),
        len(patches["val"]),
        out,
    )
    start = time.perf_counter()
    gpu = bool(cluster.gpus())
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config={"recipe": to_dict(settings), "data": data, "out": out},
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.workers,
            use_gpu=gpu,
            resources_per_worker={"GPU": 1} if gpu else {"CPU": 1},
        ),
        run_config=ray.train.RunConfig(
            # The name holds the digest: only the very same training is resumed.
            name=made_from["digest"].replace(":", "-"),
            storage_path=files.join(out, "checkpoints"),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            failure_config=ray.train.FailureConfig(max_failures=2),
        ),
    )
    with _telling_epochs(out):
        result = trainer.fit()
    if result.checkpoint is None:
        raise FormatError(f"{out}: the training ended without a checkpoint")
    with result.checkpoint.as_directory() as folder:
        state = torch.load(Path(folder) / "state.pt", weights_only=True)
    metrics = state["best"]["metrics"] | {"history": state["history"]}
    config = ModelConfig(
        architecture=settings.model,
        classes=read_dataset(data).classes,
        window=settings.window,
        mpp=_mpp(patches["train"]),
        made_from=made_from | {"epochs": state["epoch"] + 1},
    )
    model = build_segmenter(settings.model, len(config.classes))
    model.load_state_dict(state["best"]["model"])
    save_model(out, config, model, metrics)
    seconds = time.perf_counter() - start
    return Training(out, True, state["epoch"] + 1, metrics["f1"], seconds)


def _history_uri(out: str) -> str:
    return files.join(out, "metrics.jsonl")


@contextmanager
def _telling_epochs(out: str) -> Iterator[None]:
    """Log each epoch that the workers add to metrics.jsonl.

    Ray Train keeps the driver waiting until the training is over.
    """
    over = threading.Event()

    def tell() -> None:
        told = len(_read_history(out))
        while True:
            ended = over.wait(1.0)
            for entry in _read_history(out)[told:]:
                told += 1
                score = "none" if entry["f1"] is None else f"{entry['f1']:.4f}"
                log.info(
                    "stage=train epoch=%d loss=%.4f f1=%s seconds=%.1f",
                    entry["epoch"],
                    entry["loss"],
                    score,
                    entry["seconds"],
                )
            if ended:
                return

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _read_history(out: str) -> list[Row]:
    uri = _history_uri(out)
    if not files.exists(uri):
        return []
    return [json.loads(line) for line in files.read_bytes(uri).splitlines()]


def _made_from(recipe: Recipe, data: str) -> Row:
    """Name a training: equal digests mean equal recipe and data."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(to_dict(recipe), sort_keys=True).encode())
    for name in ("dataset.yaml", "patches.parquet"):
        uri = files.join(data, name)
        if not files.exists(uri):
            raise ConfigError(f"{uri} is missing; `medray ingest` writes it")
        digest.update(files.read_bytes(uri))
    packages = ("medray", "torch", "torchvision", "segmentation-models-pytorch")
    return {
        "digest": f"blake2b:{digest.hexdigest()}",
        "data": data.rsplit("/", 1)[-1],
        "recipe": to_dict(recipe),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def _trained_before(out: str, made_from: Row) -> Training | None:
    if not files.exists(files.join(out, "model.yaml")):
        return None
    before = read_config(out).made_from
    if before.get("digest") != made_from["digest"]:
        raise ConfigError(
            f"{out}: holds a model of another recipe or dataset; choose another --out, "
            f"or delete this model"
        )
    metrics = files.read_json(files.join(out, "metrics.json"))
    return Training(out, False, before["epochs"], metrics["f1"], 0.0)


def _check_patches(patches: dict[str, list[Row]], data: str) -> None:
    """Tell early what would make a training pointless."""
    classes = read_dataset(data).classes
    for split, rows in patches.items():
        if not rows:
            raise ConfigError(
                f"{data}: no annotated patches with tissue in split {split}; ingest "
                f"more annotated slides, or other --fractions"
            )
    pixels = np.sum([row["class_px"] for row in patches["train"]], axis=0)
    empty = [name for name, n in zip(classes.names, pixels, strict=True) if not n]
    if empty:
        raise ConfigError(
            f"{data}: the training patches hold no pixel of {empty}; annotate some, or "
            f"take the class out of the dataset"
        )
    resolutions = {row["mpp"] for row in patches["train"]}
    known = [mpp for mpp in resolutions if mpp]
    if known and (len(known) < len(resolutions) or max(known) > 1.15 * min(known)):
        raise ConfigError(
            f"{data}: the slides differ in microns per pixel "
            f"({sorted(map(str, resolutions))}); make a dataset of each resolution"
        )


def _mpp(patches: list[Row]) -> float | None:
    known = [row["mpp"] for row in patches if row["mpp"]]
    return float(np.median(known)) if known else None


def _check_workers(workers: int) -> None:
    """Refuse what the cluster can never give, rather than wait for it."""
    resources = ray.cluster_resources()
    kind = "GPU" if cluster.gpus() else "CPU"
    if workers > resources.get(kind, 0):
        raise ConfigError(
            f"workers: {workers} asked for, the cluster has "
            f"{resources.get(kind, 0):g} {kind}s"
        )


# --- read: see medray/patches.py -----------------------------------------------------


def _stream(read: Any, first: int, end: int, batch: int) -> Iterator[Row]:
    """Give batches of what `read` makes of ids from `first` to `end`, in order."""
    with cluster.streaming(block_bytes=32 << 20, in_order=True):
        rows = (
            ray.data.range(end - first, override_num_blocks=-(-(end - first) // batch))
            .map_batches(lambda ids: {"id": ids["id"] + first}, batch_size=None)
            .map_batches(read, batch_size=batch, num_cpus=0.5)
        )
        yield from rows.iter_batches(batch_size=batch, prefetch_batches=2)


# --- step -----------------------------------------------------------------------------


def _worker(config: Row) -> None:
    """Train in one of the processes that Ray Train starts."""
    recipe = from_dict(Recipe, config["recipe"], "recipe")
    data = config["data"]
    context = ray.train.get_context()
    rank = context.get_world_rank()
    device = choose_device()
    if device.type == "cpu":
        share = (os.cpu_count() or 1) // context.get_local_world_size()
        torch.set_num_threads(max(1, share))
    torch.manual_seed(recipe.seed)
    classes = read_dataset(data).classes
    network = build_segmenter(recipe.model, len(classes), recipe.weights)
    network = network.to(device).to(memory_format=torch.channels_last)
    patches = usable_patches(data, "train", recipe)
    local = recipe.batch // recipe.workers
    steps = max(1, (recipe.data.samples or len(patches)) // recipe.batch)
    total = steps * recipe.schedule.epochs
    state = _State(network, recipe, total)
    state.load(ray.train.get_checkpoint())
    model = ray.train.torch.prepare_model(network) if recipe.workers > 1 else network
    step = functools.partial(_step, model, state, recipe, device)
    read = functools.partial(read_train, recipe=recipe, data=data, rank=rank)
    first = (state.epoch + 1) * steps
    if first >= total or state.should_stop():
        return
    batches = _stream(read, first * local, total * local, local)
    losses, start = [], time.perf_counter()
    for index, batch in enumerate(batches, first):
        losses.append(step(batch, seed=recipe.seed + index * recipe.workers + rank))
        if (index + 1) % steps:
            continue
        counts = _validate(model, recipe, data, rank, device, len(classes))
        seconds = time.perf_counter() - start
        state.end_epoch(counts, classes.names, float(np.mean(losses)), seconds)
        if rank == 0:
            lines = "".join(json.dumps(entry) + "\n" for entry in state.history)
            files.write_bytes(_history_uri(config["out"]), lines.encode())
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = state.save(folder) if rank == 0 else None
            ray.train.report(state.history[-1], checkpoint=checkpoint)
        losses, start = [], time.perf_counter()
        if state.should_stop():
            return


def _step(
    model: nn.Module,
    state: _State,
    recipe: Recipe,
    device: torch.device,
    batch: Row,
    *,
    seed: int,
) -> float:
    """Do one step; give the loss.

    Raises:
        FormatError: The loss is not a number.
    """
    model.train()
    images = torch.tensor(batch["image"], device=device)
    masks = torch.tensor(batch["mask"], device=device)
    images, masks = augment_batch(state.augmentation, images, masks, seed=seed)
    with _autocast(recipe, device):
        logits = model(_normalised(images))
    loss = state.loss(logits.float(), masks.long()) + state.loss.of_weights(state.model)
    if not torch.isfinite(loss):
        raise FormatError(
            f"the loss is {loss.item()} at step {state.scheduler.last_epoch}; lower "
            f"optimizer.lr, or try precision=float32"
        )
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if recipe.optimizer.clip:
        nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip)
    state.optimizer.step()
    state.scheduler.step()
    return float(loss.item())


def _autocast(recipe: Recipe, device: torch.device) -> torch.autocast:
    precision: Any = recipe.precision
    dtype = choose_precision(precision, device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def _normalised(images: torch.Tensor) -> torch.Tensor:
    """Scale (N, 3, H, W) uint8 as inference does."""
    mean = torch.tensor(ModelConfig.mean, device=images.device).reshape(1, 3, 1, 1)
    std = torch.tensor(ModelConfig.std, device=images.device).reshape(1, 3, 1, 1)
    inputs = images.float().div_(255).sub_(mean).div_(std)
    return inputs.contiguous(memory_format=torch.channels_last)


# --- check ----------------------------------------------------------------------------


@torch.inference_mode()
def _validate(
    model: nn.Module,
    recipe: Recipe,
    data: str,
    rank: int,
    device: torch.device,
    classes: int,
) -> npt.NDArray[np.int64]:
    """Count truth against prediction over all validation patches, (C, C)."""
    model.eval()
    counts = np.zeros((classes, classes), np.int64)
    mine = len(usable_patches(data, "val", recipe)[rank :: recipe.workers])
    read = functools.partial(read_val, recipe=recipe, data=data, rank=rank)
    for batch in _stream(read, 0, mine, 4) if mine else ():
        with _autocast(recipe, device):
            logits = model(_normalised(torch.tensor(batch["image"], device=device)))
        predicted = logits.argmax(dim=1).to(torch.uint8).cpu().numpy()
        sizes = zip(batch["height"], batch["width"], strict=True)
        for truth, guess, (h, w) in zip(batch["mask"], predicted, sizes, strict=True):
            counts += confusion(truth[:h, :w], guess[:h, :w], classes)
    if recipe.workers > 1:
        tensor = torch.from_numpy(counts).to(device)
        torch.distributed.all_reduce(tensor)
        counts = tensor.cpu().numpy()
    return counts


class _State:
    """All that changes in a training, and so all that a checkpoint holds."""

    def __init__(self, model: nn.Module, recipe: Recipe, steps: int) -> None:
        self.model, self.recipe = model, recipe
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=recipe.optimizer.lr,
            weight_decay=recipe.optimizer.weight_decay,
        )
        warmup = max(1, round(recipe.schedule.warmup * steps))

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            progress = (step - warmup) / max(1, steps - warmup)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.augmentation = build_augmentation(recipe.augment)
        self.loss = SegmentationLoss(recipe.loss)
        self.epoch = -1
        self.history: list[Row] = []
        self.best: Row = {"epoch": -1, "score": -1.0}

    def end_epoch(
        self,
        counts: npt.NDArray[np.int64],
        names: Sequence[str],
        loss: float,
        seconds: float,
    ) -> None:
        """Note an epoch's result; keep its weights if they are the best so far."""
        self.epoch += 1
        scores: Row = summary(counts, names)
        entry = {"epoch": self.epoch, "loss": loss, "seconds": seconds} | scores
        self.history.append(entry)
        score = scores["f1"] if scores["f1"] is not None else -loss
        if self.epoch == 0 or score > self.best["score"]:
            weights = {k: v.cpu().clone() for k, v in self.model.state_dict().items()}
            metrics = scores | {"per_class": class_scores(counts, names)}
            metrics |= {"confusion": counts.tolist(), "epoch": self.epoch}
            self.best = {"epoch": self.epoch, "score": score, "model": weights}
            self.best["metrics"] = metrics

    def should_stop(self) -> bool:
        """Tell whether validation has not improved for `patience` epochs."""
        since_best: int = self.epoch - self.best["epoch"]
        return since_best >= self.recipe.schedule.patience

    def save(self, folder: str) -> ray.train.Checkpoint:
        """Write everything into `folder`."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "epoch": self.epoch,
            "history": self.history,
            "best": self.best,
        }
        torch.save(state, Path(folder) / "state.pt")
        return ray.train.Checkpoint.from_directory(folder)

    def load(self, checkpoint: ray.train.Checkpoint | None) -> None:
        """Take up where a checkpoint left off; None: start afresh."""
        if checkpoint is None:
            return
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.epoch, self.history = state["epoch"], state["history"]
        self.best = state["best"]
