"""A scene or a plane that the user chose is what every stage reads and tells of.

The images of a file are of one size, so that only their pixels tell which was read.
"""

import functools
import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import serial
import serial_ingest
import tifffile
import zarr

from medray import cli, open_mask
from medray.apps.convert import _of_dataset, _of_run
from medray.apps.convert_write import write_copy
from medray.apps.nightly.drift import stain_values
from medray.apps.viewer.run import open_viewed, read_rows, source_of
from medray.apps.viewer.tiles import open_unchanged, slide_tile
from medray.classes import Classes
from medray.datasets.dataset import slide_uri
from medray.datasets.synthetic_scene import draw_scene
from medray.evaluation import pictures
from medray.evaluation.count import FieldOfView
from medray.evaluation.truth_files import match_ground_truth
from medray.execution.rows import map_rows
from medray.geometry import Rectangle
from medray.inference.run import Options, mask_uri
from medray.models.config import Prediction
from medray.models.predict import Predictor
from medray.storage import files, ome_zarr
from medray.storage.ledger import Ledger

UInt8 = npt.NDArray[np.uint8]
HEIGHT, WIDTH = 520, 600
WHOLE = Rectangle(0, 0, HEIGHT, WIDTH)
PREDICTION = Prediction(precision="float32")
KINDS = ("scene", "plane")
UM = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}


@pytest.fixture(scope="module")
def images() -> list[UInt8]:
    """Two slides and glass, (height, width, 3), all of one size."""
    size = {"height": HEIGHT, "width": WIDTH}
    tissue = [draw_scene(seed, **size).pixels for seed in (11, 12)]
    return [*tissue, np.full_like(tissue[0], 244)]


@pytest.fixture(scope="module")
def folder(images: list[UInt8], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images as scenes of a file, as planes of another, and each by itself."""
    folder = tmp_path_factory.mktemp("chosen")
    options: Any = {"photometric": "rgb", "tile": (128, 128)}
    for name in (*KINDS, "0", "1", "2"):
        (folder / name).mkdir()
    with tifffile.TiffWriter(folder / "scene" / "x.ome.tif", ome=True) as tiff:
        for pixels in images:
            tiff.write(pixels, metadata={"axes": "YXS"} | UM, **options)
    with tifffile.TiffWriter(folder / "plane" / "x.ome.tif", ome=True) as tiff:
        tiff.write(np.stack(images), metadata={"axes": "ZYXS"} | UM, **options)
    for number, pixels in enumerate(images):
        with tifffile.TiffWriter(folder / f"{number}" / "x.ome.tif", ome=True) as tiff:
            tiff.write(pixels, metadata={"axes": "YXS"} | UM, **options)
    ring = [[50, 40], [300, 40], [300, 240], [50, 240], [50, 40]]
    feature = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"classification": {"name": "tumour"}},
    }
    (folder / "truth").mkdir()
    (folder / "truth" / "x.geojson").write_text(json.dumps(feature))
    return folder


@pytest.fixture(scope="module")
def predictor(model: Path) -> Predictor:
    return Predictor.from_folders([str(model)], PREDICTION)


def infer(
    folder: Path, predictor: Predictor, model: Path, run: Path, **chosen: int
) -> Any:
    options = Options(region=512, prediction=PREDICTION, **chosen)
    return serial.infer(folder, predictor, model, run, options)


@pytest.fixture(scope="module", params=KINDS)
def run(
    request: pytest.FixtureRequest,
    folder: Path,
    predictor: Predictor,
    model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Path]:
    """A run over the second image, and whether that is a scene or a plane."""
    kind, out = request.param, tmp_path_factory.mktemp("run")
    done = infer(folder / kind, predictor, model, out / "run", **{kind: 1})
    assert (done.done, done.failed) == (1, {})
    return kind, out / "run"


def row_of(run: Path) -> dict[str, Any]:
    (row,) = files.read_table(str(run / "slides.parquet")).to_pylist()
    return row


def mask_of(run: Path) -> UInt8:
    return np.asarray(open_mask(mask_uri(str(run), "x")))


def test_a_run(
    run: tuple[str, Path],
    folder: Path,
    predictor: Predictor,
    model: Path,
    tmp_path: Path,
) -> None:
    """Its row tells what was chosen; its mask is that of the image by itself."""
    kind, made = run
    row = row_of(made)
    other = "plane" if kind == "scene" else "scene"
    assert (row[kind], row[other], row["scale"]) == (1, None, 1.0)
    masks = []
    for number in (0, 1):
        alone = tmp_path / f"{number}"
        assert infer(folder / f"{number}", predictor, model, alone).done == 1
        masks.append(mask_of(alone))
    assert (masks[0] != masks[1]).any()
    np.testing.assert_array_equal(mask_of(made), masks[1])
    # Another choice is done again, the same is not.
    again = tmp_path / "again"
    for number, done in ((1, 1), (1, 0), (0, 1), (0, 0)):
        found = infer(folder / kind, predictor, model, again, **{kind: number})
        assert (found.done, found.failed) == (done, {})
        assert row_of(again)[kind] == number
        np.testing.assert_array_equal(mask_of(again), masks[number])


@pytest.mark.parametrize("kind", KINDS)
def test_a_dataset(
    kind: str, folder: Path, images: list[UInt8], tmp_path: Path
) -> None:
    done_at = []
    for number in (1, 1, 0):
        chosen: Any = {kind: number}
        rows = serial_ingest.ingest(
            folder / kind, tmp_path / "data", folder / "truth", **chosen
        )
        assert (rows["x"]["status"], rows["x"][kind]) == ("done", number)
        done_at.append(rows["x"]["committed_at"])
        stored = ome_zarr.open_level(slide_uri(str(tmp_path / "data"), "x"))
        np.testing.assert_array_equal(np.moveaxis(stored[:], 0, 2), images[number])
    assert done_at[0] == done_at[1] < done_at[2]
    # A copy of the dataset is one of what it holds.
    ((copy,), failed) = _of_dataset(str(tmp_path / "data"))
    assert failed == {}
    write_copy(copy, "ome-zarr-0.4", str(tmp_path / "copies"))
    written = zarr_level(tmp_path / "copies" / "x.ome.zarr")
    np.testing.assert_array_equal(written, images[0])


def zarr_level(store: Path) -> UInt8:
    """The finest level of an OME-Zarr of version 0.4, (height, width, 3)."""
    array = zarr.open_array(store / "0", mode="r")
    return np.moveaxis(np.asarray(array[:]).reshape(3, HEIGHT, WIDTH), 0, 2)


@pytest.mark.parametrize("to", ["ome-zarr", "ome-zarr-0.4"])
def test_a_copy_with_its_image(
    run: tuple[str, Path], images: list[UInt8], tmp_path: Path, to: str
) -> None:
    ((copy,), failed) = _of_run(str(run[1]), True)
    assert failed == {}
    write_copy(copy, to, str(tmp_path))
    store = tmp_path / "x.ome.zarr"
    if to == "ome-zarr":
        found = np.moveaxis(ome_zarr.open_level(str(store))[:], 0, 2)
    else:
        found = zarr_level(store)
    np.testing.assert_array_equal(found, images[1])


def only_pixels(rgb: UInt8, *_: Any) -> bytes:
    """What stands for `draw_overlay`: the slide's pixels without the masks."""
    return np.ascontiguousarray(rgb).tobytes()


def test_pictures_of_an_evaluation(
    run: tuple[str, Path],
    folder: Path,
    images: list[UInt8],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pictures, "draw_overlay", only_pixels)
    made, classes = str(run[1]), Classes()
    (row,) = match_ground_truth([row_of(run[1])], str(folder / "truth"), classes)
    assert pictures._slide(row, made, classes) == images[1].tobytes()
    field = FieldOfView(0, slide="x", y=0, x=0)
    assert pictures._field(row, field, made, classes) == images[1].tobytes()


def test_pictures_of_a_comparison(
    run: tuple[str, Path],
    folder: Path,
    images: list[UInt8],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = importlib.import_module("medray.evaluation.compare_runs")
    monkeypatch.setattr(pictures, "draw_overlay", only_pixels)
    monkeypatch.setattr(pictures, "draw_change", only_pixels)
    drawn: list[bytes] = []
    monkeypatch.setattr(stage, "data_uri", lambda data: drawn.append(data) or "")
    made = str(run[1])
    for truth in (None, str(folder / "truth")):
        stage._pictures([{"slide": "x"}], (made, made), truth, Classes())
    assert drawn == [images[1].tobytes()] * 2


def test_tiles_of_a_viewer(run: tuple[str, Path], images: list[UInt8]) -> None:
    viewed = open_viewed(str(run[1]), report=None, truth=None, slides=None)
    source = source_of(viewed, viewed.row("x"))
    tile = slide_tile(open_unchanged(source), WHOLE, 1)
    np.testing.assert_array_equal(tile, images[1])


def test_tiles_of_a_slide_under_way(
    folder: Path, predictor: Predictor, model: Path, images: list[UInt8], tmp_path: Path
) -> None:
    """Nothing but the digest in its mask's attributes tells what was chosen."""
    options = Options(region=512, prediction=PREDICTION, scene=1)
    source, run = folder / "scene", tmp_path / "run"
    with pytest.raises(serial.CrashError):
        serial.infer(source, predictor, model, run, options, crash_after=1)
    assert read_rows(str(tmp_path / "run"))["x"]["status"] == "under way"
    slides = str(folder / "scene")
    viewed = open_viewed(str(tmp_path / "run"), report=None, truth=None, slides=slides)
    source = source_of(viewed, viewed.row("x"))
    tile = slide_tile(open_unchanged(source), WHOLE, 1)
    np.testing.assert_array_equal(tile, images[1])


@pytest.mark.parametrize("kind", KINDS)
def test_staining(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(folder / kind / "x.ome.tif")
    alone = [stain_values(str(folder / f"{n}" / "x.ome.tif")) for n in range(3)]
    assert alone[0] != alone[1]
    assert alone[2] == {}
    assert [stain_values(uri, **{kind: n}) for n in range(3)] == alone
    # As a night measures it of its slides, but in this process.
    measure = importlib.import_module("medray.apps.nightly.measure")
    finish = importlib.import_module("medray.apps.nightly.finish")
    here = functools.partial(map_rows, executor="local")
    monkeypatch.setattr(measure, "map_rows", here)
    plan = {"night": "n", "slides": [{"slide": "x", "file": "f", "uri": uri}]}
    plan["slides"][0]["digest"] = "d"
    row = {"status": "done", "digest": "d"}
    monkeypatch.setattr(finish, "run_values", lambda *_: {})
    options = Options(**{kind: 1})
    settings = SimpleNamespace(
        options=options, model_digest="m", classes=SimpleNamespace(names=())
    )
    found = finish._outcomes(plan, {}, {"x": row}, settings, "out", {}, [])
    assert found["f"].values == alone[1]


@pytest.mark.parametrize("kind", KINDS)
def test_an_estimate(
    kind: str, folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Glass has nothing to do; only the third image is."""
    stage = importlib.import_module("medray.inference.estimate_run")
    planned: list[Any] = []

    class PlannedError(Exception):
        """Far enough: what follows needs Ray."""

    def plan(function: Any, rows: Any, **_: Any) -> None:
        planned.extend(map(function, rows))
        raise PlannedError

    monkeypatch.setattr(stage, "map_rows", plan)
    for number in range(3):
        options = Options(region=512, **{kind: number})
        with pytest.raises(PlannedError):
            stage.estimate([str(folder / kind)], model=str(model), options=options)
    windows = [found.windows for found in planned]
    assert windows[0] > 0
    assert windows[1] > 0
    assert windows[2] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_each_stage_is_told_what_was_chosen(
    kind: str,
    folder: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the command line to the first row of a slide; Ray is not reached."""
    slides, weights = str(folder / kind), tmp_path / "weights"
    weights.touch()
    told: list[Any] = []

    class ToldError(BaseException):
        """Far enough; the command line answers an Exception in words."""

    @dataclass(frozen=True)
    class Unsettled:
        compile: str = "auto"

    def take(*given: Any, **_: Any) -> Any:
        slides = next(one for one in given if isinstance(one, (list, tuple)))
        told.append([(file.scene, file.plane) for file in slides])
        raise ToldError

    monkeypatch.setattr("medray.mil.encoder.settle_encoder", lambda *_, **__: None)
    commands: dict[tuple[str, str], list[str]] = {
        ("datasets.ingest_slides", "run_stage"): [],
        ("inference.infer_run", "_infer"): ["--model", str(model)],
        ("mil.embed_slides", "_embed"): ["--encoder", "e", "--weights", str(weights)],
    }
    for (module, function), more in commands.items():
        stage = importlib.import_module(f"medray.{module}")
        name = module.partition(".")[2].partition("_")[0]
        if name == "embed":
            monkeypatch.setattr(stage, "FeatureSettings", lambda **_: Unsettled())
        monkeypatch.setattr(stage, function, take)
        command = [name, slides, "--out", str(tmp_path / name), f"--{kind}", "1"]
        with pytest.raises(ToldError):
            cli.main([*command, *more])
    chosen = (1, None) if kind == "scene" else (None, 1)
    assert told == [[chosen]] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_chosen_stays_with_a_row_of_a_slide_that_failed(
    kind: str, folder: Path, tmp_path: Path, model: Path, predictor: Predictor
) -> None:
    done = infer(folder / kind, predictor, model, tmp_path / "run", **{kind: 7})
    assert list(done.failed) == ["x"]
    row = Ledger(str(tmp_path / "run")).slides["x"]
    assert (row["status"], row[kind]) == ("failed", 7)
