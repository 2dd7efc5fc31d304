"""Every recipe trains, and starts from the weights that it names."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision

from medray.datasets.dataset import read_dataset
from medray.errors import ConfigError
from medray.models.config import Architecture, ModelConfig
from medray.models.folder import load_model, save_model
from medray.models.segmenters import build_segmenter
from medray.training.checkpoint import read_best
from medray.training.network import build_network
from medray.training.recipe import Prune, Recipe, read_recipe
from medray.training.recipe_files import RECIPES
from medray.training.schedule import Schedule
from medray.training.worker import train_as
from medray.training.world import TrainingError, World

SMALLEST = "tu-mobilenetv3_small_050"


@pytest.fixture(scope="module")
def dataset(training_data: str) -> str:
    return training_data


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, dataset: str) -> dict[str, str]:
    """Models to learn from and to prune, by the name of their network."""
    folders = {}
    for name in ("unet", "highres_unet"):
        torch.manual_seed(1)
        architecture = Architecture(name, SMALLEST)
        config = ModelConfig(
            architecture=architecture,
            classes=read_dataset(dataset).classes,
            window=Recipe().window,
            mpp=0.5,
        )
        folder = str(tmp_path_factory.mktemp(name))
        save_model(folder, config, build_segmenter(architecture, 2), {"f1": None})
        folders[name] = folder
    return folders


def contract_of(recipe: Recipe, dataset: str) -> ModelConfig:
    return ModelConfig(
        architecture=recipe.model,
        classes=read_dataset(dataset).classes,
        window=recipe.window,
        mpp=0.5,
    )


@pytest.mark.parametrize(
    "path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_recipe_trains(
    path: Path, dataset: str, trained: dict[str, str], tmp_path: Path
) -> None:
    """End to end at small size: what it names stays, sizes and numbers shrink."""
    recipe = read_recipe(str(path), ["batch=4", "micro_batch_size=2", "data.samples=4"])
    phases = tuple(replace(phase, epochs=1) for phase in recipe.schedule.phases)
    grows = len(recipe.data.crops) > 1
    epochs = max(1 + grows, len(phases))
    schedule = replace(recipe.schedule, epochs=epochs, phases=phases)
    recipe = replace(recipe, schedule=schedule)
    crop = (64, 96) if grows else 64
    recipe = replace(recipe, data=replace(recipe.data, crop=crop))
    if recipe.model.encoder.startswith("tu-"):
        recipe = replace(recipe, model=replace(recipe.model, encoder=SMALLEST))
    if recipe.weights == "imagenet":  # which is not to be had offline
        weights = tmp_path / "encoder.pth"
        torch.manual_seed(2)
        encoder: Any = build_network(
            replace(recipe, weights=None, schedule=Schedule()), 2
        )
        torch.save(encoder.encoder.state_dict(), weights)
        recipe = replace(recipe, weights=str(weights))
    if recipe.teacher is not None:
        teacher = replace(recipe.teacher, model=trained["unet"])
        recipe = replace(recipe, teacher=teacher)
    if recipe.prune is not None:
        prune = replace(recipe.prune, model=trained["highres_unet"])
        recipe = replace(recipe, prune=prune)
    contract = contract_of(recipe, dataset)
    team = World(0, 1, torch.device("cpu"))
    train_as(team, recipe, contract, dataset, str(tmp_path), "t")
    best = read_best(str(tmp_path), "t")
    network = build_network(recipe, 2)
    start = {k: v.clone() for k, v in network.state_dict().items()}
    network.load_state_dict(best["model"])
    assert any(not torch.equal(start[k], v) for k, v in best["model"].items())
    # The folder of it is a model that can be used, pruned or not.
    save_model(str(tmp_path / "model"), contract, network, best["metrics"])
    loaded, _ = load_model(str(tmp_path / "model"))
    with torch.inference_mode():
        image = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(loaded(image), network.eval()(image))


def test_a_single_crop_is_too_few_for_some_networks(
    dataset: str, tmp_path: Path
) -> None:
    """Batch normalisation after global pooling sees one value a channel."""
    recipe = read_recipe("deeplab", ["batch=1"])
    contract = contract_of(recipe, dataset)
    team = World(0, 1, torch.device("cpu"))
    with pytest.raises(TrainingError, match="set micro_batch_size to 2 or more"):
        train_as(team, recipe, contract, dataset, str(tmp_path), "t")


def test_pruning_removes_channels_and_keeps_the_rest(
    trained: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("torch_pruning")
    before, config = load_model(trained["unet"])
    recipe = Recipe(model=config.architecture, prune=Prune(trained["unet"], 0.4))
    thin = build_network(recipe, 2)
    counts = [sum(p.numel() for p in model.parameters()) for model in (before, thin)]
    assert counts[1] < 0.6 * counts[0]
    assert thin(torch.zeros(2, 3, 64, 64)).shape == (2, 2, 64, 64)
    # The kernels that are left are kernels of before.
    old = before.state_dict()["encoder.model.conv_stem.weight"].flatten(1)
    new = thin.state_dict()["encoder.model.conv_stem.weight"].flatten(1)
    norms = old.norm(dim=1)
    assert all((old == kernel).all(dim=1).any() for kernel in new)
    assert len(new) < len(old)
    assert float(new.norm(dim=1).mean()) > float(norms.mean())


@pytest.mark.parametrize(
    ("architecture", "suffix", "prefix"),
    [
        (Architecture("unet", "resnet18"), ".safetensors", ""),
        (Architecture("unet", "resnet18"), ".pth", "encoder."),
        (Architecture("highres_unet", SMALLEST), ".pth", ""),
        (Architecture("fcn8s", "vgg16"), ".pth", "features."),
    ],
)
def test_encoder_weights_come_from_a_file(
    architecture: Architecture, suffix: str, prefix: str, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    source = build_segmenter(architecture, 2)
    state = {
        prefix + key.removeprefix("model."): value
        for key, value in source.encoder.state_dict().items()  # type: ignore[union-attr]
    }
    state["fc.weight"] = torch.zeros(3)  # files of classifiers hold more
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    torch.manual_seed(4)
    found = build_segmenter(architecture, 2, str(path)).encoder.state_dict()  # type: ignore[union-attr]
    for key, value in source.encoder.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(found[key], value), key


def test_torchvisions_own_weights_fit(tmp_path: Path) -> None:
    torch.manual_seed(3)
    source = torchvision.models.resnet18(weights=None)
    torch.save(source.state_dict(), tmp_path / "resnet18.pth")
    model = build_segmenter(
        Architecture("unet", "resnet18"), 2, str(tmp_path / "resnet18.pth")
    )
    found = model.encoder.state_dict()["layer4.1.conv2.weight"]  # type: ignore[union-attr]
    assert torch.equal(found, source.state_dict()["layer4.1.conv2.weight"])


def test_weights_of_another_encoder_are_named(tmp_path: Path) -> None:
    other = torchvision.models.resnet34(weights=None).state_dict()
    torch.save(
        {k: v for k, v in other.items() if "layer3" not in k}, tmp_path / "w.pth"
    )
    architecture = Architecture("unet", "resnet34")
    with pytest.raises(ConfigError, match=r"w.pth.*not layer3.*another encoder"):
        build_segmenter(architecture, 2, str(tmp_path / "w.pth"))
    with pytest.raises(ConfigError, match="there is no such file"):
        build_segmenter(architecture, 2, str(tmp_path / "absent.pth"))
    (tmp_path / "code.pth").write_bytes(b"\x80\x02cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ConfigError, match="code.pth.*expected"):
        build_segmenter(architecture, 2, str(tmp_path / "code.pth"))


@pytest.mark.parametrize(
    ("architecture", "named"),
    [
        (Architecture("unet", "resnet18"), "smp-hub/resnet18.imagenet"),
        (Architecture("unet", SMALLEST), "timm/mobilenetv3_small_050"),
        (Architecture("fcn8s", "vgg16"), "vgg16-397923af.pth"),
    ],
)
def test_weights_that_cannot_be_downloaded_say_what_to_bring(
    architecture: Architecture,
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    # It keeps the proxies of the first request that any test of this process made.
    monkeypatch.setattr("urllib.request._opener", None)
    with pytest.raises(ConfigError, match=f"bring .*{named}.*weights: FILE"):
        build_segmenter(architecture, 2, "imagenet")
