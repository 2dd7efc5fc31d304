"""Curves, cohorts and close-ups in a report of masks."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score

from medray import cli, open_mask
from medray.evaluation.calibration import calibration_error, reliability_of_images
from medray.evaluation.metrics import bootstrap, confusion, summary
from medray.inference.run import layer_uri, probabilities_uri

NAMES = ("background", "tumour")
SIZES = {"s0": (1500, 2200), "s1": (700, 800), "s2": (600, 900)}


@pytest.fixture(scope="module")
def folder(layered: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, next to a table of patients and scanners."""
    folder = tmp_path_factory.mktemp("curves")
    for name in ("run", "truth"):
        (folder / name).symlink_to(layered / name)
    (folder / "cohorts.csv").write_text(
        "slide,patient,scanner\ns0,p1,Alpha\ns1,p1,Beta\ns2,p2,Beta\n"
    )
    return folder


@pytest.fixture(scope="module")
def metrics(folder: Path) -> Any:
    command = ["evaluate", str(folder / "run"), "--truth", str(folder / "truth")]
    command += ["--cohorts", str(folder / "cohorts.csv"), "--executor", "local"]
    assert cli.main([*command, "--out", str(folder / "report")]) == 0
    return json.loads((folder / "report" / "metrics.json").read_text())


def truth_of(folder: Path, slide: str) -> Any:
    with Image.open(folder / "truth" / f"{slide}.png") as picture:
        return np.asarray(picture)


def found_of(folder: Path, slide: str) -> Any:
    return np.asarray(open_mask(str(folder / f"run/masks/{slide}.ome.zarr")))


def test_the_curves_are_those_of_all_pixels(folder: Path, metrics: Any) -> None:
    ground_truths = [truth_of(folder, slide).ravel() for slide in SIZES]
    found = [found_of(folder, slide).ravel() for slide in SIZES]
    uris = [probabilities_uri(str(folder / "run"), slide) for slide in SIZES]
    shares = [np.asarray(open_mask(uri)).reshape(2, -1) for uri in uris]
    truth, share = np.concatenate(ground_truths), np.concatenate(shares, axis=1)
    (row,) = metrics["curves"]["per_class"]
    wanted = average_precision_score(truth, share[1])
    assert row["average_precision"] == pytest.approx(wanted)
    assert row["best_f1"] >= metrics["f1"] - 1e-9
    seen = share.sum(axis=0) > 0
    error = calibration_error(
        reliability_of_images(
            (share[:, seen] / 255).T, np.concatenate(found)[seen], truth[seen]
        )
    )
    assert metrics["curves"]["calibration_error"] == pytest.approx(error)


def test_cohorts_are_scored_and_patients_resampled(folder: Path, metrics: Any) -> None:
    counts = {
        slide: confusion(truth_of(folder, slide), found_of(folder, slide), 2)
        for slide in SIZES
    }
    alpha, beta = metrics["cohorts"]["scanner"]
    assert (alpha["value"], alpha["slides"]) == ("Alpha", 1)
    assert (beta["value"], beta["slides"]) == ("Beta", 2)
    assert alpha["f1"] == summary(counts["s0"], NAMES)["f1"]
    assert beta["f1"] == summary(counts["s1"] + counts["s2"], NAMES)["f1"]
    assert "patient" not in metrics["cohorts"]
    assert metrics["interval_over"] == "patients"
    patients = np.stack([counts["s0"] + counts["s1"], counts["s2"]])
    wanted = bootstrap(patients, NAMES)
    assert wanted is not None
    assert metrics["interval"]["f1"] == wanted["f1"]


def test_the_page_shows_them_and_the_worst_places(folder: Path, metrics: Any) -> None:
    page = (folder / "report" / "report.html").read_text()
    assert "By scanner" in page
    assert "other patients of the same kind" in page
    assert "average precision" in page
    assert "um per pixel (XResolution)" in page
    squares = []
    for name, values in (
        ("wrong", truth_of(folder, "s0") != found_of(folder, "s0")),
        (
            "uncertain",
            np.asarray(open_mask(layer_uri(str(folder / "run"), "s0", "uncertainty"))),
        ),
    ):
        sums = {
            (y, x): int(values[y : y + 1024, x : x + 1024].sum(dtype=np.int64))
            for y in range(0, 1500, 1024)
            for x in range(0, 2200, 1024)
        }
        y, x = max(sums, key=lambda key: sums[key])
        squares.append(f"s0, pixels from {x} across and {y} down")
        heading = {"wrong": "Where most is wrong", "uncertain": "Where it is least"}
        shown = page.partition(heading[name])[2].partition("<h2>")[0]
        captions = re.findall(r"<figcaption>([^<]+)</figcaption>", shown)
        assert captions[0] == squares[-1]
        # Slides that fit into a square are shown whole already.
        assert all(caption.startswith("s0") for caption in captions)
        uris = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', shown)
        assert len(uris) == min(2, sum(n > 0 for n in sums.values()))
        picture = Image.open(io.BytesIO(base64.b64decode(uris[0])))
        assert picture.width > 800


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("slide\ns0\n", "at least one other"),
        ("name,scanner\ns0,a\n", "expected the columns slide"),
        ("slide,scanner\ns0,a\ns0,b\n", "lines 2 and 3: say of slide"),
        ("slide,scanner\ns0,a\ns1\n", "line 3: expected 2 cells"),
        ("slide,scanner\ns0,a\ns9,b\n", "line 3: names s9"),
    ],
)
def test_a_wrong_csv_of_cohorts_says_what_is_wrong(
    folder: Path,
    tmp_path: Path,
    text: str,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "c.csv").write_text(text)
    command = ["evaluate", str(folder / "run"), "--truth", str(folder / "truth")]
    command += ["--cohorts", str(tmp_path / "c.csv"), "--out", str(tmp_path / "out")]
    assert cli.main(command) == 2
    assert said in capsys.readouterr().err
