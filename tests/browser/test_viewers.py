"""What viewers show of a mask on a real screen, and what spatialdata keeps of it."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.viewers.outputs import by_spatialdata
from benchmarks.viewers.shown import VIV, Show, differing, napari, neuroglancer, viv
from medray import open_mask
from medray.apps.convert import convert


@pytest.fixture(scope="module", params=["napari", "neuroglancer", "viv"])
def show(request: pytest.FixtureRequest) -> Iterator[Show]:
    draws = "Xvfb" if request.param == "napari" else "chromium"
    if shutil.which(draws) is None:
        pytest.skip(f"there is no {draws} here")
    if request.param == "viv" and not (VIV / "page.js").exists():
        pytest.skip("Viv is not here; `make test-slow` brings it if there is npm")
    if request.param != "viv":
        pytest.importorskip(request.param, reason="`make test-slow` installs it")
    viewer = {"napari": napari, "neuroglancer": neuroglancer, "viv": viv}
    with viewer[request.param]() as show:
        yield show


def check(show: Show, place: Path, mask: Path) -> None:
    """Each level's pixels on the screen: in the middle, and beyond two edges."""
    for level in range(3):
        wanted = np.asarray(open_mask(str(mask), level))
        assert 0 < wanted.mean() < wanted.max()
        for middle in (wanted.shape[0] // 2, wanted.shape[1] // 2), (90, 250):
            found = show(place, mpp=0.5, factor=2**level, middle=middle)
            assert differing(found, wanted, middle) == 0


def test_a_mask_as_it_is_written(show: Show, layered: Path, tmp_path: Path) -> None:
    # A copy: napari's reader makes a zarr group of the folder two above the mask.
    shutil.copytree(layered / "run", tmp_path / "run")
    mask = tmp_path / "run/masks/s0.ome.zarr"
    check(show, mask, mask)


@pytest.mark.parametrize(
    ("to", "with_image", "inner"),
    [("ome-zarr", True, "labels/mask"), ("ome-zarr-0.4", False, "")],
)
def test_a_converted_mask(
    cluster: None,
    show: Show,
    layered: Path,
    tmp_path: Path,
    to: Any,
    with_image: bool,
    inner: str,
) -> None:
    run = layered / "run"
    assert not convert(str(run), to=to, out=str(tmp_path), with_image=with_image).failed
    check(show, tmp_path / "s0.ome.zarr" / inner, run / "masks/s0.ome.zarr")


def test_spatialdata_gives_a_mask_back(
    cluster: None, layered: Path, tmp_path: Path
) -> None:
    pytest.importorskip("spatialdata", reason="`make test-slow` installs it")
    run = str(layered / "run")
    place = f"{run}/masks/s0.ome.zarr"
    mask = np.asarray(open_mask(place))
    by_spatialdata("mask", place, mask)
    assert not convert(run, to="ome-zarr-0.4", out=str(tmp_path)).failed
    by_spatialdata("ome-zarr-0.4", str(tmp_path / "s0.ome.zarr"), mask)
