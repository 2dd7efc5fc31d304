"""What napari makes of a mask: its layers. The window needs a screen and is tried by
`benchmarks/viewers.py`."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medray import open_mask
from medray.convert import convert
from medray.run import LAYERS, read_run

pytestmark = pytest.mark.slow


@pytest.fixture
def viewer(monkeypatch: pytest.MonkeyPatch) -> Any:
    components = pytest.importorskip(
        "napari.components", reason="napari is not installed; `make test-slow` does it"
    )
    monkeypatch.setenv("NAPARI_CONFIG", "")  # no settings in the home folder
    import npe2

    npe2.PluginManager.instance().discover()
    return components.ViewerModel()


def opened(viewer: Any, place: Path) -> dict[str, Any]:
    """Give the layers of a kind by their names."""
    viewer.open(str(place), plugin="napari-ome-zarr")
    kinds: dict[str, Any] = {"Image": {}, "Labels": {}}
    for layer in viewer.layers:
        kinds[type(layer).__name__][layer.name] = layer
    return kinds


def check(layer: Any, run: Path, slide: str) -> None:
    """Its pixels at every level, micrometres, and the names and colours of classes."""
    mask = str(run / f"masks/{slide}.ome.zarr")
    for level, found in enumerate(layer.data):
        np.testing.assert_array_equal(found, open_mask(mask, level))
    assert [*layer.scale] == [0.5, 0.5]
    assert {str(unit) for unit in layer.units} == {"micrometer"}
    classes = read_run(str(run)).classes
    assert tuple(layer.features["class"]) == classes.names
    for value, color in enumerate(classes.colors[1:], start=1):
        wanted = [int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        np.testing.assert_allclose(layer.get_color(value)[:3], wanted, atol=1e-6)


def test_napari_shows_a_mask_as_labels(viewer: Any, layered: Path) -> None:
    run = layered / "run"
    layers = opened(viewer, run / "masks/s0.ome.zarr")
    (mask,) = layers["Labels"].values()
    check(mask, run, "s0")
    assert not layers["Image"]


@pytest.mark.parametrize("to", ["ome-zarr", "ome-zarr-0.4"])
def test_napari_shows_image_and_mask_of_one_group(
    cluster: None, viewer: Any, layered: Path, tmp_path: Path, to: Any
) -> None:
    run = layered / "run"
    assert not convert(str(run), to=to, out=str(tmp_path), with_image=True).failed
    layers = opened(viewer, tmp_path / "s0.ome.zarr")
    check(layers["Labels"]["mask"], run, "s0")
    assert set(layers["Labels"]) == {"mask", *LAYERS}
    channels = [layer.data[0].shape for layer in layers["Image"].values()]
    assert channels == [(1500, 2200)] * 3
