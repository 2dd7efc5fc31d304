"""Runs with compiled networks: one choice per run, the same bytes after any crash."""

from dataclasses import replace
from pathlib import Path

import pytest
import serial
import yaml

from medray.datasets.synthetic import write_slide
from medray.datasets.synthetic_scene import draw_scene
from medray.errors import CompileError, ConfigError
from medray.execution import Summary
from medray.inference.compiling import choose_compile
from medray.inference.infer_run import infer, settings_of
from medray.inference.run import Options, read_run
from medray.models.config import Compile, Prediction
from medray.models.predict import Predictor
from medray.storage import ledger
from medray.types import Executor


def options_of(how: Compile) -> Options:
    return Options(region=512, prediction=Prediction(precision="float32", compile=how))


def masks(out: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(out.glob("masks/**/*")) if path.is_file())
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    scene = draw_scene(0, height=700, width=1100)
    write_slide(folder, "s0", scene, layout="pyramid")
    return folder


@pytest.fixture(scope="module")
def compiled(
    slides: Path, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Predictor]:
    """A run whose network was compiled, and what predicted it."""
    out = tmp_path_factory.mktemp("compiled") / "run"
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("packages")
        patch.setenv("MEDRAY_COMPILE_CACHE", str(cache))
        predictor = Predictor.from_folders([str(model)], options_of("on").prediction)
    done = serial.infer(slides, predictor, model, out, options_of("on"))
    assert (done.done, done.failed) == (1, {})
    return out, predictor


def test_a_run_that_crashed_goes_on_compiled(
    compiled: tuple[Path, Predictor], slides: Path, model: Path, tmp_path: Path
) -> None:
    whole, predictor = compiled
    out = tmp_path / "run"
    with pytest.raises(serial.CrashError):
        serial.infer(slides, predictor, model, out, options_of("on"), crash_after=2)
    # Whoever goes on need not say it again, here where a new run would not be compiled.
    done = serial.infer(slides, predictor, model, out, options_of("auto"))
    assert (done.done, done.failed) == (1, {})
    assert read_run(str(out)).options.prediction.compile == "on"
    assert masks(out) == masks(whole)


def test_runs_of_different_choices_do_not_mix(
    compiled: tuple[Path, Predictor], slides: Path, model: Path
) -> None:
    out, predictor = compiled
    with pytest.raises(ConfigError, match=r"prediction\.compile: on -> None"):
        serial.infer(slides, predictor, model, out, options_of("off"))


def test_what_was_chosen_stands_in_the_run(
    slides: Path, model: Path, tmp_path: Path
) -> None:
    """Without a GPU: off, as if there were no such choice."""
    infer(
        [str(slides)],
        model=str(model),
        out=str(tmp_path),
        options=options_of("auto"),
        executor="local",
    )
    before = masks(tmp_path)
    settings = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert settings["options"]["prediction"].pop("compile") == "off"
    digest = read_run(str(tmp_path)).digest()
    assert settings_of([str(model)], options_of("auto")).digest() == digest
    # Of an older medray the file has no such key.
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    assert read_run(str(tmp_path)).digest() == digest
    for how in ("auto", "off"):
        again = infer(
            [str(slides)],
            model=str(model),
            out=str(tmp_path),
            options=options_of(how),
            executor="local",
        )
        assert (again.done, again.skipped) == (0, 1)
    with pytest.raises(ConfigError, match=r"prediction\.compile: None -> on"):
        infer(
            [str(slides)],
            model=str(model),
            out=str(tmp_path),
            options=options_of("on"),
            executor="local",
        )
    assert masks(tmp_path) == before


@pytest.mark.parametrize("executor", ["local", "processes"])
def test_a_run_that_cannot_be_compiled_begins_again_not_compiled(
    slides: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    executor: Executor,
) -> None:
    monkeypatch.setenv("MEDRAY_COMPILE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "no-compiler")

    def run(how: Compile, out: str) -> Summary:
        return infer(
            [str(slides)],
            model=str(model),
            out=str(tmp_path / out),
            options=options_of(how),
            executor=executor,
        )

    with pytest.raises(CompileError, match="no-compiler"):
        run("on", "run")
    assert read_run(str(tmp_path / "run")).options.prediction.compile == "on"
    done = run("auto", "run")  # which would go on compiled
    assert (done.done, done.failed) == (1, {})
    assert read_run(str(tmp_path / "run")).options.prediction.compile == "off"
    run("off", "other")
    assert masks(tmp_path / "run") == masks(tmp_path / "other")


def test_a_run_with_compiled_regions_stays_compiled(
    compiled: tuple[Path, Predictor],
    slides: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, predictor = compiled
    out = tmp_path / "run"
    monkeypatch.setattr(ledger, "_FLUSH_S", 0)  # each region is durable at once
    with pytest.raises(serial.CrashError):
        serial.infer(slides, predictor, model, out, options_of("on"), crash_after=2)
    monkeypatch.setenv("MEDRAY_COMPILE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "no-compiler")
    with pytest.raises(CompileError, match="--compile off"):
        infer(
            [str(slides)],
            model=str(model),
            out=str(out),
            options=options_of("auto"),
            executor="local",
        )
    assert read_run(str(out)).options.prediction.compile == "on"


def test_the_digest_names_the_choice(model: Path) -> None:
    off = settings_of([str(model)], options_of("off"))
    on = replace(off, options=options_of("on"))
    assert off.digest() != on.digest()
    assert "compile" not in off.decisive()["options"]["prediction"]


def test_what_was_begun_goes_on_as_it_was() -> None:
    assert choose_compile("on", "local") == "on"
    assert choose_compile("off", "ray") == "off"
    assert choose_compile("auto", "ray") == "off"  # of an older medray
    assert choose_compile(None, "local") == "off"  # here is no GPU
