"""Fixtures shared by all tests."""

import importlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

pytest_plugins = ["costs"]  # active with --costs

# These machines are shared: how long an example takes says nothing.
settings.register_profile("medray", deadline=None)
settings.load_profile("medray")
# One local cluster for the session; test_jobs.py has one of its own, with tokens.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# Ray's workers are not to wait for the other process of tests, which is not as nice.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 -- so Ray spells it
if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads that spin while they wait for one another take the cores of the tests
    # beside them: two trainings at once were 1.8 times as slow as one after the other.
    os.environ["OMP_WAIT_POLICY"] = "passive"
# Large tensors in large pages: a fifth less work for a network on a CPU, where each
# page costs a virtual machine much.
os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
# By it run_memory.py finds the processes that Ray started for these tests, not for
# those beside them.
os.environ["MEDRAY_BENCHMARK"] = os.environ.get("PYTEST_XDIST_WORKER", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real slides beside the checkout, or a skip with the reason."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        message = "the real slides are not beside this checkout (../shared/data)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A local Ray for all tests that need one."""
    import ray

    from medray.cluster import connect

    with pytest.MonkeyPatch.context() as patch:
        # Its workers, which have imported what tasks need, wait for the next test; by
        # default Ray ends those above the number of cores after a second.
        patch.setenv("RAY_idle_worker_killing_time_threshold_ms", "3600000")
        # Its log monitor looks ten times a second for new files among many.
        patch.setenv("RAY_LOG_MONITOR_MANY_FILES_THRESHOLD", "0")
        patch.setenv("LOG_NAME_UPDATE_INTERVAL_S", "10")
        connect()
    yield
    ray.shutdown()


def write_model(folder: Path, name: str, seed: int) -> Path:
    """A model folder with random weights: noise, but always the same noise."""
    import torch

    from medray.classes import Classes
    from medray.grid import Windows
    from medray.models.config import Architecture, ModelConfig
    from medray.models.folder import save_model
    from medray.models.segmenters import build_segmenter

    torch.manual_seed(seed)  # its masks are neither empty nor full nor all specks
    architecture = Architecture(name, "tu-test_resnet")
    network = build_segmenter(architecture, 2)
    config = ModelConfig(
        architecture=architecture,
        classes=Classes(),
        window=Windows(128, 96),
        mpp=0.5,
    )
    save_model(str(folder), config, network, {"f1": None})
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), "pan", 4)


@pytest.fixture(scope="session")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five times the work: for what happens to a run while it is under way."""
    return write_model(tmp_path_factory.mktemp("slow_model"), "segformer", 8)


@pytest.fixture(scope="session")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four generated slides of 768 x 640 with annotations."""
    from medray.synth import generate

    folder = tmp_path_factory.mktemp("generated")
    generate(folder, slides=4, seed=50, height=768, width=640)
    return folder


@pytest.fixture(scope="session")
def layered(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides s0 (1500 x 2200), s1 and s2, their truth, a run with all its layers."""
    import serial
    from PIL import Image

    from medray.models.config import Prediction
    from medray.models.predict import Predictor
    from medray.run import Options
    from medray.synth import draw_scene, write_slide

    folder = tmp_path_factory.mktemp("layered")
    (folder / "truth").mkdir()
    for seed, size in enumerate([(1500, 2200), (700, 800), (600, 900)]):
        scene = draw_scene(seed, height=size[0], width=size[1])
        write_slide(folder / "slides", f"s{seed}", scene, layout="pyramid")
        Image.fromarray(scene.mask).save(folder / "truth" / f"s{seed}.png")
    prediction = Prediction(precision="float32", quality=True, probabilities=True)
    predictor = Predictor.from_folders([str(model)], prediction)
    options = Options(prediction=prediction, region=1024)
    serial.infer(folder / "slides", predictor, model, folder / "run", options)
    return folder


@pytest.fixture(scope="session")
def training_data(
    cluster: None, slides: Path, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """A dataset of three annotated slides and one without annotation."""
    from medray.ingest import ingest

    folder = tmp_path_factory.mktemp("partly")
    shutil.copytree(slides / "annotations", folder / "annotations")
    sorted((folder / "annotations").iterdir())[-1].unlink()
    out = tmp_path_factory.mktemp("data")
    ingest(
        [str(slides / "slides")],
        annotations=str(folder / "annotations"),
        fractions=(0.6, 0.4, 0.0),
        out=str(out),
    )
    return str(out)


@pytest.fixture
def trained_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """`train` runs its loop in this process, without Ray Train."""
    import serial

    # By its module: `medray.train` is the function.
    module = importlib.import_module("medray.train")
    monkeypatch.setattr(module, "_run", serial.run_loop)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In CI tell a failure at once: a run that is ended tells nothing at its end."""
    if report.failed and os.environ.get("CI"):
        print(f"\n{report.nodeid} ({report.when})\n{report.longreprtext[-3000:]}")
