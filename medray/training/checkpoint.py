"""The files of a training in its model folder, and how they are read again.

MODEL/
checkpoints/NAME-last.pt  all that the next step depends on
checkpoints/NAME-best.pt  weights and metrics of the best epoch
metrics.jsonl             an entry for each epoch
examples/                 validation patches as the best epoch saw them
teacher.json              the student compared with its teacher
failures/                 crops of a step that went wrong
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from medray.errors import FormatError
from medray.storage import files
from medray.training.crops import Batch
from medray.types import Row


def history_uri(out: str) -> str:
    """Return the address of a training's epochs: JSON lines, one object per epoch."""
    return files.join(out, "metrics.jsonl")


def example_uri(out: str, number: int) -> str:
    """Return the address of a validation patch's picture."""
    return files.join(out, "examples", f"{number}.jpg")


def teacher_uri(out: str) -> str:
    """Return the address of the student's figures next to the teacher's."""
    return files.join(out, "teacher.json")


def repeat_uri(out: str, seed: int) -> str:
    """Return the folder of the same training with another seed."""
    return files.join(out, "repeats", f"seed-{seed}")


def read_history(out: str) -> list[Row]:
    """Read the epochs of a training, as far as they are done."""
    uri = history_uri(out)
    if not files.exists(uri):
        return []
    return [json.loads(line) for line in files.read_bytes(uri).splitlines()]


def read_best(out: str, name: str) -> Row:
    """Read the checkpoint of the best epoch: `model` (weights) and `metrics`.

    Raises:
        FormatError: It is absent or damaged.
    """
    return _load(Checkpoints(out, name, False).uri("best"))


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training; of its workers only one writes them.

    Attributes:
        out: Model folder.
        name: Of this very training.
        writes: Whether this worker is that one.
    """

    out: str
    name: str
    writes: bool

    def uri(self, which: str) -> str:
        """Return the address of the `last` or the `best` one."""
        return files.join(self.out, "checkpoints", f"{self.name}-{which}.pt")

    def read_last(self) -> Row | None:
        """Read the last state, if there is one.

        Raises:
            FormatError: It is damaged.
        """
        uri = self.uri("last")
        return _load(uri) if files.exists(uri) else None

    def write_last(self, state: Row) -> None:
        """Store a state; it counts once it is whole."""
        self._write("last", state)

    def write_best(self, weights: Row, metrics: Row, pictures: Sequence[bytes]) -> None:
        """Store the checkpoint of the best epoch."""
        self._write("best", {"model": weights, "metrics": metrics})
        for number, picture in enumerate(pictures):
            files.write_bytes(example_uri(self.out, number), picture)

    def write_history(self, history: Sequence[Row]) -> None:
        """Write the entries of all epochs that are over."""
        if self.writes:
            lines = "".join(json.dumps(entry) + "\n" for entry in history)
            files.write_bytes(history_uri(self.out), lines.encode())

    def _write(self, which: str, state: Row) -> None:
        if self.writes:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            files.write_bytes(self.uri(which), buffer.getvalue())


def keep_crops(out: str, name: str, batches: Sequence[Batch]) -> str:
    """Store the crops of a step that went wrong, and return where."""
    uri = files.join(out, "failures", f"{name}.npz")
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        images=np.concatenate([batch.images for batch in batches]),
        masks=np.concatenate([batch.masks for batch in batches]),
        patches=np.concatenate([batch.patches for batch in batches]),
    )
    files.write_bytes(uri, buffer.getvalue())
    return uri


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
