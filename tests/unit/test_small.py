"""Splits, ids, tissue, ledger, metrics, report, command line: small promises."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from medray.classes import Classes
from medray.datasets.splits import split_slides
from medray.datasets.synthetic_scene import draw_scene
from medray.errors import ConfigError, SlideError
from medray.evaluation.metrics import bootstrap, class_scores, confusion, summary
from medray.evaluation.overlay import draw_overlay
from medray.evaluation.report import slides_to_show, write_report
from medray.evaluation.slide_metrics import SlideReport
from medray.slides.discovery import find_slides, slide_id
from medray.slides.image import ArraySlide
from medray.slides.tissue import find_tissue, pen_marks, tissue_share
from medray.storage import files
from medray.storage.ledger import Ledger

# --- splits ---------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.integers(0, 12), st.sampled_from("ab")), min_size=3, max_size=60
    ),
    st.integers(0, 5),
)
def test_groups_stay_together_and_nothing_is_lost(
    rows: list[tuple[int, str]], seed: int
) -> None:
    slides = [
        {"slide": f"s{i}", "group": f"g{group}", "stratum": stratum}
        for i, (group, stratum) in enumerate(rows)
    ]
    fractions = (0.6, 0.2, 0.2)
    splits = split_slides(slides, fractions=fractions, seed=seed)
    assert set(splits) == {row["slide"] for row in slides}
    by_group: dict[str, set[str]] = {}
    for row in slides:
        by_group.setdefault(row["group"], set()).add(splits[row["slide"]])
    assert all(len(found) == 1 for found in by_group.values())
    if len(by_group) >= 3:
        assert set(splits.values()) == {"train", "val", "test"}
    assert splits == split_slides(slides[::-1], fractions=fractions, seed=seed)
    keep = {row["group"]: splits[row["slide"]] for row in slides}
    more = [*slides, {"slide": "new", "group": "gnew", "stratum": "a"}]
    later = split_slides(more, fractions=fractions, seed=seed + 1, keep=keep)
    assert {slide: later[slide] for slide in splits} == splits


def test_strata_are_shared_out_evenly() -> None:
    slides = [
        {
            "slide": f"s{i}",
            "group": f"g{i}",
            "stratum": "tumour" if i % 4 == 0 else "none",
        }
        for i in range(200)
    ]
    splits = split_slides(slides, fractions=(0.7, 0.15, 0.15), seed=0)
    for wanted, split in ((0.7, "train"), (0.15, "val"), (0.15, "test")):
        for stratum in ("tumour", "none"):
            here = [s for s in slides if s["stratum"] == stratum]
            share = sum(splits[s["slide"]] == split for s in here) / len(here)
            assert share == pytest.approx(wanted, abs=0.03)


# --- names ----------------------------------------------------------------------------


@given(st.text(min_size=1, max_size=300))
def test_an_id_is_one_safe_file_name(text: str) -> None:
    name = slide_id(text)
    assert 0 < len(name.encode()) <= 4 * 120
    assert "/" not in name
    assert "\0" not in name
    assert not name.startswith(".")


def test_slides_of_one_name_stay_apart(tmp_path: Path) -> None:
    for name in ("a/x.tif", "b/x.tif", "y.tif", "Y.svs", ".hidden.tif", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_slides([str(tmp_path)])
    names = [file.slide for file in found]
    assert names[:2] == sorted(names[:2])
    assert {"a__x", "b__x"} < set(names)
    assert len({name.casefold() for name in names}) == len(found) == 4
    assert find_slides([str(tmp_path / "*.tif")])[0].slide == "y"


# --- tissue ---------------------------------------------------------------------------


def test_tissue_is_found_and_pen_and_glass_are_not() -> None:
    scene = draw_scene(8, height=512, width=512)
    tissue = find_tissue(scene.pixels)
    assert tissue[scene.mask.astype(bool)].mean() > 0.95
    glass = np.random.default_rng(0).integers(238, 246, (256, 256, 3), dtype=np.uint8)
    assert not find_tissue(glass).any()
    for ink in ((40, 60, 190), (30, 130, 60), (25, 25, 30)):
        marked = glass.copy()
        marked[100:130, 20:200] = ink
        assert pen_marks(marked)[105:125, 25:195].all()
        assert not find_tissue(marked)[95:135].any()
    assert not pen_marks(scene.pixels)[scene.mask.astype(bool)].any()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 30))
def test_tissue_shares_cover_the_slide(height: int, width: int, side: int) -> None:
    glass = ArraySlide(np.full((height, width, 3), 240, np.uint8))
    share = tissue_share(glass, height, width, side)
    assert share.shape == (-(-height // side), -(-width // side))
    assert not share.any()


# --- ledger ---------------------------------------------------------------------------


def test_the_ledger_remembers_what_was_flushed(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    ledger.commit_region("a@1", 0, {"n": 1})
    ledger.commit_region("a@1", 3, {"n": 2})
    ledger.commit_slide({"slide": "b", "status": "done", "digest": "2", "x": 1})
    ledger.flush()
    again = Ledger(str(tmp_path))
    assert again.regions == {"a@1": {0: {"n": 1}, 3: {"n": 2}}}
    assert again.slides["b"]["x"] == 1
    again.commit_slide({"slide": "a", "status": "done", "digest": "1"})
    again.close()
    assert not (tmp_path / "journal").exists()
    assert set(Ledger(str(tmp_path)).slides) == {"a", "b"}


def test_a_long_journal_keeps_only_what_is_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medray.storage.ledger._MOST_PARTS", 5)
    monkeypatch.setattr("medray.storage.ledger._FLUSH_S", 0.0)
    ledger = Ledger(str(tmp_path))
    for index in range(20):
        ledger.commit_region("half@1", index, {"n": index})
        ledger.commit_region(f"s{index}@2", 0, {"n": 0})
        ledger.commit_slide({"slide": f"s{index}", "status": "done", "digest": "2"})
    ledger.flush()
    assert len(list((tmp_path / "journal").iterdir())) == 1
    assert set(ledger.regions) == {"half@1"}
    ledger.commit_region("half@1", 20, {"n": 20})
    ledger.flush()
    again = Ledger(str(tmp_path))
    assert set(again.regions) == {"half@1"}
    assert again.regions["half@1"] == {i: {"n": i} for i in range(21)}
    assert len(again.slides) == 20


def test_writes_are_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    files.write_json(str(path), {"x": 1})
    assert json.loads(path.read_text()) == {"x": 1}
    assert [entry.name for entry in path.parent.iterdir()] == ["b.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_said(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from medray.storage import files;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"files.write_bytes({str(tmp_path / 'x')!r}, b'a' * 5000)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "StoreError" in done.stderr
    assert "free space" in done.stderr
    assert list(tmp_path.iterdir()) == []


# --- metrics --------------------------------------------------------------------------

labels = hnp.arrays(np.uint8, (6, 5), elements=st.integers(0, 2))


@given(labels, labels)
def test_scores_equal_a_count_by_hand(truth: np.ndarray, predicted: np.ndarray) -> None:
    counts = confusion(truth, predicted, 3)
    scores = class_scores(counts, ["b", "x", "y"])
    foreground = []
    for value in range(3):
        pairs = list(
            zip(truth.ravel() == value, predicted.ravel() == value, strict=True)
        )
        tp, fn = pairs.count((True, True)), pairs.count((True, False))
        fp, tn = pairs.count((False, True)), pairs.count((False, False))
        expected = {
            "f1": (2 * tp, 2 * tp + fp + fn),
            "iou": (tp, tp + fp + fn),
            "precision": (tp, tp + fp),
            "recall": (tp, tp + fn),
            "specificity": (tn, tn + fp),
        }
        for name, (above, below) in expected.items():
            value_found = scores[value][name]
            assert value_found == (pytest.approx(above / below) if below else None)
        if value and tp + fp + fn:
            foreground.append(2 * tp / (2 * tp + fp + fn))
    f1 = summary(counts, ["b", "x", "y"])["f1"]
    mean = sum(foreground) / len(foreground) if foreground else None
    assert f1 == (pytest.approx(mean) if mean is not None else None)


def test_intervals_hold_the_pooled_score_and_shrink() -> None:
    rng = np.random.default_rng(0)
    slides = rng.integers(1, 100, (200, 2, 2))
    few, many = bootstrap(slides[:10], ["b", "t"]), bootstrap(slides, ["b", "t"])
    assert few is not None
    assert many is not None
    f1 = summary(slides.sum(axis=0), ["b", "t"])["f1"]
    assert f1 is not None
    assert many["f1"][0] <= f1 <= many["f1"][1]
    assert np.diff(many["f1"]) < np.diff(few["f1"])
    assert bootstrap(slides[:1], ["b", "t"]) is None
    assert bootstrap(slides, ["b", "t"]) == many


def test_labels_beyond_the_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="label 5"):
        confusion(np.array([5]), np.array([0]), 2)


# --- report ---------------------------------------------------------------------------


def slide_report(name: str, seed: int) -> SlideReport:
    counts = np.random.default_rng(seed).integers(1, 1000, (2, 2))
    return SlideReport(name, "done", "", counts, None)


def test_a_report_escapes_what_comes_from_files(tmp_path: Path) -> None:
    scene = draw_scene(1, height=128, width=128)
    overlay = draw_overlay(scene.pixels, scene.mask, 1 - scene.mask, Classes())
    nasty = "<script>alert(1)</script>"
    bad = SlideReport(nasty, "failed", f"{nasty}: broken", None, None)
    shown = SlideReport("a", "done", "", np.array([[5, 1], [2, 9]]), overlay)
    blank = SlideReport("blank", "done", "", np.array([[9, 0], [0, 0]]), None)
    metrics = write_report(
        str(tmp_path),
        title=nasty,
        classes=Classes(),
        slides=[shown, blank, bad],
        provenance={"model": nasty},
        date="2026-01-01",
    )
    page = (tmp_path / "report.html").read_text()
    assert nasty not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "nothing to find, nothing found" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert metrics["slides"] == {"evaluated": 2, "failed": 1}
    assert metrics["f1"] == pytest.approx(2 * 9 / (2 * 9 + 3))
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    table = pd.read_parquet(tmp_path / "per_slide.parquet")
    assert table["slide"].tolist() == ["a", "blank", nasty]
    assert len(pd.read_csv(tmp_path / "per_slide.csv")) == 3


def test_a_report_of_thousands_of_slides_stays_small(tmp_path: Path) -> None:
    slides = [slide_report(f"slide {i}", i) for i in range(3000)]
    write_report(
        str(tmp_path),
        title="many",
        classes=Classes(),
        slides=slides,
        provenance={},
        date="2026-01-01",
    )
    page = (tmp_path / "report.html").read_text()
    assert len(page) < 5_000_000
    assert "2500 better slides are left out" in page
    assert len(slides_to_show(slides)) == 8


def test_classes_are_checked() -> None:
    assert Classes().value(None) == 1
    for names in ((), ("a",), ("a", "a"), ("a", "")):
        with pytest.raises(ConfigError):
            Classes(names)
    with pytest.raises(SlideError, match="did you mean"):
        Classes().value("tumor")
