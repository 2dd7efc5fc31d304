"""Ray Train around the workers of a training: starts, monitoring, restarts."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray.train
import ray.train.torch

from medray.errors import ConfigError
from medray.execution import cluster
from medray.models import ModelConfig
from medray.storage import files, to_dict
from medray.training.checkpoint import read_history
from medray.training.notices import ask_to_stop, withdraw_stop
from medray.training.recipe import Recipe
from medray.training.worker import run_worker
from medray.training.world import TrainingError

log = logging.getLogger(__name__)

_LIVES = 3  # times that dead workers are replaced


def run_workers(
    settings: Recipe, model_config: ModelConfig, data: str, out: str, name: str
) -> None:
    """Run the training loop on workers by Ray Train, which restarts those that die.

    Raises:
        ConfigError: The cluster never has as many.
        TrainingError: The training cannot go on.
        StoppedError: SIGTERM or Ctrl-C; its state was written if a step ended in time.
    """
    _check_workers(settings)
    withdraw_stop(out)
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
            # Half a CPU on machines without GPUs: processes that read need some too.
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
        with _logging_epochs(out):
            failure = cluster.call_stoppable(
                trainer.fit, lambda: ask_to_stop(out), lambda: _kept(out)
            ).return_value
    except ray.train.TrainingFailedError as error:
        problem = str(error).strip().splitlines()[-1][:300]
        half = max(1, settings.crops_per_micro_batch // 2)
        raise TrainingError(
            f"workers of the training died {_LIVES + 1} times, the last time by: "
            f"{problem}; if it was memory, micro_batch_size={half} needs half; run the "
            f"same command again to go on"
        ) from error
    finally:
        withdraw_stop(out)
    if failure:
        raise TrainingError(failure)


def _kept(out: str) -> str:
    return f"{len(read_history(out))} epochs and the last checkpoint are kept"


def _check_workers(settings: Recipe) -> None:
    """Raise an error for workers that the cluster can never provide."""
    kind, there = "GPU", float(cluster.gpus())
    if not there:
        kind, there = "CPU", ray.cluster_resources().get("CPU", 0)
    if settings.fewest > there:
        raise ConfigError(
            f"workers: {settings.fewest} asked for, the cluster has {there:g} {kind}s"
        )


@contextmanager
def _logging_epochs(out: str) -> Iterator[None]:
    """Log each epoch that the workers add to metrics.jsonl.

    Ray Train keeps the driver waiting until the training is over.
    """
    over = threading.Event()

    def follow() -> None:
        logged = len(read_history(out))
        while True:
            ended = over.wait(1.0)
            for entry in read_history(out)[logged:]:
                logged += 1
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

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
