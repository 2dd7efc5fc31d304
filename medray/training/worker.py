"""The training loop: what each worker of a training does, alone or with others.

The way of a step, top to bottom:

    read     CPU tasks of Ray Data cut the crops of the step's parts from zarr
    learn    each worker augments its parts on its device and adds up their gradients
    combine  the workers add theirs, and all do the same step
             (medray/training/learner.py)
    check    after an epoch the validation patches are counted
    keep     rank 0 stores all that the next step depends on, and the best weights

A step's parts are numbered (`Recipe.micro_batches`), and so are the places of their
crops in the order: how many workers share them changes nothing but the order of a sum.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import ray.train
import torch
from PIL import Image

from medray.datasets.dataset import read_dataset, read_morphology
from medray.errors import FormatError, MedrayError
from medray.evaluation.metrics import (
    class_scores,
    confusion,
    of_images,
    small_objects,
    small_scores,
    summary,
)
from medray.evaluation.report import draw_overlay
from medray.execution import cluster
from medray.models.config import ModelConfig
from medray.models.network import choose_device
from medray.models.pictures import first_kernels, score_maps
from medray.storage import files
from medray.storage.yaml_config import from_dict, to_dict
from medray.training.dataloader import MicroBatch, Place, read_micro_batches, val_batch
from medray.training.loggers import Tracker
from medray.training.recipe import Recipe
from medray.training.sampler import read_val, steps_per_epoch, usable_patches
from medray.training.trainer import Batch, Learner, World
from medray.types import Row

_STREAM_MICRO_BATCHES = 4096  # that one chain of Ray Data reads
_MOST_READERS = 8  # a worker's processes that read
_WEIGHED = 512  # validation images on which an encoder's stages are weighed
_COMPARED = 64  # validation patches on which student and teacher are compared
_EXAMPLES = 4  # validation patches that are shown
_LEAST_DAMAGED = 3  # damaged patches that are endured in any case


class TrainingError(MedrayError):
    """A training cannot go on, and why."""


def run_worker(config: Row) -> str | None:
    """Train in one of the processes that Ray Train starts.

    Returns:
        Why the training cannot go on, or None. An error that is raised makes Ray Train
        start all workers anew.
    """
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    world = World(rank, size, choose_device(), context.get_local_world_size())
    if world.device.type == "cpu":
        # As many as Ray counts: a container may have fewer than its machine.
        torch.set_num_threads(max(1, cluster.cpus_per_node() // world.local_size))
    recipe = from_dict(Recipe, config["recipe"], "recipe")
    model_config = from_dict(ModelConfig, config["model_config"], "model.yaml")
    try:
        train_as(
            world, recipe, model_config, config["data"], config["out"], config["name"]
        )
    except MedrayError as error:
        return f"{error}"
    return None


def train_as(
    world: World,
    recipe: Recipe,
    model_config: ModelConfig,
    data: str,
    out: str,
    name: str,
    told: Callable[[Row], None] = lambda entry: None,
) -> None:
    """Train as one of a world, from the last checkpoint to the end.

    Args:
        world: Who this is, of how many.
        recipe: What to do.
        model_config: How pixels become inputs, and the classes.
        data: Dataset.
        out: Model folder; checkpoints/NAME-last.pt and NAME-best.pt are kept there.
        name: Of this very training.
        told: Is given the entry of each epoch, of those before a checkpoint too.

    Raises:
        TrainingError: It cannot go on; all of the world raise it.
    """
    patches = len(usable_patches(data, "train", recipe))
    steps = steps_per_epoch(recipe, patches)
    last = _checkpoint_uri(out, name, "last")
    measures = {}
    if model_config.morphology is not None:
        measures = {
            split: read_morphology(data, usable_patches(data, split, recipe))[1]
            for split in ("train", "val")
        }
    learner = _start(world, recipe, model_config, patches, steps, measures, last)
    begun = learner.epoch * steps + learner.step
    tracker = Tracker(
        out, step=begun, name=name, settings=to_dict(recipe), shown=world.rank == 0
    )
    for entry in learner.history:
        told(entry)
    with closing(tracker):
        _train_epochs(learner, tracker, data, out, name, told)


def _train_epochs(
    learner: Learner,
    tracker: Tracker,
    data: str,
    out: str,
    name: str,
    told: Callable[[Row], None],
) -> None:
    world, recipe, steps = learner.world, learner.recipe, learner.steps
    names = learner.model_config.classes.names
    last = _checkpoint_uri(out, name, "last")
    saved = time.monotonic()
    for epoch, stream in _epochs(learner, data):
        if learner.must_decide():
            _decide(learner, data)
            _write(world, last, learner.state())
        start = time.perf_counter()
        for step in range(learner.step, steps):
            loss = _do_step(learner, stream, out)
            tracker.scalars(
                epoch * steps + step,
                {"train/loss": loss, "train/learning_rate": learner.rate},
            )
            minutes = (time.monotonic() - saved) / 60
            if minutes >= recipe.schedule.save_minutes and step + 1 < steps:
                learner.seconds += time.perf_counter() - start
                _write(world, last, learner.state())
                start, saved = time.perf_counter(), time.monotonic()
        learner.seconds += time.perf_counter() - start
        checked = _validate(learner, stream, data, tracker)
        scores = _scores(checked, names, recipe.classifies)
        entry, weights = learner.end_epoch(scores, checked.seconds)
        if weights is not None:
            per_class = class_scores(checked.counts, names)
            metrics = entry | {"per_class": per_class}
            metrics["confusion"] = checked.counts.tolist()
            kept = {"model": weights, "metrics": metrics}
            _write(world, _checkpoint_uri(out, name, "best"), kept)
            for number, picture in enumerate(checked.pictures):
                files.write_bytes(example_uri(out, number), picture)
        _write(world, last, learner.state())
        saved = time.monotonic()
        if world.rank == 0:
            lines = "".join(json.dumps(each) + "\n" for each in learner.history)
            files.write_bytes(history_uri(out), lines.encode())
        tracker.epoch((epoch + 1) * steps, entry)
        told(entry)
        if learner.is_over():
            break
    if learner.teacher is not None and world.rank == 0:
        files.write_json(teacher_uri(out), _beside_teacher(learner, data))


def _start(
    world: World,
    recipe: Recipe,
    model_config: ModelConfig,
    patches: int,
    steps: int,
    measures: Mapping[str, npt.NDArray[np.float64]],
    last: str,
) -> Learner:
    """Build the model and what changes it, as the last checkpoint left them."""
    try:
        learner = Learner(world, recipe, model_config, patches, steps, measures)
        if files.exists(last):
            learner.load_state(_load(last))
    except MedrayError as error:
        _raise_together(world, f"{error}")
        raise  # not reached
    _raise_together(world, None)
    return learner


def _epochs(learner: Learner, data: str) -> Iterator[tuple[int, Iterator[MicroBatch]]]:
    """Give each epoch that is left, and the parts that are read for this worker.

    One chain of Ray Data reads several epochs, so that the next one is under way while
    this one ends; where the order follows the losses, it reads one.
    """
    recipe, world, steps = learner.recipe, learner.world, learner.steps
    checks = -(-len(usable_patches(data, "val", recipe)) // val_batch(data))
    epochs = recipe.schedule.epochs
    readers = (os.cpu_count() or 1) // (2 * world.local_size)
    readers = min(_MOST_READERS, max(1, readers))
    while learner.epoch < epochs and not learner.is_over():
        places: list[Place] = []
        first = end = learner.epoch
        while end < epochs and (
            end == first
            or (len(places) < _STREAM_MICRO_BATCHES and not recipe.data.hard)
        ):
            begin = learner.step if end == first else 0
            share = world.share(recipe.micro_batches)
            places += [Place(end, s, p) for s in range(begin, steps) for p in share]
            places += [Place(end, steps, batch) for batch in world.share(checks)]
            end += 1
        losses = learner.order_losses.numpy().tobytes() if recipe.data.hard else b""
        stream = read_micro_batches(places, recipe, data, steps, losses, readers)
        for epoch in range(first, end):
            yield epoch, stream


def _do_step(learner: Learner, stream: Iterator[MicroBatch], out: str) -> float:
    """Take this worker's parts from the stream and learn from them."""
    world, number = learner.world, learner.step
    micro_batches: list[MicroBatch] = []
    failure = None
    start = time.perf_counter()
    try:
        micro_batches = [
            next(stream) for _ in world.share(learner.recipe.micro_batches)
        ]
        learner.waited += time.perf_counter() - start
        _bound_damage(learner, micro_batches)
    except MedrayError as error:
        failure = f"{error}"
    batches = [
        Batch(
            micro_batch.crops.images,
            micro_batch.crops.masks,
            micro_batch.crops.patches,
            micro_batch.unlabelled,
        )
        for micro_batch in micro_batches
    ]
    loss, failure = learner.do_step(batches, failure)
    if not np.isfinite(loss):
        if failure is not None and batches:
            failure += _keep_batch(out, learner, number, batches)
        _raise_together(world, failure)
    return loss


def _bound_damage(learner: Learner, micro_batches: list[MicroBatch]) -> None:
    """Note damaged patches, and stop where they are too many."""
    patches = len(learner.losses)
    for micro_batch in micro_batches:
        learner.damaged |= micro_batch.crops.damaged
    most = max(_LEAST_DAMAGED, patches // 100)
    if len(learner.damaged) > most:
        name, problem = next(iter(learner.damaged.items()))
        raise FormatError(
            f"{len(learner.damaged)} of {patches} training patches are damaged, more "
            f"than {most} are not left out; the first is {name}: {problem}"
        )


def _keep_batch(out: str, learner: Learner, number: int, batches: list[Batch]) -> str:
    """Store what a step was given when it went wrong, and say where."""
    name = f"epoch-{learner.epoch}-step-{number}-rank-{learner.world.rank}.npz"
    uri = files.join(out, "failures", name)
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        images=np.concatenate([batch.images for batch in batches]),
        masks=np.concatenate([batch.masks for batch in batches]),
        patches=np.concatenate([batch.patches for batch in batches]),
    )
    files.write_bytes(uri, buffer.getvalue())
    return f"; its crops are kept in {uri}"


def _raise_together(world: World, failure: str | None) -> None:
    """Raise what any of the world has to say, on all of them."""
    said = dict.fromkeys(problem for problem in world.gather(failure) if problem)
    if said:
        raise TrainingError("; ".join(said))


def _decide(learner: Learner, data: str) -> None:
    """Weigh the encoder's stages at the start of an adaptive phase, by rank 0."""
    world, recipe = learner.world, learner.recipe
    weighed: dict[str, float] = {}
    failure = None
    if world.rank == 0:
        micro_batch_size = val_batch(data)
        batches = -(-len(usable_patches(data, "val", recipe)) // micro_batch_size)
        most = max(1, _WEIGHED // micro_batch_size)
        chosen = np.linspace(0, batches - 1, min(batches, most)).round().astype(int)
        try:
            crops = [
                read_val(data, recipe, at * micro_batch_size, micro_batch_size)
                for at in chosen
            ]
            given = [(c.images, c.masks, c.patches) for c in crops]
            weighed = learner.weigh_stages(given)
        except MedrayError as error:
            failure = f"{error}"
    _raise_together(world, failure)
    learner.decide(world.gather(weighed)[0])


# --- check ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Checked:
    """What the validation patches tell of a model.

    Attributes:
        counts: (C, C) truth against prediction, see medray.evaluation.metrics.
        small: (4,) of small objects, see there.
        loss: Its mean.
        pictures: JPEGs of some of them; none but on rank 0.
        seconds: That it took.
    """

    counts: npt.NDArray[np.int64]
    small: npt.NDArray[np.int64]
    loss: float
    pictures: list[bytes]
    seconds: float


def _validate(
    learner: Learner, stream: Iterator[MicroBatch], data: str, tracker: Tracker
) -> _Checked:
    """Predict the validation patches."""
    start = time.perf_counter()
    world, classes = learner.world, read_dataset(data).classes
    patches = usable_patches(data, "val", learner.recipe)
    micro_batch_size, classifies = val_batch(data), learner.recipe.classifies
    shown = [] if classifies else _examples(patches, micro_batch_size, world)
    pictures: list[bytes] = []
    counts = np.zeros((len(classes), len(classes)), np.int64)
    small = np.zeros(4, np.int64)
    loss = seen = 0.0
    failure = None
    learner.share_what_was_seen()
    try:
        for _ in world.share(-(-len(patches) // micro_batch_size)):
            crops = next(stream).crops
            learner.damaged |= crops.damaged
            if not len(crops.images):
                continue
            predicted, part_loss = learner.predict(
                crops.images, crops.masks, crops.patches
            )
            loss += part_loss * len(crops.images)
            seen += len(crops.images)
            rows = zip(crops.patches, crops.masks, predicted, crops.sizes, strict=True)
            for at, (index, truth, guess, (h, w)) in enumerate(rows):
                truth, guess = truth[:h, :w], guess[:h, :w]
                if classifies:
                    truth = np.full_like(guess, np.bincount(truth.ravel()).argmax())
                counts += confusion(truth, guess, len(classes))
                if not classifies:
                    small += small_objects(truth, guess)
                if index in shown:
                    pixels = np.moveaxis(crops.images[at][:, :h, :w], 0, 2)
                    picture = draw_overlay(pixels, truth, guess, classes)
                    _show(learner, tracker, len(pictures), picture, crops.images[at])
                    pictures.append(picture)
    except MedrayError as error:
        failure = f"{error}"
    _raise_together(world, failure)
    gathered = world.gather((counts, small, loss, seen))
    counts, small, loss, seen = (
        sum(micro_batch[i] for micro_batch in gathered) for i in range(4)
    )
    seconds = time.perf_counter() - start
    return _Checked(counts, small, loss / max(seen, 1), pictures, seconds)


def _beside_teacher(learner: Learner, data: str) -> Row:
    """Set the teacher's scores and speed on validation patches beside the student's.

    Returns:
        By `teacher` and `student`: f1, parameters, patches_per_second; of the student
        as it is after the last epoch.
    """
    classes = read_dataset(data).classes
    models: dict[str, tuple[Any, Any]] = {
        "teacher": (learner.teacher, learner.predict_as_teacher),
        "student": (learner.kept, lambda x: learner.predict(x, _no_labels(x))[0]),
    }
    counts = {name: np.zeros((len(classes), len(classes)), np.int64) for name in models}
    seconds = dict.fromkeys(models, 0.0)
    patches = len(usable_patches(data, "val", learner.recipe))
    seen = 0
    micro_batch_size = val_batch(data)
    for first in range(0, min(patches, _COMPARED), micro_batch_size):
        crops = read_val(data, learner.recipe, first, micro_batch_size)
        if not len(crops.images):
            continue
        for name, (_, predict) in models.items():
            if not seen:
                predict(crops.images)  # what is chosen at first use is then chosen
            start = time.perf_counter()
            predicted = predict(crops.images)
            seconds[name] += time.perf_counter() - start
            rows = zip(crops.masks, predicted, crops.sizes, strict=True)
            for truth, guess, (h, w) in rows:
                counts[name] += confusion(truth[:h, :w], guess[:h, :w], len(classes))
        seen += len(crops.images)
    return {
        name: {
            "f1": summary(counts[name], classes.names)["f1"],
            "parameters": sum(p.numel() for p in network.parameters()),
            "patches_per_second": seen / max(seconds[name], 1e-9),
        }
        for name, (network, _) in models.items()
    }


def _no_labels(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.zeros_like(images[:, 0])


def _examples(patches: list[Row], micro_batch_size: int, world: World) -> list[int]:
    """Choose patches of rank 0 to show: large ones with something to find, spread."""
    if world.rank:
        return []
    mine = [i for i in range(len(patches)) if i // micro_batch_size % world.size == 0]
    found = [i for i in mine if any(patches[i]["class_px"][1:])] or mine
    most = max(patches[i]["height"] * patches[i]["width"] for i in found)
    candidates = [
        i for i in found if 2 * patches[i]["height"] * patches[i]["width"] >= most
    ]
    places = np.linspace(0, len(candidates) - 1, _EXAMPLES).round().astype(int)
    return list(dict.fromkeys(candidates[i] for i in places))


def _show(
    learner: Learner,
    tracker: Tracker,
    number: int,
    picture: bytes,
    pixels: npt.NDArray[np.uint8],
) -> None:
    """Show a prediction in TensorBoard; with the first, what the network is made of."""
    step = (learner.epoch + 1) * learner.steps
    drawn = np.asarray(Image.open(io.BytesIO(picture)))
    tracker.picture(step, f"validation/{number}", drawn)
    if number == 0:
        kernels = first_kernels(learner.kept)
        if kernels is not None:
            tracker.picture(step, "network/first_kernels", kernels)
        image = torch.from_numpy(pixels.copy())[None].to(learner.world.device)
        maps = score_maps(learner.kept.eval(), learner.normalise(image))
        for name, drawn in maps.items():
            tracker.picture(step, f"network/{name}", drawn)


def _scores(checked: _Checked, names: Sequence[str], classifies: bool) -> Row:
    """Give an epoch's scores, and a warning where they hide that nothing is learned."""
    counts = checked.counts
    counted = of_images(counts, names) if classifies else (counts, names)
    scores: Row = dict(summary(*counted)) | small_scores(checked.small)
    scores["val_loss"] = checked.loss if np.isfinite(checked.loss) else None
    true, predicted = (np.flatnonzero(counts.sum(axis=axis)) for axis in (1, 0))
    if len(predicted) == 1 and len(true) > 1:
        scores["warning"] = (
            f"everything was predicted as {names[predicted[0]]}; if that goes on, "
            f"lower optimizer.lr, or set data.balance"
        )
    return scores


# --- keep -----------------------------------------------------------------------------


def history_uri(out: str) -> str:
    """Give the place of a training's epochs, a JSON object a line."""
    return files.join(out, "metrics.jsonl")


def example_uri(out: str, number: int) -> str:
    """Give the place of a validation patch's picture, as the best epoch saw it."""
    return files.join(out, "examples", f"{number}.jpg")


def teacher_uri(out: str) -> str:
    """Give the place of the student's figures beside the teacher's."""
    return files.join(out, "teacher.json")


def read_best(out: str, name: str) -> Row:
    """Read what was kept of the best epoch: `model` (weights) and `metrics`.

    Raises:
        FormatError: It is absent or damaged.
    """
    return _load(_checkpoint_uri(out, name, "best"))


def _checkpoint_uri(out: str, name: str, which: str) -> str:
    return files.join(out, "checkpoints", f"{name}-{which}.pt")


def _write(world: World, uri: str, state: Row) -> None:
    """Store a checkpoint; it counts once it is whole."""
    if world.rank == 0:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        files.write_bytes(uri, buffer.getvalue())


def _load(uri: str) -> Row:
    try:
        data = io.BytesIO(files.read_bytes(uri))
        state: Row = torch.load(data, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        problem = " ".join(str(error).split())[:200]
        raise FormatError(
            f"{uri}: expected a checkpoint, found {problem}; remove the folder "
            f"`checkpoints`, and the training starts from the beginning"
        ) from error
    return state
