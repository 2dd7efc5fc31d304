"""The stages on a real local Ray: what they make, what they do with bad input."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile

import medray
from medray.classes import Classes
from medray.datasets.dataset import labels_uri, read_patches, slide_uri
from medray.datasets.ingest_slides import ingest
from medray.datasets.synthetic import write_slide, write_svg
from medray.datasets.synthetic_scene import draw_scene
from medray.errors import ConfigError
from medray.evaluation.evaluate_run import evaluate
from medray.evaluation.ground_truth import read_truth
from medray.execution.commit import Summary
from medray.geometry import Rectangle, Windows, plan_regions, region_windows
from medray.inference.infer_run import infer
from medray.inference.run import Options, mask_uri
from medray.models.canvas import RegionPixels
from medray.models.config import Prediction
from medray.models.predict import Predictor
from medray.slides.opening import open_slide
from medray.storage import ome_zarr

pytestmark = pytest.mark.usefixtures("cluster")


def table(folder: Path) -> dict[str, dict]:
    return {r["slide"]: r for r in pq.read_table(folder / "slides.parquet").to_pylist()}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


# --- ingest ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dataset")
    summary = ingest(
        [str(slides / "slides")],
        annotations=str(slides / "annotations"),
        groups=str(slides / "groups.csv"),
        fractions=(0.5, 0.5, 0.0),
        out=str(out),
    )
    assert (summary.done, summary.failed) == (4, {})
    return out


def test_a_dataset_holds_the_slides_pixels_and_labels(
    slides: Path, dataset: Path
) -> None:
    for index in range(4):
        name = f"slide_{index:03d}"
        scene = draw_scene(50 + index, height=768, width=640, tumour=True)
        with open_slide(slides / "slides" / f"{name}.tif") as slide:
            pixels = slide.read(0, 0, 768, 640)
        with open_slide(slide_uri(str(dataset), name)) as ours:
            np.testing.assert_array_equal(ours.read(0, 0, 768, 640), pixels)
            assert ours.mpp == pytest.approx(0.5)
        labels = ome_zarr.open_level(labels_uri(str(dataset), name))[:]
        assert (labels != scene.mask).mean() < 1e-3


def test_patches_say_where_and_what(dataset: Path) -> None:
    patches = read_patches(str(dataset), "train") + read_patches(str(dataset), "val")
    assert len(patches) == 4 * 4
    for patch in patches:
        labels = ome_zarr.open_level(labels_uri(str(dataset), patch["slide"]))
        place = Rectangle(patch["y"], patch["x"], patch["height"], patch["width"])
        part = np.asarray(labels[place.slices()])
        assert patch["class_px"] == np.bincount(part.ravel(), minlength=2).tolist()
        assert 0 <= patch["tissue"] <= 1


def test_patients_are_never_split(dataset: Path) -> None:
    rows = table(dataset)
    split_of: dict[str, set[str]] = {}
    for row in rows.values():
        split_of.setdefault(row["group"], set()).add(row["split"])
    assert all(len(splits) == 1 for splits in split_of.values())
    assert {row["split"] for row in rows.values()} == {"train", "val"}


def test_ingest_again_does_nothing(slides: Path, dataset: Path) -> None:
    before = contents(dataset)
    again = ingest(
        [str(slides / "slides")],
        annotations=str(slides / "annotations"),
        groups=str(slides / "groups.csv"),
        fractions=(0.5, 0.5, 0.0),
        out=str(dataset),
    )
    assert (again.done, again.skipped, again.regions) == (0, 4, 0)
    assert contents(dataset) == before


def test_a_dataset_of_other_classes_is_refused(slides: Path, dataset: Path) -> None:
    with pytest.raises(ConfigError, match="other settings.*classes"):
        ingest([str(slides)], out=str(dataset), classes=("background", "other"))


@pytest.fixture(scope="module")
def bad_inbox(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good slides among everything that scanners and people leave behind."""
    inbox = tmp_path_factory.mktemp("inbox")
    (inbox / "a").mkdir()
    (inbox / "b").mkdir()
    good = slides / "slides" / "slide_000.tif"
    shutil.copy(good, inbox / "a" / "same.tif")
    shutil.copy(slides / "slides" / "slide_001.tif", inbox / "b" / "same.tif")
    (inbox / "empty.tif").write_bytes(b"")
    (inbox / "text.tif").write_text("not a slide")
    cut = (slides / "slides" / "slide_002.tif").read_bytes()
    (inbox / "cut.tif").write_bytes(cut[: len(cut) * 2 // 3])
    rng = np.random.default_rng(0)
    tifffile.imwrite(
        inbox / "no mpp.tif",
        rng.integers(0, 256, (300, 200, 3), dtype=np.uint8),
        photometric="rgb",
    )
    shutil.copy(good, inbox / "x..%2fescape<script>.tif")
    return inbox


BAD = {"empty": "expected a TIFF", "text": "expected a TIFF", "cut": "cut"}
GOOD = {"a__same", "b__same", "no_mpp", "x.._2fescape_script_"}


def check_bad_inbox(
    summary: Summary, out: Path, inbox: Path, bad: dict[str, str]
) -> None:
    rows = table(out)
    assert set(summary.failed) == set(bad)
    done = {name for name, row in rows.items() if row["status"] == "done"}
    assert done == (GOOD | set(BAD)) - set(bad)
    for name, message in bad.items():
        assert rows[name]["status"] == "failed"
        assert message in rows[name]["message"]
        assert f"{name.replace('_', ' ')}.tif" in rows[name]["message"]
    inside = {path.resolve() for path in out.rglob("*")}
    assert all(path.is_relative_to(out.resolve()) for path in inside)
    assert not list(inbox.parent.glob("escape*"))


def test_bad_slides_cost_a_row_each_in_ingest(bad_inbox: Path, tmp_path: Path) -> None:
    summary = ingest([str(bad_inbox)], out=str(tmp_path))
    check_bad_inbox(summary, tmp_path, bad_inbox, BAD)


def test_bad_slides_cost_a_row_each_in_infer(
    bad_inbox: Path, slides: Path, model: Path, tmp_path: Path
) -> None:
    inbox, run = tmp_path / "inbox", tmp_path / "run"
    shutil.copytree(bad_inbox, inbox)
    summary = infer([str(inbox)], model=str(model), out=str(run))
    bad = {name: BAD[name] for name in ("empty", "text")}
    bad["no_mpp"] = "works at 0.5; give --mpp, a number or a CSV"
    check_bad_inbox(summary, run, inbox, bad)
    before = table(run)
    # A slide that is cut off is predicted as far as it goes.
    cut = before["cut"]
    assert "cut.tif" in cut["note"]
    assert "cannot be read" in cut["note"]
    assert 0 < cut["unreadable_px"] < cut["height"] * cut["width"]
    # What was repaired or replaced is done again, and nothing else: not what is touched.
    for name in BAD:
        shutil.copy(inbox / "a" / "same.tif", inbox / f"{name}.tif")
    shutil.copy(slides / "slides" / "slide_003.tif", inbox / "b" / "same.tif")
    (inbox / "a" / "same.tif").touch()
    said = tmp_path / "mpp.csv"
    said.write_text("slide,mpp\nno mpp.tif,0.25\n")
    options = Options(mpp=str(said))
    again = infer([str(inbox)], model=str(model), out=str(run), options=options)
    assert (again.done, again.skipped, again.failed) == (5, 2, {})
    after = table(run)
    found = after.pop("no_mpp")
    assert (found["mpp_x"], found["mpp_y"], found["mpp_from"]) == (0.25, 0.25, "--mpp")
    assert (found["mpp"], found["scale"]) == (0.5, 2.0)
    assert after["a__same"]["mpp_from"].startswith("XResolution")
    changed = {n for n in after if after[n]["digest"] != before[n]["digest"]}
    assert changed == {*BAD, "b__same"}


def test_annotations_that_do_not_fit(
    slides: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scene = draw_scene(1, height=512, width=512)
    notes = tmp_path / "notes"
    write_slide(tmp_path / "in", "other_size", scene)
    write_slide(tmp_path / "in", "unknown", scene)
    write_slide(tmp_path / "in", "unannotated", scene)
    write_slide(tmp_path / "in", "crossed", scene)
    write_svg(notes, "other_size", draw_scene(1, height=512, width=300))
    write_svg(notes, "no_slide", scene)
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 512 512">'
    (notes / "unknown.svg").write_text(f'{head}<rect data-class="x" width="9"/></svg>')
    bow = '<polygon points="0,0 512,512 512,0 0,512"/>'
    (notes / "crossed.svg").write_text(f"{head}{bow}</svg>")
    with caplog.at_level("WARNING"):
        summary = ingest(
            [str(tmp_path / "in")], annotations=str(notes), out=str(tmp_path / "out")
        )
    assert set(summary.failed) == {"other_size", "unknown"}
    assert "another slide" in summary.failed["other_size"]
    assert "known classes" in summary.failed["unknown"]
    assert "no_slide" in caplog.text
    assert "unannotated" in caplog.text
    rows = table(tmp_path / "out")
    assert rows["unannotated"]["split"] == ""
    assert rows["crossed"]["px_tumour"] == pytest.approx(512 * 512 / 2, rel=0.01)


def test_a_folder_that_cannot_be_read_or_is_empty(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no slides"):
        ingest([str(tmp_path)], out=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="nothing there"):
        ingest([str(tmp_path / "absent")], out=str(tmp_path / "out"))


# --- infer ----------------------------------------------------------------------------

EXACT = Options(prediction=Prediction(precision="float32"), everywhere=True)


@pytest.fixture(scope="module")
def exact_run(
    slides: Path, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run over the four slides, in float32 and of their glass too."""
    out = tmp_path_factory.mktemp("exact") / "run"
    source, folder = str(slides / "slides"), str(out)
    summary = infer([source], model=str(model), out=folder, options=EXACT)
    assert (summary.done, summary.failed, summary.regions) == (4, {}, 4)
    return out


def mask_of(run: Path, name: str) -> np.ndarray:
    return medray.open_mask(mask_uri(str(run), name)).compute()


def expected_mask(slide_path: Path, model: Path) -> np.ndarray:
    """The mask by a plain loop in this process, with no Ray, float32."""
    how = Prediction(precision="float32")
    predictor = Predictor.from_folders([str(model)], how)
    with open_slide(slide_path) as slide:
        level = slide.levels[0]
        whole = Rectangle(0, 0, level.height, level.width)
        windows: Windows = predictor.config.window
        plan = region_windows(whole, level.height, level.width, windows)
        pixels = slide.read(0, 0, level.height, level.width)
        region = RegionPixels(pixels, plan, level.height, level.width)
        return next(predictor.predict([region])).labels


def test_masks_equal_the_plain_loop_for_any_regions(
    slides: Path, model: Path, exact_run: Path, tmp_path: Path
) -> None:
    path = slides / "slides"
    summary = infer(
        [str(path)],
        model=str(model),
        out=str(tmp_path),
        options=replace(EXACT, region=512),
    )
    assert (summary.done, summary.failed) == (4, {})
    assert summary.regions == 4 * len(list(plan_regions(768, 640, 512)))
    for index in range(4):
        name = f"slide_{index:03d}"
        mask = mask_of(tmp_path, name)
        np.testing.assert_array_equal(mask, mask_of(exact_run, name))
        if index < 2:
            expected = expected_mask(path / f"{name}.tif", model)
            np.testing.assert_array_equal(mask, expected)


def test_blank_glass_is_left_out_and_probabilities_are_kept_on_request(
    model: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(240, 250, (1024, 1536, 3), dtype=np.uint8)
    pixels[:400, :400] = draw_scene(3, height=400, width=400).pixels
    tifffile.imwrite(
        tmp_path / "a.tif",
        pixels,
        tile=(256, 256),
        photometric="rgb",
        metadata=None,
        resolution=(20_000, 20_000),
        resolutionunit="CENTIMETER",
    )
    run = tmp_path / "r"
    summary = infer(
        [str(tmp_path / "a.tif")],
        model=str(model),
        out=str(run),
        options=Options(region=512, prediction=Prediction(probabilities=True)),
    )
    assert summary.regions == 1  # of six
    mask = mask_of(run, "a")
    assert mask[512:].sum() == 0
    assert mask[:, 512:].sum() == 0
    assert mask.shape == (1024, 1536)
    shards = list((run / "masks/a.ome.zarr/0/c").rglob("*"))
    assert sum(path.is_file() for path in shards) == 1
    kept = medray.open_mask(str(run / "masks/a.probabilities.ome.zarr")).compute()
    assert kept.shape == (2, 1024, 1536)
    tissue = np.s_[:512, :512]
    first, second = (values[tissue].astype(int) for values in kept)
    sure = np.abs(second - first) > 2
    assert sure.any()
    np.testing.assert_array_equal((second > first)[sure], mask[tissue][sure] == 1)


def test_a_run_of_another_model_is_refused(
    slides: Path, model: Path, exact_run: Path
) -> None:
    slide = str(slides / "slides" / "slide_000.tif")
    options = replace(EXACT, prediction=Prediction())
    with pytest.raises(ConfigError, match="precision: float32 -> auto"):
        infer([slide], model=str(model), out=str(exact_run), options=options)


# --- evaluate -------------------------------------------------------------------------


def test_evaluation_equals_counting_by_hand(
    slides: Path, dataset: Path, exact_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(exact_run, run)
    hits = wrong = missed = 0
    for index in range(4):
        name = f"slide_{index:03d}"
        mask = mask_of(run, name) == 1
        truth = ome_zarr.open_level(labels_uri(str(dataset), name))[:] == 1
        hits += int((mask & truth).sum())
        wrong += int((mask & ~truth).sum())
        missed += int((~mask & truth).sum())
    f1 = 2 * hits / (2 * hits + wrong + missed)
    by_labels = evaluate(str(run), truth=str(dataset), out=str(tmp_path / "a"))
    assert by_labels.f1 == pytest.approx(f1)
    by_drawing = evaluate(
        str(run), truth=str(slides / "annotations"), out=str(tmp_path / "b")
    )
    assert by_drawing.f1 == pytest.approx(f1)
    assert (by_labels.evaluated, by_labels.failed) == (4, {})
    page = Path(by_labels.report).read_text()
    assert "slide_003" in page
    assert "data:image/jpeg;base64" in page
    val = evaluate(str(run), truth=str(dataset), out=str(tmp_path / "c"), split="val")
    assert val.evaluated == 2
    again = evaluate(str(run), truth=str(dataset), out=str(tmp_path / "a"))
    assert again == by_labels
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "images.csv").touch()
    with pytest.raises(ConfigError, match=r"another kind of report \(images.csv\)"):
        evaluate(str(run), truth=str(dataset), out=str(tmp_path / "images"))
    # One damaged mask costs its slide; the others keep their scores.
    for shard in (run / "masks/slide_001.ome.zarr").rglob("c/*/*"):
        data = bytearray(shard.read_bytes())
        shard.write_bytes(bytes(len(data) // 2) + data[len(data) // 2 :])
    damaged = evaluate(str(run), truth=str(dataset), out=str(tmp_path / "e"))
    assert damaged.evaluated == 3
    assert set(damaged.failed) == {"slide_001"}
    assert "medray verify" in damaged.failed["slide_001"]


def test_a_model_of_other_classes_is_refused(
    slides: Path, exact_run: Path, tmp_path: Path
) -> None:
    ingest(
        [str(slides / "slides" / "slide_000.tif")],
        annotations=str(slides / "annotations"),
        classes=("background", "tumour", "stroma"),
        out=str(tmp_path / "d"),
    )
    out = str(tmp_path / "e")
    with pytest.raises(ConfigError, match=r"stroma.*not the model's"):
        evaluate(str(exact_run), truth=str(tmp_path / "d"), out=out)
    with pytest.raises(ConfigError, match="none of the 4 slides"):
        evaluate(str(exact_run), truth=str(tmp_path), out=out)


def test_a_dataset_stands_for_its_slides(
    dataset: Path, model: Path, exact_run: Path, tmp_path: Path
) -> None:
    summary = infer([str(dataset)], model=str(model), out=str(tmp_path), options=EXACT)
    assert (summary.done, summary.failed) == (4, {})
    for index in range(4):
        name = f"slide_{index:03d}"
        np.testing.assert_array_equal(mask_of(tmp_path, name), mask_of(exact_run, name))


@pytest.mark.parametrize("downsample", [1.0, 0.8, 1.978, 2.5, 4.0, 7.0])
def test_a_dataset_is_the_truth_at_any_resolution(
    downsample: float, tmp_path: Path
) -> None:
    classes = Classes()
    uri = str(tmp_path / "truth.ome.zarr")
    height, width = 1500, 1300
    yy, xx = np.mgrid[:height, :width]
    labels = ((yy - 700) ** 2 + (xx - 600) ** 2 < 450**2).astype(np.uint8)
    ome_zarr.create_labels(
        uri, height, width, mpp=0.25, name="", classes=classes, attributes={}
    )
    ome_zarr.write_region(uri, Rectangle(0, 0, height, width), labels)
    ome_zarr.build_pyramid(uri)
    row = {"truth": uri, "kind": "dataset", "downsample": downsample}
    row |= {"level0_height": height, "level0_width": width}
    size = [round(n / downsample) for n in (height, width)]
    region = Rectangle(10, 20, size[0] - 10, size[1] - 20)
    found = read_truth(row, region, classes)
    centres = [
        np.clip(((np.arange(a, b) + 0.5) * downsample).astype(int), 0, n - 1)
        for a, b, n in ((10, size[0], height), (20, size[1], width))
    ]
    expected = labels[np.ix_(*centres)]
    assert found.shape == expected.shape
    assert (found != expected).mean() < 0.004
