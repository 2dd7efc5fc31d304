"""Images in class folders that end the processes that read them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from image_cells import write_cells


@pytest.mark.parametrize("executor", ["ray", "processes"])
def test_images_that_end_their_reader_cost_only_themselves(
    executor: str, tmp_path: Path
) -> None:
    """With the bugs of tests/faulty in the decoder."""
    cells = write_cells(tmp_path / "cells", patients=4, each=3)
    pixels = np.full((64, 64, 3), 200, np.uint8)
    pixels[20, 20:23] = np.frombuffer(b"<CRASH>..", np.uint8).reshape(3, 3)
    tifffile.imwrite(
        cells / "sick" / "crashes.tif", pixels, tile=(64, 64), photometric="rgb"
    )
    command = [sys.executable, "-m", "medray.cli", "ingest", str(cells), "--json"]
    command += ["--side", "32", "--out", str(tmp_path / "dataset")]
    command += ["--executor", executor]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    path = [os.environ.get("PYTHONPATH", ""), str(Path(__file__).parents[2] / "faulty")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found["failed"]) == ["sick/crashes.tif"]
    assert "quarantined" in found["failed"]["sick/crashes.tif"]
    assert found["images"] == 24
