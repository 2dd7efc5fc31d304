"""What napari makes of a mask: its layers. What it draws of them: test_viewers.py."""

import importlib.util
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medray import open_mask
from medray.apps.convert import convert
from medray.inference.run import LAYERS, read_run

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("napari") is None,
        reason="napari is not installed; `make test-slow` does it",
    ),
]


def layers_of(place: str) -> list[dict[str, Any]]:
    """Open an OME-Zarr in napari, in a process of its own: it caches all of dask."""
    os.environ["NAPARI_CONFIG"] = ""  # no settings in the home folder
    import npe2
    from napari.components import ViewerModel

    npe2.PluginManager.instance().discover()
    viewer = ViewerModel()
    viewer.open(place, plugin="napari-ome-zarr")
    found = []
    for layer in viewer.layers:
        about = {
            "kind": type(layer).__name__,
            "name": layer.name,
            "levels": [np.asarray(level) for level in layer.data],
            "scale": [*layer.scale],
            "units": [str(unit) for unit in layer.units],
        }
        if about["kind"] == "Labels":
            about["classes"] = [*layer.features["class"]]
            values = range(1, len(about["classes"]))
            about["colors"] = [layer.get_color(value)[:3] for value in values]
        found.append(about)
    return found


@pytest.fixture(scope="module")
def napari() -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        yield pool


def check(layer: dict[str, Any], run: Path, slide: str) -> None:
    """Its pixels at every level, micrometres, and the names and colours of classes."""
    mask = str(run / f"masks/{slide}.ome.zarr")
    for level, found in enumerate(layer["levels"]):
        np.testing.assert_array_equal(found, open_mask(mask, level))
    assert layer["scale"] == [0.5, 0.5]
    assert layer["units"] == ["micrometer"] * 2
    classes = read_run(str(run)).classes
    assert tuple(layer["classes"]) == classes.names
    for color, found in zip(classes.colors[1:], layer["colors"], strict=True):
        wanted = [int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_napari_shows_a_mask_as_labels(
    napari: ProcessPoolExecutor, layered: Path, tmp_path: Path
) -> None:
    # A copy: its reader makes a zarr group of the folder two above the mask.
    run = tmp_path / "run"
    shutil.copytree(layered / "run", run)
    place = str(run / "masks/s0.ome.zarr")
    (mask,) = napari.submit(layers_of, place).result()
    assert mask["kind"] == "Labels"
    check(mask, run, "s0")


@pytest.mark.parametrize("to", ["ome-zarr", "ome-zarr-0.4"])
def test_napari_shows_image_and_mask_of_one_group(
    cluster: None, napari: ProcessPoolExecutor, layered: Path, tmp_path: Path, to: Any
) -> None:
    run = layered / "run"
    assert not convert(str(run), to=to, out=str(tmp_path), with_image=True).failed
    layers = napari.submit(layers_of, str(tmp_path / "s0.ome.zarr")).result()
    labels = {one["name"]: one for one in layers if one["kind"] == "Labels"}
    check(labels["mask"], run, "s0")
    assert set(labels) == {"mask", *LAYERS}
    images = [one["levels"][0].shape for one in layers if one["kind"] == "Image"]
    assert images == [(1500, 2200)] * 3
