"""A recipe and a dataset -> a model folder.

The way of a patch, top to bottom:

    order    which crop of which patch comes when: medray/training/sampler.py
    feed     CPU tasks of Ray Data cut the crops from the zarr chunks:
             medray/training/dataloader.py
    loop     the workers learn, check and keep: medray/training/trainer.py,
             medray/training/learner.py
    model    the best weights become the model folder, the epochs its report: here
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import ray.train
import ray.train.torch

from medray.datasets.dataset import (
    holds_images,
    morphology_uri,
    read_dataset,
    read_morphology,
)
from medray.errors import ConfigError
from medray.execution import cluster
from medray.models.config import (
    ModelConfig,
    Morphology,
    is_exported,
    model_digest,
    read_config,
)
from medray.models.folder import read_seen, save_model, write_seen
from medray.models.weights import is_file
from medray.storage import files
from medray.storage.lock import locked
from medray.storage.yaml_config import to_dict
from medray.training.recipe import Recipe, read_recipe
from medray.training.report import write_training_report
from medray.training.sampler import usable_patches
from medray.training.trainer import build_network
from medray.training.worker import (
    TrainingError,
    example_uri,
    history_uri,
    read_best,
    run_worker,
    teacher_uri,
)
from medray.types import Row

log = logging.getLogger(__name__)

_LIVES = 3  # times that dead workers are replaced
_MPP_APART = 0.15  # relative difference of resolutions that is taken for none


@dataclass(frozen=True)
class Training:
    """What a training did.

    Attributes:
        out: The model folder.
        trained: False if the model was there already.
        epochs: Epochs that were trained.
        f1: Best F1 on the validation patches; None if they hold no foreground.
        report: Its page.
        seconds: Wall time, Ray's start apart.
    """

    out: str
    trained: bool
    epochs: int
    f1: float | None
    report: str
    seconds: float


def train(
    recipe: str,
    *,
    data: str,
    out: str,
    overrides: Sequence[str] = (),
    repeats: int = 1,
) -> Training:
    """Train a model as a recipe says.

    Running the same command again goes on from the last checkpoint, and does nothing
    once the model is there.

    Args:
        recipe: YAML file, see recipes/.
        data: Dataset, as `medray ingest` writes it.
        out: Model folder to make.
        overrides: Keys of the recipe to change, such as `optimizer.lr=1e-4`.
        repeats: Trainings with seeds one apart. The recipe's own seed makes the model,
            the others lie in OUT/repeats; the report says mean and spread.

    Raises:
        ConfigError: The recipe, the dataset or both together are wrong, OUT holds
            another model, or another process works there.
        TrainingError: The training cannot go on.
    """
    settings = read_recipe(recipe, overrides)
    data, out = files.absolute(data), files.absolute(out)
    if repeats < 1:
        raise ConfigError(f"repeats: expected 1 or more, found {repeats}")
    with locked(out, "train"):
        results = [_train(settings, data, out)]
        for extra in range(1, repeats):
            again = replace(settings, seed=settings.seed + extra)
            place = files.join(out, "repeats", f"seed-{again.seed}")
            results.append(_train(again, data, place))
        if repeats > 1:
            _note_repeats(out, results)
    return replace(
        results[0],
        trained=any(result.trained for result in results),
        seconds=sum(result.seconds for result in results),
    )


def _with_absolute_paths(settings: Recipe) -> Recipe:
    """Workers run in folders of their own."""
    if settings.teacher is not None:
        teacher = files.absolute(settings.teacher.model)
        settings = replace(settings, teacher=replace(settings.teacher, model=teacher))
    if settings.prune is not None:
        model = files.absolute(settings.prune.model)
        settings = replace(settings, prune=replace(settings.prune, model=model))
    if settings.weights and is_file(settings.weights):
        settings = replace(settings, weights=files.absolute(settings.weights))
    return settings


def _note_repeats(out: str, results: Sequence[Training]) -> None:
    """Write the spread of the best scores into metrics.json and the report."""
    metrics = files.read_json(files.join(out, "metrics.json"))
    scores = [result.f1 for result in results if result.f1 is not None]
    spread: Row = {"f1": scores, "mean": None, "std": None}
    if len(scores) > 1:
        spread |= {
            "mean": float(np.mean(scores)),
            "std": float(np.std(scores, ddof=1)),
        }
    metrics["repeats"] = spread
    files.write_json(files.join(out, "metrics.json"), metrics)
    _write_report(out, read_config(out), metrics)


def _train(settings: Recipe, data: str, out: str) -> Training:
    def run(settings: Recipe, model_config: ModelConfig, name: str) -> None:
        _check_workers(settings)
        _run(settings, model_config, data, out, name)

    return train_with(run, settings, data, out)


def train_with(
    run: Callable[[Recipe, ModelConfig, str], None],
    settings: Recipe,
    data: str,
    out: str,
) -> Training:
    """Train a model as a recipe says, by other means than Ray Train.

    Args:
        run: Trains by `medray.training.worker.train_as`; takes the recipe, what
            inference must know, and the training's name.
        settings: The recipe.
        data: Dataset.
        out: Model folder to make; nobody else may work there.

    Raises:
        ConfigError: The recipe, the dataset or both together are wrong, or OUT holds
            another model.
        TrainingError: The training cannot go on.
    """
    settings = _with_absolute_paths(settings)
    provenance = _provenance(settings, data)
    if (before := _trained_before(out, provenance)) is not None:
        return before
    patches = {
        split: usable_patches(data, split, settings) for split in ("train", "val")
    }
    _check_patches(patches, data)
    model_config = _model_config(settings, patches["train"], data)
    _check_inputs(settings, model_config, data)
    network = build_network(settings, len(model_config.classes))
    cluster.connect()
    log.info(
        "training on %d patches, validating on %d, into %s",
        len(patches["train"]),
        len(patches["val"]),
        out,
    )
    start = time.perf_counter()
    # The name holds the digest: only the very same training is resumed.
    name = provenance["digest"].removeprefix("blake2b:")
    run(settings, model_config, name)
    best = read_best(out, name)
    history = read_history(out)
    metrics = best["metrics"] | {"history": history}
    model_config = replace(
        model_config, provenance=provenance | {"epochs": len(history)}
    )
    network.load_state_dict(best["model"])
    if settings.teacher is not None:
        metrics["teacher"] = files.read_json(teacher_uri(out))
    metrics["parameters"] = sum(p.numel() for p in network.parameters())
    _write_report(out, model_config, metrics)
    if holds_images(data):
        write_seen(out, _seen(settings, patches))
    save_model(out, model_config, network, metrics)
    seconds = time.perf_counter() - start
    page = files.join(out, "training.html")
    return Training(out, True, len(history), metrics["f1"], page, seconds)


def _seen(settings: Recipe, patches: dict[str, list[Row]]) -> dict[str, str]:
    """Tell which images have a part in a classifier: "train" or "val" by digest.

    What another model has learned from comes along with its weights.
    """
    seen = {row["digest"]: split for split in patches for row in patches[split]}
    if settings.weights and is_file(settings.weights):
        for digest, how in read_seen(settings.weights.rpartition("/")[0]).items():
            if how == "train" or digest not in seen:
                seen[digest] = how
    return seen


def _model_config(settings: Recipe, patches: list[Row], data: str) -> ModelConfig:
    """Give what inference must know; training itself uses it too."""
    model_config = ModelConfig(
        architecture=settings.model,
        classes=read_dataset(data).classes,
        window=settings.window,
        mpp=_mpp(patches),
        stain=settings.stain,
        morphology=_morphology(patches, data) if settings.model.morphology else None,
    )
    if settings.scaling != "imagenet":
        model_config = replace(model_config, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    if settings.scaling == "zscore":
        model_config = replace(model_config, zscore=True)
    return model_config


def _morphology(patches: list[Row], data: str) -> Morphology:
    """Give how measures of cells are standardised: by those of the training images."""
    names, values = read_morphology(data, patches)
    std = values.std(axis=0)
    std[std == 0] = 1  # the same for all
    mean = values.mean(axis=0)
    return Morphology(names, tuple(mean.tolist()), tuple(std.tolist()))


def _run(
    settings: Recipe, model_config: ModelConfig, data: str, out: str, name: str
) -> None:
    """Have Ray Train run the loop on the workers; what died is started again."""
    gpu = bool(cluster.gpus())
    config = {
        "recipe": to_dict(settings),
        "model_config": to_dict(model_config),
        "data": data,
        "out": out,
        "name": name,
    }
    trainer = ray.train.torch.TorchTrainer(
        run_worker,
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.workers,
            use_gpu=gpu,
            # Half a CPU on machines without GPUs: the tasks that read need some too.
            resources_per_worker={"GPU": 1} if gpu else {"CPU": 0.5},
            placement_strategy="PACK" if gpu else "SPREAD",
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=files.join(out, "checkpoints", "ray"),
            failure_config=ray.train.FailureConfig(max_failures=_LIVES),
        ),
    )
    try:
        with _telling_epochs(out):
            failure = trainer.fit().return_value
    except ray.train.TrainingFailedError as error:
        problem = str(error).strip().splitlines()[-1][:300]
        half = max(1, settings.crops_per_micro_batch // 2)
        raise TrainingError(
            f"workers of the training died {_LIVES + 1} times, the last time by: "
            f"{problem}; if it was memory, micro_batch_size={half} needs half; run the "
            f"same command again to go on"
        ) from error
    if failure:
        raise TrainingError(failure)


def _write_report(out: str, model_config: ModelConfig, metrics: Row) -> None:
    uris = [example_uri(out, number) for number in range(100)]
    pictures = []
    for uri in uris:
        if not files.exists(uri):
            break
        pictures.append(files.read_bytes(uri))
    write_training_report(out, model_config, metrics, pictures)


@contextmanager
def _telling_epochs(out: str) -> Iterator[None]:
    """Log each epoch that the workers add to metrics.jsonl.

    Ray Train keeps the driver waiting until the training is over.
    """
    over = threading.Event()

    def tell() -> None:
        told = len(read_history(out))
        while True:
            ended = over.wait(1.0)
            for entry in read_history(out)[told:]:
                told += 1
                score = "none" if entry["f1"] is None else f"{entry['f1']:.4f}"
                log.info(
                    "stage=train epoch=%d loss=%.4f f1=%s crops/s=%.1f seconds=%.1f",
                    entry["epoch"],
                    entry["loss"],
                    score,
                    entry["crops_per_second"],
                    entry["seconds"],
                )
                if entry.get("warning"):
                    log.warning("%s", entry["warning"])
                if entry["damaged"]:
                    log.warning("%d damaged patches were left out", entry["damaged"])
            if ended:
                return

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def read_history(out: str) -> list[Row]:
    """Read the epochs of a training, as far as they are done."""
    uri = history_uri(out)
    if not files.exists(uri):
        return []
    return [json.loads(line) for line in files.read_bytes(uri).splitlines()]


def _provenance(recipe: Recipe, data: str) -> Row:
    """Name a training: equal digests mean equal recipe and data."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(to_dict(recipe), sort_keys=True).encode())
    for other in (recipe.teacher, recipe.prune):
        if other is not None:
            digest.update(model_digest(other.model).encode())
    names = ["dataset.yaml", "patches.parquet"]
    if recipe.model.morphology and files.exists(morphology_uri(data)):
        names.append("morphology.parquet")
    for name in names:
        uri = files.join(data, name)
        if not files.exists(uri):
            raise ConfigError(
                f"{uri} is missing; `medray ingest IMAGES --annotations MASKS --out "
                f"DATASET` makes a dataset of images and their masks or outlines"
            )
        digest.update(files.read_bytes(uri))
    packages = ("medray", "torch", "torchvision", "segmentation-models-pytorch")
    return {
        "digest": f"blake2b:{digest.hexdigest()}",
        "data": data.rsplit("/", 1)[-1],
        "recipe": to_dict(recipe),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def _trained_before(out: str, provenance: Row) -> Training | None:
    if not files.exists(files.join(out, "model.yaml")):
        return None
    before = read_config(out).provenance
    if before.get("digest") != provenance["digest"]:
        raise ConfigError(
            f"{out}: holds a model of another recipe or dataset; choose another --out, "
            f"or delete this model"
        )
    metrics = files.read_json(files.join(out, "metrics.json"))
    page = files.join(out, "training.html")
    return Training(out, False, before["epochs"], metrics["f1"], page, 0.0)


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
    if known and (
        len(known) < len(resolutions) or max(known) > (1 + _MPP_APART) * min(known)
    ):
        raise ConfigError(
            f"{data}: the slides differ in microns per pixel "
            f"({sorted(map(str, resolutions))}); make a dataset of each resolution"
        )


def _mpp(patches: list[Row]) -> float | None:
    known = [row["mpp"] for row in patches if row["mpp"]]
    return float(np.median(known)) if known else None


def _check_inputs(settings: Recipe, model_config: ModelConfig, data: str) -> None:
    """Check what the recipe refers to, before anything is started."""
    side = read_dataset(data).patch
    if holds_images(data) and not (
        settings.classifies
        and settings.data.crops == (side,)
        and (settings.window.size, settings.window.stride) == (side, side)
    ):
        raise ConfigError(
            f"{data}: holds images of {side} px that have one class each; expected "
            f"model.name=classifier data.crop={side} window.size={side} "
            f"window.stride={side}, found {settings.model.name}, "
            f"{settings.data.crop}, {settings.window.size} and "
            f"{settings.window.stride}"
        )
    if max(settings.data.crops) > side:
        slides = files.read_table(files.join(data, "slides.parquet")).to_pylist()
        partly = [row["slide"] for row in slides if row.get("partly")]
        if partly:
            raise ConfigError(
                f"{data}: {len(partly)} slides, such as {partly[0]}, are annotated "
                f"only in part: crops must lie within patches of {side} px, found "
                f"data.crop={settings.data.crop}"
            )
    how = settings.unlabelled
    if how is not None:
        if not settings.optimizer.average:
            raise ConfigError(
                "unlabelled: needs the moving average that teaches; set "
                "optimizer.average=0.99"
            )
        if not usable_patches(data, "", settings):
            raise ConfigError(
                f"{data}: holds no slides without annotation for `unlabelled`; ingest "
                f"some, or remove `unlabelled` from the recipe"
            )
    for part in (settings.teacher, settings.prune):
        if part is not None and is_exported(part.model):
            raise ConfigError(
                f"{part.model}: comes from `medray export`; give the model folder that "
                f"it was made from"
            )
    if settings.teacher is not None:
        teacher = read_config(settings.teacher.model)
        if teacher.classes != model_config.classes:
            raise ConfigError(
                f"teacher.model: {settings.teacher.model} knows "
                f"{teacher.classes.names}, the dataset {model_config.classes.names}; "
                f"they must be the same"
            )
        if (teacher.mpp or 0) != (model_config.mpp or 0) and not (
            teacher.mpp
            and model_config.mpp
            and abs(teacher.mpp / model_config.mpp - 1) <= _MPP_APART
        ):
            raise ConfigError(
                f"teacher.model: {settings.teacher.model} looks at {teacher.mpp} um "
                f"per pixel, the dataset has {model_config.mpp}; they must be the same"
            )


def _check_workers(settings: Recipe) -> None:
    """Refuse what the cluster can never give, rather than wait for it."""
    kind, there = "GPU", float(cluster.gpus())
    if not there:
        kind, there = "CPU", ray.cluster_resources().get("CPU", 0)
    if settings.fewest > there:
        raise ConfigError(
            f"workers: {settings.fewest} asked for, the cluster has {there:g} {kind}s"
        )
