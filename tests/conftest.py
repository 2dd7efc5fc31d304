"""Fixtures shared by all tests."""

import importlib
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from made_once import made_once, unchanged
from xdist.scheduler import LoadFileScheduling

# These machines are shared: how long an example takes says nothing.
settings.register_profile("medray", deadline=None)
settings.load_profile("medray")
# One local cluster for the session; test_jobs.py has one of its own, with tokens.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# Ray's workers are not to wait for the other process of tests, which is not as nice.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 -- so Ray spells it
if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads that spin while they wait for one another take the cores of the tests
    # next to them: two trainings at once were 1.8 times as slow as one after the other.
    os.environ["OMP_WAIT_POLICY"] = "passive"
# Large tensors in large pages: a fifth less work for a network on a CPU, where each
# page costs a virtual machine much.
os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
# By it benchmarks/peak_memory.py finds the processes that Ray started for these tests, not for
# those next to them.
os.environ["MEDRAY_BENCHMARK"] = os.environ.get("PYTEST_XDIST_WORKER", "1")

pytest_plugins = ["selection", "costs"]
LONG = Path(__file__).parent / "long.txt"
WITHOUT_TORCH = {"unit", "files", "programs"}


def _forget() -> None:
    """Put back what tests and the commands that they run change for their process."""
    logger = logging.getLogger("medray")
    logger.handlers.clear()  # a command's write to the stderr that its test had
    logger.setLevel(logging.NOTSET)
    logger.propagate = True
    torch = sys.modules.get("torch")
    if torch is not None:
        # Sums over other numbers of threads have other last digits.
        torch.set_num_threads(os.cpu_count() or 1)
        torch.manual_seed(0)  # pytest-randomly seeds Python's and NumPy's generators
        # By default it warns once a process, and fails whichever test comes first.
        torch.set_warn_always(True)


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    """Tests come in any order: none sees what another one left behind.

    Also after a test, for fixtures of modules are made before those of functions.
    """
    _forget()
    yield
    _forget()


@pytest.fixture(autouse=True)
def without_torch(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test of a folder without torch that imports torch."""
    there = "torch" in sys.modules
    yield
    layer = request.path.relative_to(LONG.parent).parts[0]
    if layer in WITHOUT_TORCH and not there:
        assert "torch" not in sys.modules, "imports torch: it belongs in tests/networks"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real slides next to the checkout, or a skip with the reason."""
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

    from medray.execution.cluster import connect

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
    from medray.geometry import Windows
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
def model() -> Iterator[Path]:
    """A model folder of a light network with random weights."""
    yield from unchanged(made_once("model", lambda to: write_model(to, "pan", 4)))


@pytest.fixture(scope="session")
def slow_model() -> Iterator[Path]:
    """Five times the work: for what happens to a run while it is under way."""
    made = made_once("slow_model", lambda to: write_model(to, "segformer", 8))
    yield from unchanged(made)


@pytest.fixture(scope="session")
def slides() -> Iterator[Path]:
    """Four generated slides of 768 x 640 with annotations."""

    def make(folder: Path) -> None:
        from medray.datasets.synthetic import generate

        generate(folder, slides=4, seed=50, height=768, width=640)

    yield from unchanged(made_once("slides", make))


@pytest.fixture(scope="session")
def contoured_cells() -> Iterator[Path]:
    """Generated single cells with outlines of nucleus and cytoplasm."""

    def make(folder: Path) -> None:
        from medray.datasets.synthetic_cells import generate_cells

        generate_cells(folder / "cells", clusters=2, each=4)

    made = unchanged(made_once("cells", make))
    yield next(made) / "cells"
    next(made, None)


@pytest.fixture(scope="session")
def layered(model: Path) -> Iterator[Path]:
    """Slides s0 (1500 x 2200), s1 and s2, their truth, a run with all its layers."""
    yield from unchanged(made_once("layered", lambda to: write_layered(to, model)))


def write_layered(folder: Path, model: Path) -> None:
    """Write slides, their truth and a run with every layer over them."""
    import serial
    from PIL import Image

    from medray.datasets.synthetic import write_slide
    from medray.datasets.synthetic_scene import draw_scene
    from medray.inference.run import Options
    from medray.models.config import Prediction
    from medray.models.predict import Predictor

    (folder / "truth").mkdir()
    for seed, size in enumerate([(1500, 2200), (700, 800), (600, 900)]):
        scene = draw_scene(seed, height=size[0], width=size[1])
        write_slide(folder / "slides", f"s{seed}", scene, layout="pyramid")
        Image.fromarray(scene.mask).save(folder / "truth" / f"s{seed}.png")
    prediction = Prediction(precision="float32", quality=True, probabilities=True)
    predictor = Predictor.from_folders([str(model)], prediction)
    options = Options(prediction=prediction, region=1024)
    serial.infer(folder / "slides", predictor, model, folder / "run", options)


@pytest.fixture(scope="session")
def training_data(slides: Path) -> Iterator[str]:
    """A dataset of three annotated slides and one without annotation."""

    def make(folder: Path) -> None:
        from medray.datasets.ingest_slides import ingest

        annotations = folder / "annotations"
        shutil.copytree(slides / "annotations", annotations)
        sorted(annotations.iterdir())[-1].unlink()
        ingest(
            [str(slides / "slides")],
            annotations=str(annotations),
            fractions=(0.6, 0.4, 0.0),
            out=str(folder / "dataset"),
            executor="local",
        )

    made = unchanged(made_once("training_data", make))
    yield str(next(made) / "dataset")
    next(made, None)


@pytest.fixture
def trained_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """`train` runs its loop in this process, without Ray Train."""
    import serial

    # By its module: `medray.train` is the function.
    module = importlib.import_module("medray.training.train_model")
    monkeypatch.setattr(module, "run_workers", serial.run_loop)


@pytest.hookimpl(tryfirst=True)  # -m and selection.py look at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by its folder, and as `long` what long.txt names.

    What uses a fixture that long.txt names is long, too.
    """
    lines = LONG.read_text().splitlines()
    names = tuple(line for line in lines if line and not line.startswith("#"))
    for item in items:
        file, _, _ = item.nodeid.partition("::")
        item.add_marker(file.split("/")[1])
        used = (f"{file}::{fixture}" for fixture in getattr(item, "fixturenames", ()))
        # A test that is named, or its file, folder or first parameter, begins so.
        if item.nodeid.startswith(names) or not {*names}.isdisjoint(used):
            item.add_marker("long")


def pytest_xdist_make_scheduler(
    config: pytest.Config, log: Any
) -> LoadFileScheduling | None:
    """Assign all quick tests of tests/cluster to one process: they share one Ray.

    The long ones are most of a run's work, and so go to all processes, by files.
    """
    quick = config.option.markexpr == "not long"
    return _Scheduling(config, log) if quick else None


class _Scheduling(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith("tests/cluster/"):
            return "tests/cluster"
        return str(super()._split_scope(nodeid))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In CI tell a failure at once: a run that is ended tells nothing at its end."""
    if report.failed and os.environ.get("CI"):
        print(f"\n{report.nodeid} ({report.when})\n{report.longreprtext[-3000:]}")
