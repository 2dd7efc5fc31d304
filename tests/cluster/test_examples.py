"""The examples in docstrings: each is run as it stands, in a folder of small slides.

There are slides/, annotations/, dataset/, model/ and run/ in it, and the names
`medray` and `np`. What they print must be what the docstring says.
"""

import ast
import doctest
import importlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from documents import ROOT

import medray
from medray.inference import Options
from medray.models import Prediction

PUBLIC = (
    *("check", "ingest", "train", "infer", "evaluate", "open_slide", "open_mask"),
    *("convert", "compare", "review", "verify", "read", "find_slides", "find_tissue"),
    *("rasterise", "read_patches", "read_recipe", "read_config", "confusion"),
    *("summary", "bootstrap", "window_starts", "window_cores", "window_weights"),
)


def examples() -> Iterator[tuple[str, str, str]]:
    """Yield the module, the qualified name and the docstring of each example."""
    for path in sorted((ROOT / "medray").rglob("*.py")):
        if ">>>" not in (text := path.read_text()):
            continue
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                said = ast.get_docstring(node) or ""
                if ">>>" in said:
                    yield module, node.name, said


EXAMPLES = list(examples())


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory,
    slides: Path,
    model: Path,
    training_data: str,
) -> Path:
    """A folder of slides, annotations, a dataset, a model and a run."""
    folder = tmp_path_factory.mktemp("examples")
    for name in ("slides", "annotations"):
        shutil.copytree(slides / name, folder / name)
    shutil.copytree(model, folder / "model")
    shutil.copytree(training_data, folder / "dataset")
    medray.infer(
        [str(folder / "slides")],
        model=str(folder / "model"),
        out=str(folder / "run"),
        options=Options(prediction=Prediction(quality=True)),
        executor="local",
    )
    return folder


@pytest.mark.parametrize(
    ("module", "name", "said"),
    EXAMPLES,
    ids=[f"{module}.{name}" for module, name, _ in EXAMPLES],
)
def test_an_example_prints_what_it_says(
    module: str,
    name: str,
    said: str,
    made: Path,
    cluster: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(made)
    importlib.import_module(module)
    names = {"medray": medray, "np": np}
    test = doctest.DocTestParser().get_doctest(said, names, name, module, 0)
    said_wrong: list[str] = []
    doctest.DocTestRunner().run(test, out=said_wrong.append)
    assert not said_wrong, "".join(said_wrong)


def test_what_users_call_most_has_an_example() -> None:
    assert {name for _, name, _ in EXAMPLES} >= set(PUBLIC)
    assert not [
        name for _, name, said in EXAMPLES if "+SKIP" in said or "ELLIPSIS" in said
    ]
