"""Features of tiles: those of a plain loop, however they came about."""

import functools
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import tifffile
import timm
import torch
import zarr
from serial import CrashError, dying_write

import medray.mil.embed_slides as embedding
from medray.cli import main
from medray.datasets.overrides import with_overrides
from medray.datasets.synthetic import write_slide
from medray.datasets.synthetic_scene import draw_scene
from medray.errors import ConfigError
from medray.execution.commit import Summary
from medray.execution.stage import AnyStage
from medray.mil.embed_slides import embed
from medray.mil.encoder import settle_encoder
from medray.mil.features import FeatureSettings, read_slide
from medray.slides.discovery import find_slides
from medray.slides.opening import open_slide
from medray.slides.tissue import tissue_share

ENCODER, TILE = "test_resnet", 96


def table(folder: Path) -> dict[str, dict]:
    return {r["slide"]: r for r in pq.read_table(folder / "slides.parquet").to_pylist()}


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(3)
    return timm.create_model(ENCODER, num_classes=0).eval()


@pytest.fixture(scope="module")
def weights(network: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("encoder") / "weights.safetensors"
    safetensors.torch.save_file(network.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide, a pyramid at half the resolution, glass, one below a tile, a wreck."""
    folder = tmp_path_factory.mktemp("slides")
    scene = draw_scene(1, height=700, width=900)
    write_slide(folder, "plain", scene)
    write_slide(folder, "fine", scene, mpp=0.25, layout="pyramid")
    write_slide(folder, "small", draw_scene(2, height=80, width=60))
    glass = np.full((512, 512, 3), 244, np.uint8)
    said = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(folder / "glass.tif", glass, photometric="rgb", **said)
    whole = (folder / "plain.tif").read_bytes()
    (folder / "wreck.tif").write_bytes(whole[:300])
    return folder


def in_one_process(
    slides: Path,
    weights: str,
    out: Path,
    region: int = 37,
    crash_after: int = -1,
    scene: int | None = None,
) -> Summary:
    """Do what is missing, without Ray; die after so many regions if not below 0."""
    encoder = settle_encoder(ENCODER, weights, tile=TILE, mpp=0.5)
    settings = FeatureSettings(
        encoder=encoder,
        weights=weights,
        tissue=0.25,
        precision="float32",
        region=region,
        versions={},
    )
    wanted = with_overrides(
        find_slides([str(slides)]), mpp=None, scene=scene, plane=None
    )
    made, written = embedding.stage_of, itertools.count()

    def stage(*args: Any) -> AnyStage:
        whole = made(*args)
        write = functools.partial(dying_write, whole.write, written, crash_after)
        return replace(whole, write=write)

    with patch.object(embedding, "stage_of", stage):
        return embedding._embed(wanted, settings, str(out), "local", lambda: None)


@pytest.fixture(scope="module")
def made(
    inputs: Path, weights: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Summary]:
    out = tmp_path_factory.mktemp("features")
    return out, in_one_process(inputs, weights, out)


def plain_loop(
    path: Path, network: torch.nn.Module, level: int, downsample: int
) -> tuple[np.ndarray, np.ndarray]:
    """One tile after the other, by torch alone."""
    vectors, places = [], []
    with open_slide(path) as slide:
        height, width = slide.levels[level].height, slide.levels[level].width
        share = tissue_share(slide, height, width, TILE)
        for row in range(height // TILE):
            for column in range(width // TILE):
                if share[row, column] < 0.25:
                    continue
                y, x = row * TILE, column * TILE
                pixels = slide.read(y, x, TILE, TILE, level)
                tile = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
                with torch.no_grad():
                    vectors.append(network((tile - 0.5) / 0.5)[0].numpy())
                places.append((y * downsample, x * downsample))
    return np.array(vectors), np.array(places)


@pytest.mark.parametrize(("name", "level"), [("plain", 0), ("fine", 1)])
def test_features_are_those_of_a_plain_loop(
    made: tuple[Path, Summary],
    inputs: Path,
    network: torch.nn.Module,
    name: str,
    level: int,
) -> None:
    wanted, places = plain_loop(inputs / f"{name}.tif", network, level, 2**level)
    assert 5 < len(wanted) < (700 // TILE) * (900 // TILE)  # not all is tissue
    found = read_slide(str(made[0]), name)
    np.testing.assert_array_equal(found.coords, places)
    np.testing.assert_allclose(found.features, wanted, rtol=1e-3, atol=1e-4)


def test_another_reader_understands_them(made: tuple[Path, Summary]) -> None:
    group = zarr.open_group(made[0] / "features" / "fine.zarr", mode="r")
    row = table(made[0])["fine"]
    assert group["features"].dtype == np.float32
    assert group["coords"].dtype == np.int32
    assert group["features"].shape == (row["tiles"], 96)
    told = dict(group.attrs)
    assert told["encoder"]["name"] == ENCODER
    assert told["encoder"]["mean"] == [0.5, 0.5, 0.5]
    assert told["slide_digest"] == row["digest"]
    assert (told["level0_tile"], told["downsample"]) == (2 * TILE, 2)


def test_each_slide_has_a_row(made: tuple[Path, Summary]) -> None:
    out, commit = made
    assert commit.done == 4
    assert set(commit.failed) == {"wreck"}
    rows = table(out)
    assert "wreck.tif" in rows["wreck"]["message"]
    assert (rows["glass"]["status"], rows["glass"]["tiles"]) == ("done", 0)
    assert "no tissue" in rows["glass"]["note"]
    assert read_slide(str(out), "glass").features.shape == (0, 96)
    assert rows["small"]["tiles"] == 1


def test_regions_and_crashes_do_not_show(
    made: tuple[Path, Summary], inputs: Path, weights: str, tmp_path: Path
) -> None:
    """Regions of 3 tiles; the process dies after 4, and is started again."""
    crashed, whole = tmp_path / "crashed", tmp_path / "whole"
    with pytest.raises(CrashError):
        in_one_process(inputs, weights, crashed, region=3, crash_after=4)
    again = in_one_process(inputs, weights, crashed, region=3)
    once = in_one_process(inputs, weights, whole, region=3)
    assert again.regions == once.regions - 4 > 4
    for name in ("plain", "fine", "small"):
        ours, at_once = read_slide(str(crashed), name), read_slide(str(made[0]), name)
        np.testing.assert_array_equal(ours.coords, at_once.coords)
        np.testing.assert_allclose(
            ours.features, at_once.features, rtol=1e-3, atol=1e-4
        )
        # The same regions give the same bytes, whatever died.
        place = Path("features") / f"{name}.zarr"
        assert contents(crashed / place) == contents(whole / place)


def test_workers_make_the_same(
    cluster: None,
    made: tuple[Path, Summary],
    inputs: Path,
    weights: str,
    tmp_path: Path,
) -> None:
    how = {"encoder": ENCODER, "weights": weights, "tile": TILE, "tile_mpp": 0.5}
    how |= {"precision": "float32", "out": str(tmp_path), "region": 3}
    found = embed([str(inputs)], **how)
    assert (found.done, found.regions > 4, set(found.failed)) == (4, True, {"wreck"})
    for name in ("plain", "fine", "small", "glass"):
        ours, serial = read_slide(str(tmp_path), name), read_slide(str(made[0]), name)
        np.testing.assert_array_equal(ours.coords, serial.coords)
        np.testing.assert_allclose(ours.features, serial.features, rtol=1e-3, atol=1e-4)
        assert (tmp_path / "thumbnails" / f"{name}.jpg").exists()
        assert not (tmp_path / "parts" / name).exists()
    again = embed([str(inputs)], **how)
    assert (again.done, again.skipped, again.regions) == (0, 4, 0)
    with pytest.raises(ConfigError, match=r"other settings \(.*mpp: 0.5 -> 1.0"):
        embed([str(inputs)], **how | {"tile_mpp": 1.0})


def test_features_are_those_of_the_chosen_scene(
    inputs: Path, weights: str, tmp_path: Path
) -> None:
    both = [draw_scene(seed, height=600, width=700).pixels for seed in (5, 6)]
    (tmp_path / "both").mkdir()
    with tifffile.TiffWriter(tmp_path / "both" / "x.ome.tif", ome=True) as tiff:
        for pixels in both:
            um = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
            tiff.write(pixels, photometric="rgb", metadata={"axes": "YXS"} | um)
    (tmp_path / "one").mkdir()
    said = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(tmp_path / "one" / "x.tif", both[1], photometric="rgb", **said)
    for name, scene in (("both", 1), ("one", None)):
        done = in_one_process(
            tmp_path / name, weights, tmp_path / "out" / name, scene=scene
        )
        assert (done.done, done.failed) == (1, {})
    ours, theirs = (
        read_slide(str(tmp_path / "out" / name), "x") for name in ("both", "one")
    )
    assert len(ours.features) > 20
    np.testing.assert_array_equal(ours.features, theirs.features)
    assert table(tmp_path / "out" / "both")["x"]["scene"] == 1


def test_wrong_encoders_are_answered(
    weights: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def settle(name: str, path: str = weights, tile: int = TILE):
        return settle_encoder(name, path, tile=tile, mpp=0.5)

    with pytest.raises(ConfigError, match=r"no model test_resnt; .*test_resnet"):
        settle("test_resnt")
    with pytest.raises(ConfigError, match="there is no such file"):
        settle(ENCODER, f"{weights}.not")
    with pytest.raises(ConfigError, match=r"another encoder") as told:
        settle("test_vit", tile=160)
    assert "cls_token" in str(told.value) or "blocks" in str(told.value)
    # A network that has more than the encoder as it is built: not silently dropped.
    scaled = timm.create_model("test_vit", num_classes=3, init_values=1e-5)
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(scaled.state_dict(), path)
    with pytest.raises(ConfigError, match=r"tensors that test_vit .*ls1\.gamma"):
        settle("test_vit", str(path), tile=160)
    beside = {"architecture": "test_vit", "model_args": {"init_values": 1e-5}}
    beside["pretrained_cfg"] = {"mean": [0.7, 0.6, 0.5], "std": [0.2, 0.2, 0.2]}
    (tmp_path / "config.json").write_text(json.dumps(beside))
    found = settle("test_vit", str(path), tile=160)
    assert (found.dimensions, found.mean) == (64, (0.7, 0.6, 0.5))
    beside["model_args"] = {"checkpoint_path": "/tmp/evil.pth"}
    (tmp_path / "config.json").write_text(json.dumps(beside))
    with pytest.raises(ConfigError, match="may not hold.*checkpoint_path"):
        settle("test_vit", str(path), tile=160)
    with pytest.raises(ConfigError, match="weights are of test_vit"):
        settle(ENCODER, str(shutil.copy(weights, tmp_path / "w.safetensors")))
    fixed = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1)
    safetensors.torch.save_file(fixed.state_dict(), path)
    beside = {"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 1}}
    (tmp_path / "config.json").write_text(json.dumps(beside))
    with pytest.raises(ConfigError, match=r"does not take tiles of 96 px.*--tile 224"):
        settle("vit_tiny_patch16_224", str(path))
    args = ["embed", str(inputs), "--encoder", "resnet-18", "--weights", weights]
    assert main([*args, "--out", str(tmp_path / "none")]) == 2
    assert "resnet18" in capsys.readouterr().err
