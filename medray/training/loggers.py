"""Logging of a training while it runs: TensorBoard, and MLflow where it is set up.

TensorBoard's events lie in MODEL/tensorboard; of a model folder in a bucket they are
kept in the bucket too. MLflow is used when MLFLOW_TRACKING_URI is set and the extra
`mlflow` is installed.
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tensorboardX import SummaryWriter

from medray.storage import files

log = logging.getLogger(__name__)
_MLFLOW = "MLFLOW_TRACKING_URI"


class Tracker:
    """Logs the metrics of one training; only one of its workers does."""

    def __init__(
        self, out: str, *, step: int, name: str, settings: dict[str, Any], shown: bool
    ) -> None:
        """Open the loggers.

        Args:
            out: Model folder.
            step: From which training resumes; what was logged of later ones is void.
            name: Of this very training.
            settings: Its recipe.
            shown: Whether this worker is the one that logs.
        """
        self._writer: Any = None
        self._mlflow: Any = None
        self._out = files.join(out, "tensorboard")
        if not shown:
            return
        self._folder = self._out
        if not files.is_local(out):
            self._folder = tempfile.mkdtemp(prefix="medray-")
        self._writer = SummaryWriter(self._folder, purge_step=step or None)
        if os.environ.get(_MLFLOW):
            self._mlflow = _start_mlflow(name, settings)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log scalars of a step."""
        if self._writer is None:
            return
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def epoch(self, step: int, entry: dict[str, Any]) -> None:
        """Log an epoch's numbers, and store all that was logged so far."""
        if self._writer is None:
            return
        numbers = {k: v for k, v in entry.items() if isinstance(v, (int, float))}
        self.scalars(step, {f"epoch/{name}": value for name, value in numbers.items()})
        self._writer.flush()
        if self._mlflow is not None:
            self._mlflow.log_metrics(numbers, step=step)
        if not files.is_local(self._out):
            for path in Path(self._folder).iterdir():
                files.write_bytes(files.join(self._out, path.name), path.read_bytes())

    def picture(self, step: int, name: str, pixels: npt.NDArray[np.uint8]) -> None:
        """Log an image, (H, W, 3) or (H, W) uint8."""
        if self._writer is not None:
            layout = "HWC" if pixels.ndim == 3 else "HW"
            self._writer.add_image(name, pixels, step, dataformats=layout)

    def close(self) -> None:
        """Close the loggers."""
        if self._writer is not None:
            self._writer.close()
        if self._mlflow is not None:
            self._mlflow.end_run()


def _start_mlflow(name: str, settings: dict[str, Any]) -> Any:
    """Start or resume the MLflow run of that name."""
    try:
        import mlflow
    except ImportError:
        log.warning("%s is set, but mlflow is missing: medray[mlflow]", _MLFLOW)
        return None
    mlflow.set_experiment("medray")
    found = mlflow.search_runs(
        filter_string=f"attributes.run_name = '{name}'", output_format="list"
    )
    if found:
        mlflow.start_run(run_id=found[0].info.run_id)
    else:
        mlflow.start_run(run_name=name)
        mlflow.log_dict(settings, "recipe.json")
    return mlflow
