"""Features of a compiled encoder are those of the encoder, and do not mix with them."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from medray.datasets.synthetic import write_slide
from medray.datasets.synthetic_scene import draw_scene
from medray.errors import CompileError, ConfigError
from medray.execution.commit import Summary
from medray.mil.embed_slides import embed
from medray.mil.features import read_features, read_slide
from medray.models.config import Compile


def run(folder: Path, out: str, how: Compile) -> Summary:
    return embed(
        [str(folder / "slides")],
        encoder="test_vit",
        weights=str(folder / "encoder.safetensors"),
        out=str(folder / out),
        tile=160,
        precision="float32",
        compile=how,
        executor="local",
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide, weights of an encoder, features of both kinds."""
    folder = tmp_path_factory.mktemp("features")
    scene = draw_scene(1, height=700, width=900)
    write_slide(folder / "slides", "s0", scene)
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=0)
    path = str(folder / "encoder.safetensors")
    safetensors.torch.save_file(network.state_dict(), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDRAY_COMPILE_CACHE", str(folder / "packages"))
        for out, how in (("on", "on"), ("auto", "auto")):
            done = run(folder, out, how)  # type: ignore[arg-type]
            assert (done.done, done.failed) == (1, {})
    return folder


def test_they_are_those_of_the_encoder(folder: Path) -> None:
    on, off = (read_slide(str(folder / name), "s0") for name in ("on", "auto"))
    np.testing.assert_array_equal(on.coords, off.coords)
    np.testing.assert_allclose(on.features, off.features, rtol=1e-3, atol=1e-4)
    assert len(on.features) % 10 != 0  # the last batch was filled up
    assert on.attributes["compile"] == "on"
    assert "compile" not in off.attributes


def test_a_choice_stands_in_the_folder_and_is_kept(folder: Path) -> None:
    chosen = [read_features(str(folder / name))[0].compile for name in ("on", "auto")]
    assert chosen == ["on", "off"]  # here is no GPU
    assert run(folder, "on", "auto").skipped == 1
    with pytest.raises(ConfigError, match="compile: on -> None"):
        run(folder, "on", "off")
    with pytest.raises(ConfigError, match="compile: None -> on"):
        run(folder, "auto", "on")


def test_features_that_cannot_be_compiled_begin_again_not_compiled(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDRAY_COMPILE_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-compiler")
    with pytest.raises(CompileError, match="no-compiler"):
        run(folder, "begun", "on")
    assert "compile: 'on'" in (folder / "begun" / "features.yaml").read_text()
    done = run(folder, "begun", "auto")  # which would go on compiled
    assert (done.done, done.failed) == (1, {})
    assert read_features(str(folder / "begun"))[0].compile == "off"
    begun, off = (read_slide(str(folder / name), "s0") for name in ("begun", "auto"))
    np.testing.assert_array_equal(begun.features, off.features)
