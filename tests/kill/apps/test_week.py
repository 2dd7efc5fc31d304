"""A simulated week of nights, compared with a plain loop over all slides that came."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import serial

from medray.apps.nightly.drift import stain_values
from medray.apps.nightly.night import Night, nightly
from medray.datasets.synthetic import generate
from medray.inference.run import Options, mask_uri
from medray.models.config import Prediction
from medray.models.predict import Predictor
from medray.storage import ome_zarr

pytestmark = pytest.mark.timeout(900)
OPTIONS = Options(region=512, prediction=Prediction(precision="float32"))
# As `digest` of test_nightly.py: what slide_digest is documented to be.


@pytest.fixture(scope="session")
def model(slow_model: Path) -> Path:
    return slow_model


def digest(data: bytes) -> str:
    return (
        f"blake2b:{blake2b(data + str(len(data)).encode(), digest_size=16).hexdigest()}"
    )


def date(day: int) -> str:
    return f"2026-03-{day:02d}"


@pytest.fixture(scope="module")
def arriving(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Slides by letter, and the annotation of the first as `a.svg`."""
    folder = tmp_path_factory.mktemp("arriving")
    paths = generate(folder, slides=8, seed=70, height=512, width=640)
    found = {
        letter: path.read_bytes()
        for letter, path in zip("abcdefgh", paths, strict=True)
    }
    annotation = sorted((folder / "annotations").iterdir())[0]
    return found | {"a.svg": annotation.read_bytes(), "broken": b"II*\0" + bytes(500)}


def killed_in_the_night(arguments: list[str], out: Path) -> None:
    """Start a night with a Ray of its own; SIGKILL when something is committed."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, "jobs/nightly.py", *arguments],
        cwd=Path(__file__).parents[3],
        env=environment,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    run = out / "nights" / date(3) / "run"
    while not [*run.glob("journal/*.jsonl"), *run.glob("slides.parquet")]:
        assert process.poll() is None, "it ended before anything was committed"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_week(
    cluster: None,
    model: Path,
    arriving: dict[str, bytes],
    training_data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "medray.apps.nightly.drift.LEAST", 2
    )  # the slides of a week are few
    inbox, truth, out = (tmp_path / name for name in ("inbox", "truth", "out"))
    (inbox / "sub").mkdir(parents=True)
    truth.mkdir()
    (truth / "a.svg").write_bytes(arriving["a.svg"])

    def put(name: str, content: str) -> None:
        (inbox / name).write_bytes(arriving[content])

    def night(day: int, **how: Any) -> Night:
        how = {"settle": 0.0, "truth": str(truth), "options": OPTIONS} | how
        how |= {"reference": training_data}
        places = {"model": str(model), "out": str(out)}
        return nightly(str(inbox), night=date(day), **places, **how)

    def summary(day: int) -> dict:
        text = (out / "nights" / date(day) / "summary.json").read_text()
        return json.loads(text)

    # Night 1: two slides, one of them twice; a broken file; one that still grows.
    put("a.tif", "a")
    put("b.tif", "b")
    put("z of a.tif", "a")
    put("broken.tif", "broken")
    stop = threading.Event()

    def grow() -> None:
        with open(inbox / "growing.tif", "wb", buffering=0) as file:
            while not stop.wait(0.02):
                file.write(arriving["c"][:1000])

    writer = threading.Thread(target=grow)
    writer.start()
    time.sleep(0.2)
    try:
        first = night(1, settle=1.0)
    finally:
        stop.set()
        writer.join()
    assert (first.done, list(first.handed_on), list(first.left_out)) == (
        2,
        ["broken.tif"],
        ["growing.tif"],
    )
    # Once more: nothing happens, not even to a file.
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    assert night(1).committed_before
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == before

    # Night 2: what grew is whole; a slide comes late, with an old date, in a folder.
    put("growing.tif", "c")
    put("sub/late.tif", "d")
    os.utime(inbox / "sub" / "late.tif", (1e9, 1e9))
    assert night(2).done == 2

    # Night 3: two new ones, one of them under an old name; killed, then run again.
    # What comes in between is for the next night.
    put("e.tif", "e")
    put("a.tif", "f")
    arguments = ["--inbox", str(inbox), "--out", str(out), "--model", str(model)]
    arguments += ["--settle", "0", "--region", "512", "--precision", "float32"]
    arguments += ["--night", date(3), "--truth", str(truth)]
    killed_in_the_night(arguments, out)
    assert not (out / "nights" / date(3) / "summary.json").exists()
    put("g.tif", "g")
    third = night(3)
    assert (third.done, list(third.given_up)) == (2, ["broken.tif"])

    # Night 4: one slide; dies between the catalog and the summary.
    assert night(4).done == 1
    catalog = pq.read_table(out / "catalog.parquet")
    (out / "nights" / date(4) / "summary.json").unlink()
    assert night(4).done == 1
    assert pq.read_table(out / "catalog.parquet") == catalog

    # Night 5: no slide, but the truth of one of night 1 and of one of night 2 comes.
    # Night 6: a copy; the broken file comes whole. It was given up.
    for name in ("b", "late"):
        (truth / f"{name}.svg").write_bytes(arriving["a.svg"])
    assert night(5).done == 0
    told = summary(5)["late"]
    (out / "nights" / date(5) / "summary.json").unlink()  # killed before it committed
    assert night(5).done == 0
    assert summary(5)["late"] == told
    put("copy of e.tif", "e")
    put("broken.tif", "h")
    assert night(6).done == 1
    assert summary(6)["copies"] == [{"name": "copy of e.tif", "same_as": "e.tif"}]
    # Night 7: the old bytes are back: known.
    put("a.tif", "a")
    seventh = night(7)
    assert (seventh.done, seventh.replaced) == (0, 1)

    # The catalog, from the story alone.
    whose = {letter: digest(data) for letter, data in arriving.items()}
    expected = {
        "a": ("done", ["a.tif", "z of a.tif"], 1, [1], ""),
        "b": ("done", ["b.tif"], 1, [1], ""),
        "broken": ("given up", ["broken.tif"], 1, [1, 2, 3], whose["h"]),
        "c": ("done", ["growing.tif"], 2, [2], ""),
        "d": ("done", ["sub/late.tif"], 2, [2], ""),
        "e": ("done", ["copy of e.tif", "e.tif"], 3, [3], ""),
        "f": ("done", ["a.tif"], 3, [3], whose["a"]),
        "g": ("done", ["g.tif"], 4, [4], ""),
        "h": ("done", ["broken.tif"], 6, [6], ""),
    }
    rows = {r["digest"]: r for r in pq.read_table(out / "catalog.parquet").to_pylist()}
    assert rows.keys() == {whose[letter] for letter in expected}
    for letter, (status, names, seen, tried, replaced) in expected.items():
        row = rows[whose[letter]]
        found = (row["status"], sorted(row["names"]), row["replaced_by"])
        assert found == (status, names, replaced), letter
        assert row["first_seen"] == date(seen), letter
        assert row["tried"] == [date(day) for day in tried], letter

    # The masks: each content once, and what a plain loop makes of it.
    everything = tmp_path / "everything"
    everything.mkdir()
    done = [letter for letter in expected if letter != "broken"]
    for letter in done:
        (everything / f"{letter}.tif").write_bytes(arriving[letter])
    predictor = Predictor.from_folders([str(model)], OPTIONS.prediction)
    plain = tmp_path / "plain"
    assert serial.infer(everything, predictor, model, plain, OPTIONS).done == len(done)
    for letter in done:
        row = rows[whose[letter]]
        mask = ome_zarr.open_level(str(out / row["mask"]))[:]
        alone = ome_zarr.open_level(mask_uri(str(plain), letter))[:]
        assert np.array_equal(mask, alone), letter
        seen = (alone == 1).sum() / row_of(plain, letter)["predicted_px"]
        assert row["share_tumour"] == pytest.approx(seen)
        stain = stain_values(str(everything / f"{letter}.tif"))
        assert {name: row[name] for name in stain} == pytest.approx(stain)
    masks = {str(p.relative_to(out)) for p in out.glob("nights/*/run/masks/*.ome.zarr")}
    assert masks == {rows[whose[letter]]["mask"] for letter in done}

    # Drift: against the slides that were trained on, and the nights before.
    slides = pq.read_table(f"{training_data}/slides.parquet").to_pylist()
    trained = [
        stain_values(row["uri"])["eosin_mean"]
        for row in slides
        if row["split"] == "train"
    ]
    drift = {(d["value"], d["against"]): d for d in summary(3)["drift"]}
    against = drift["eosin_mean", "the training slides"]
    assert against["reference_median"] == pytest.approx(np.median(trained))
    assert against["reference_slides"] == len(trained)
    against = drift["share_tumour", "the training slides"]
    marked = [
        row["px_tumour"] / (row["px_tumour"] + row["px_background"])
        for row in slides
        if row["split"] == "train"
    ]
    # Of patches with tissue, which are not the whole slide.
    assert against["reference_median"] >= np.median(marked) > 0
    against = drift["eosin_mean", "the last 30 nights"]
    earlier = [rows[whose[letter]]["eosin_mean"] for letter in "abcd"]
    assert against["reference_median"] == pytest.approx(np.median(earlier))
    tonight = [rows[whose[letter]]["eosin_mean"] for letter in "ef"]
    assert against["median"] == pytest.approx(np.median(tonight))

    # The summaries: what was evaluated, and links that lead somewhere.
    evaluated = [
        (summary(day)["evaluation"] or {}).get("evaluated", 0) for day in range(1, 8)
    ]
    assert evaluated == [1, 0, 1, 0, 0, 0, 0]
    late = {day: summary(day)["late"] for day in range(1, 8)}
    told = [(one["night"], one["slides"], one["evaluated"]) for one in late.pop(5)]
    assert told == [(date(1), ["b"], 2), (date(2), ["sub__late"], 1)]
    assert not any(late.values())
    assert (out / "nights" / date(2) / "report" / "report.html").exists()
    page = (out / "nights" / date(3) / "summary.html").read_text()
    assert 'href="report/report.html"' in page
    assert (out / "nights" / date(3) / "report" / "report.html").exists()
    assert 'href="run/masks/e.ome.zarr"' in page
    assert "broken.tif" in page

    # What Prometheus gets of the nights in this process. Sums: there are many workers.
    deadline = time.monotonic() + 60
    while len(exported()) < 4 and time.monotonic() < deadline:
        time.sleep(1)
    told = exported()
    assert told["ray_medray_slides_done_total"] >= 6
    assert told["ray_medray_slides_failed_total"] >= 2
    assert told["ray_medray_regions_done_total"] >= 6
    assert told["ray_medray_region_wait_seconds_total"] > 0


def exported() -> dict[str, float]:
    """The values that k8s/'s dashboard asks for, from the node's own endpoint."""
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    found: dict[str, float] = {}
    for line in lines:
        name = re.split(r"[{ ]", line)[0]
        if re.match(r"ray_medray_(slides|regions_done|region_wait)", name):
            found[name] = found.get(name, 0) + float(line.rpartition(" ")[2])
    return found


def row_of(run: Path, slide: str) -> dict:
    rows = pq.read_table(run / "slides.parquet").to_pylist()
    (row,) = [row for row in rows if row["slide"] == slide]
    return row
