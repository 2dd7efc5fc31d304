"""Hostile input: each file ends as a success or as a row with a reason.

The files are made by tests/hostile.py from a seed and fed to processes that plan and read
them as a run's do. A process that dies or hangs is noted, and replaced.
"""

import contextlib
import json
import os
import queue
import random
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import hostile
import numpy as np
import pytest

from medray.classes import Classes
from medray.geometry import Rectangle, Windows
from medray.models.config import Architecture, ModelConfig
from medray.models.folder import save_model
from medray.models.segmenters import build_segmenter
from medray.slides.discovery import find_slides, slide_id
from medray.storage import ome_zarr

LIMIT_S = 20.0
LIMIT_MIB = 3000
SCRIPT = Path(__file__).parents[2] / "hostile.py"


@dataclass
class Told:
    """What came of a file."""

    name: str
    told: str
    why: str
    seconds: float
    peak_mib: int


class Prober:
    """A process that is fed with paths, one at a time."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(self._out)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self._out.parent / "cwd",
            text=True,
            errors="surrogateescape",
        )
        self._answers: queue.Queue[str] = queue.Queue()
        self._first = True
        threading.Thread(
            target=self._listen, args=(self._process, self._answers), daemon=True
        ).start()

    @staticmethod
    def _listen(process: subprocess.Popen, answers: queue.Queue) -> None:
        with process.stdout:
            for line in process.stdout:
                answers.put(line)
        answers.put("")

    def probe(self, kind: str, path: Path) -> Told:
        self._process.stdin.write(f"{kind} {path}\n")
        self._process.stdin.flush()
        try:
            # The first answer waits for imports.
            line = self._answers.get(timeout=LIMIT_S + 60 * self._first)
        except queue.Empty:
            told = Told(path.name, "hung", "", LIMIT_S, 0)
        else:
            self._first = False
            if line:
                return Told(path.name, **json.loads(line))
            told = Told(path.name, f"died {self._process.wait()}", "", 0, 0)
        self.close()
        self._start()
        return told

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):  # what it did not live to read
            self._process.stdin.close()


def feed(kind: str, paths: Iterable[Path], folder: Path) -> list[Told]:
    """Feed two processes with files; give what came of each."""
    (folder / "cwd").mkdir(exist_ok=True)
    todo: queue.Queue[Path] = queue.Queue()
    for path in paths:
        todo.put(path)
    told: list[Told] = []

    def work(number: int) -> None:
        prober = Prober(folder / f"out{number}")
        while True:
            try:
                path = todo.get_nowait()
            except queue.Empty:
                break
            told.append(prober.probe(kind, path))
        prober.close()

    workers = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return told


def check(told: list[Told], folder: Path, count: int) -> Counter:
    assert len(told) == count
    bad = [t for t in told if t.told not in ("row", "success")]
    assert not bad, bad[:10]
    unnamed = [t for t in told if t.told == "row" and t.name.split(".")[0] not in t.why]
    assert not unnamed, unnamed[:10]
    slow = [t for t in told if t.seconds > LIMIT_S]
    assert not slow, slow
    assert max(t.peak_mib for t in told) < LIMIT_MIB
    # Nothing is written but below the output.
    assert not any((folder / "cwd").iterdir())
    known = {"cwd", "out0", "out1", "in"}
    assert {path.name for path in folder.iterdir()} <= known
    outcomes = Counter(t.told for t in told)
    print(dict(outcomes), f"slowest {max(t.seconds for t in told):.1f} s")
    return outcomes


def write(mutants: Iterable[hostile.Mutant], folder: Path) -> list[Path]:
    folder.mkdir()
    paths = []
    for name, data in mutants:
        paths.append(folder / name)
        paths[-1].write_bytes(data)
    return paths


# A few in every test run, all of them in the long one; in CI, whose time ends, a quarter.
SIZES = [
    pytest.param(0.05, id="some"),
    pytest.param(
        0.25 if "CI" in os.environ else 1.0,
        id="all",
        marks=pytest.mark.timeout(1800),
    ),
]


@pytest.mark.parametrize("share", SIZES)
def test_hostile_tiffs(tmp_path: Path, share: float) -> None:
    paths = write(hostile.tiffs(int(1300 * share), random.Random(1)), tmp_path / "in")
    told = feed("slide", paths, tmp_path)
    outcomes = check(told, tmp_path, len(paths))
    assert min(outcomes["row"], outcomes["success"]) > 0.05 * len(paths)


@pytest.mark.parametrize("share", SIZES)
def test_hostile_annotations(tmp_path: Path, share: float) -> None:
    mutants = hostile.annotations(int(500 * share), random.Random(2))
    paths = write(mutants, tmp_path / "in")
    told = feed("annotation", paths, tmp_path)
    outcomes = check(told, tmp_path, len(paths))
    assert min(outcomes["row"], outcomes["success"]) > 0.05 * len(paths)
    by_name = {t.name: t for t in told}
    for name in (
        "entities.svg",
        "outside.svg",
        "deeper.svg",
        "deeper.geojson",
        "tangle.geojson",
    ):
        assert by_name[name].told == "row"
    for name in ("bow.geojson", "star.geojson", "millions.geojson"):
        assert by_name[name].told == "success"


@pytest.mark.parametrize("share", SIZES)
def test_hostile_zarrs(tmp_path: Path, share: float) -> None:
    uri = str(tmp_path / "in" / "seed.ome.zarr")
    ome_zarr.create_image(uri, 300, 260, mpp=0.5, name="x", attributes={})
    pixels = np.random.default_rng(0).integers(0, 255, (3, 300, 260)).astype(np.uint8)
    ome_zarr.write_region(uri, Rectangle(0, 0, 300, 260), pixels)
    seed = {
        p.relative_to(uri).as_posix(): p.read_bytes()
        for p in Path(uri).rglob("*")
        if p.is_file()
    }
    shutil.rmtree(uri)
    paths = []
    for name, store in hostile.zarrs(int(150 * share), random.Random(3), seed):
        paths.append(tmp_path / "in" / name)
        for inside, data in store.items():
            (paths[-1] / inside).parent.mkdir(parents=True, exist_ok=True)
            (paths[-1] / inside).write_bytes(data)
    check(feed("slide", paths, tmp_path), tmp_path, len(paths))


@pytest.mark.parametrize("share", SIZES)
def test_hostile_weights(tmp_path: Path, share: float) -> None:
    good = tmp_path / "in" / "good"
    architecture = Architecture("unet", "tu-test_resnet")
    config = ModelConfig(
        architecture=architecture,
        classes=Classes(),
        window=Windows(128, 96),
        mpp=0.5,
    )
    save_model(str(good), config, build_segmenter(architecture, 2), {"f1": None})
    paths = []
    for name, data in hostile.safetensors(int(60 * share), random.Random(4)):
        paths.append(tmp_path / "in" / name.removesuffix(".safetensors"))
        paths[-1].mkdir()
        (paths[-1] / "model.yaml").write_bytes((good / "model.yaml").read_bytes())
        (paths[-1] / "weights.safetensors").write_bytes(data)
    outcomes = check(feed("model", paths, tmp_path), tmp_path, len(paths))
    assert outcomes["success"] == 0


@pytest.mark.parametrize("share", SIZES)
def test_hostile_recipes(tmp_path: Path, share: float) -> None:
    mutants = hostile.yamls(max(8, int(60 * share)), random.Random(5))
    paths = write(mutants, tmp_path / "in")
    told = feed("recipe", paths, tmp_path)
    check(told, tmp_path, len(paths))
    assert {t.told for t in told if t.name in ("0000.yaml", "laughs.yaml")} == {"row"}


NAMES = [
    "plain.tif",
    "with space.tif",
    "ünï çødé 病理.tif",
    "Schu\u0308tz.tif",  # decomposed, as macOS writes it
    f"{'long' * 50}.tif",
    "..tif",
    "...hidden.tif",
    "a..b.tif",
    "-rf.tif",
    "semi;colon$(x)`y`.tif",
    "<script>alert(1)</script>.tif".replace("/", "\u2215"),
    "line\nbreak.tif",
    "Case.tif",
    "case.tif",
    "100%.tif",
    f"{'病' * 80}.tif",
    os.fsdecode(b"Sch\xfctz.tif"),  # Latin-1, no Unicode
    "con.tif",
    "sub/plain.tif",
    "sub/..tif",
]


def test_names_never_lead_out_or_together(tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    for name in NAMES:
        (inbox / name).parent.mkdir(parents=True, exist_ok=True)
        (inbox / name).write_bytes(b"x")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.tif").write_bytes(b"x")
    (inbox / "folder_link").symlink_to(outside)  # not followed
    (inbox / "linked.tif").symlink_to(outside / "secret.tif")  # a slide like any other
    (inbox / "broken.tif").symlink_to(tmp_path / "nowhere")
    (inbox / "loop").symlink_to(inbox)
    found = find_slides([str(inbox)])
    ids = [slide.slide for slide in found]
    uris = {os.path.relpath(slide.uri, inbox) for slide in found}
    hidden = {name for name in NAMES if name.split("/")[-1].startswith(".")}
    assert uris == set(NAMES) - hidden | {"linked.tif", "broken.tif"}
    assert len({name.casefold() for name in ids}) == len(ids)
    for name in ids:
        assert len(name.encode()) <= 255 - len(".probabilities.ome.zarr") - 40
        assert Path(name).name == name
        assert name not in ("", ".", "..")
        assert not set(name) & set('<>"/\\|?*\n\0:&')


@pytest.mark.parametrize(
    "name", ["../../etc/passwd.tif", "/etc/passwd.tif", "a/../../b.tif", "..", ""]
)
def test_ids_are_one_plain_name(name: str) -> None:
    made = slide_id(name)
    assert Path(made).name == made
    assert made not in ("", ".", "..")
