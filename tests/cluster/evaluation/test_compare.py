"""Two runs compared: the figures by hand, and the errors of bad requests."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import serial
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp

from medray import cli, open_mask
from medray.annotations.rasterize import rasterise
from medray.annotations.reading import read_annotation
from medray.classes import Classes
from medray.errors import ConfigError
from medray.evaluation.compare_runs import compare
from medray.evaluation.metrics import difference, summary
from medray.inference.run import Options
from medray.models.config import Prediction
from medray.models.predict import Predictor

NAMES = ("background", "tumour")


# --- the difference -------------------------------------------------------------------

COUNTS = stnp.arrays(np.int64, (5, 2, 2), elements=st.integers(0, 1000))


@given(COUNTS, COUNTS)
@settings(max_examples=30)
def test_a_difference_is_the_plain_bootstraps(
    before: np.ndarray, after: np.ndarray
) -> None:
    found = difference(before, after, rounds=200)
    f1 = [summary(counts.sum(axis=0), NAMES)["f1"] for counts in (before, after)]
    assert [found["f1"], found["other_f1"]] == f1
    if None in f1:
        assert found["difference"] is None
        return
    assert found["difference"] == pytest.approx(f1[1] - f1[0])
    generator = np.random.default_rng(0)
    moved = []
    for _ in range(200):
        times = generator.multinomial(5, [0.2] * 5)
        pair = [
            summary(sum(n * c for n, c in zip(times, counts, strict=True)), NAMES)["f1"]
            for counts in (before, after)
        ]
        if None not in pair:
            moved.append(pair[1] - pair[0])
    assert found["interval"] == pytest.approx(np.quantile(moved, [0.025, 0.975]))
    back = difference(after, before, rounds=200)
    assert back["interval"] == pytest.approx([-x for x in found["interval"][::-1]])
    assert back["p_value"] == found["p_value"]


def test_a_clear_difference_is_told_from_chance() -> None:
    rng = np.random.default_rng(1)
    right = rng.integers(800, 1000, 20)
    before, after = (
        np.array(
            [[[5000, lost], [lost, n - lost]] for n, lost in zip(right, x, strict=True)]
        )
        for x in (rng.integers(100, 200, 20), rng.integers(50, 90, 20))
    )
    found = difference(before, after)
    assert found["interval"][0] > 0
    assert found["p_value"] < 0.01
    same = difference(before, before)
    assert (same["difference"], same["interval"]) == (0.0, [0.0, 0.0])
    assert same["p_value"] == 1.0
    alone = difference(before[:1], after[:1])
    assert (alone["interval"], alone["p_value"]) == (None, None)


# --- runs -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(
    slides: Path, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Runs of one model at two thresholds."""
    folder = tmp_path_factory.mktemp("runs")
    for name, threshold in (("low", 0.2), ("high", 0.5)):
        prediction = Prediction(precision="float32", thresholds=(0.0, threshold))
        predictor = Predictor.from_folders([str(model)], prediction)
        options = Options(prediction=prediction, region=512)
        done = serial.infer(slides / "slides", predictor, model, folder / name, options)
        assert (done.done, done.failed) == (4, {})
    return folder / "low", folder / "high"


def counted(run: Path, slides: Path, name: str) -> tuple[float, np.ndarray]:
    """The F1 of a slide by hand, and its mask."""
    mask = np.asarray(open_mask(str(run / "masks" / f"{name}.ome.zarr")))
    height, width = mask.shape
    (file,) = (slides / "annotations").glob(f"{name}.*")
    areas = read_annotation(str(file), height=height, width=width, classes=Classes())
    truth = rasterise(areas, Classes(), y=0, x=0, height=height, width=width)
    both = ((mask == 1) & (truth == 1)).sum()
    return 2 * both / ((mask == 1).sum() + (truth == 1).sum()), mask


def test_each_slide_is_scored_as_by_hand(
    cluster: None,
    runs: tuple[Path, Path],
    slides: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    command = ["compare", *map(str, runs), "--truth", str(slides / "annotations")]
    assert cli.main([*command, "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    table = pd.read_csv(out / "slides.csv").set_index("slide")
    assert len(table) == found["compared"] == found["scored"] == 4
    for name, row in table.iterrows():
        (before, one), (after, two) = (counted(run, slides, str(name)) for run in runs)
        assert (row["f1"], row["other_f1"]) == pytest.approx((before, after))
        assert row["changed_px"] == (one != two).sum()
        assert row["changed"] == pytest.approx((one != two).mean())
    losses = table["difference"]
    assert list(losses) == sorted(losses)
    assert found["worse"] == list(losses.index[losses < 0])
    assert found["better"] == list(losses.index[losses > 0][::-1])
    assert found["changed"] == (table["changed_px"] > 0).sum() > 0
    low, high = found["interval"]
    assert low <= found["difference"] <= high

    page = (out / "compare.html").read_text()
    assert "options.prediction.thresholds" in page
    assert page.count("<img ") == min(len(found["worse"]), 6)
    for side in ("a", "b"):  # what the page links to
        assert f'href="{side}/report.html"' in page
        assert (out / side / "report.html").exists()
    assert not re.search(r'(src|href)="http', page)
    assert json.loads((out / "compare.json").read_text())["worse"] == found["worse"]


def test_without_a_truth_it_tells_what_differs(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main(["compare", *map(str, runs), "--out", str(out)]) == 0
    assert "4 slides compared, 4 differ, 0 have a truth" in capsys.readouterr().out
    page = (out / "compare.html").read_text()
    assert "Without a truth nobody can say which is better" in page
    assert page.count("<img ") == 4

    same = compare(str(runs[0]), str(runs[0]), out=str(tmp_path / "same"))
    assert (same.compared, same.changed) == (4, 0)
    page = (tmp_path / "same" / "compare.html").read_text()
    assert "Nothing: the two runs have the same models" in page


def test_what_cannot_be_compared_is_named(
    cluster: None, runs: tuple[Path, Path], slides: Path, tmp_path: Path
) -> None:
    spoilt = tmp_path / "spoilt"
    shutil.copytree(runs[1], spoilt)
    name = sorted(path.name for path in (spoilt / "masks").iterdir())[0]
    for shard in (spoilt / "masks" / name / "0").rglob("0"):
        if shard.is_file():
            shard.write_bytes(b"broken")
    truth, out = str(slides / "annotations"), str(tmp_path / "out")
    found = compare(str(runs[0]), str(spoilt), out=out, truth=truth)
    slide = name.removesuffix(".ome.zarr")
    assert list(found.failed) == [slide]
    assert name in found.failed[slide]
    assert (found.compared, found.scored) == (3, 3)
    assert slide in (tmp_path / "out" / "compare.html").read_text()

    with pytest.raises(ConfigError, match=r"expected a run with a run\.yaml"):
        compare(str(runs[0]), str(tmp_path), out=out)
    with pytest.raises(ConfigError, match="nothing there"):
        compare(str(runs[0]), str(spoilt), out=out, truth=str(tmp_path / "none"))
