"""A run and a truth of two images of one file are not set side by side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from serial_ingest import ingest

from medray.classes import Classes
from medray.datasets.dataset import labels_uri
from medray.errors import ConfigError
from medray.evaluation.truth_files import find_ground_truth
from medray.slides.discovery import find_slides


def test_a_truth_of_another_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    with tifffile.TiffWriter(tmp_path / "slides" / "x.ome.tif", ome=True) as tiff:
        for seed in range(2):
            rng = np.random.default_rng(seed)
            pixels = rng.integers(0, 200, (300, 400, 3), dtype=np.uint8)
            tiff.write(pixels, photometric="rgb", tile=(128, 128))
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "x.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 400 300">'
        '<rect x="9" y="9" width="90" height="80"/></svg>'
    )
    rows = ingest(tmp_path / "slides", tmp_path / "data", notes, mpp=0.5)
    assert rows["x"]["status"] == "done"
    data = str(tmp_path / "data")
    wanted = find_slides([str(tmp_path / "slides")])
    places, _ = find_ground_truth(wanted, data, Classes())
    assert places == {"x": labels_uri(data, "x")}
    for what in ("scene", "plane"):
        other = [replace(wanted[0], **{what: 1})]
        with pytest.raises(ConfigError, match=f"no --{what}, the run of .*--{what} 1"):
            find_ground_truth(other, data, Classes())
