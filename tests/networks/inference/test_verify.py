"""Digests, repair, leftovers and differences of runs; in one process, so quick."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import serial

from medray.cli import main
from medray.datasets.synthetic import write_slide
from medray.datasets.synthetic_scene import draw_scene
from medray.errors import ConfigError
from medray.evaluation.diff_runs import diff
from medray.geometry import Rectangle
from medray.inference.leftovers import collect
from medray.inference.run import Options, mask_uri
from medray.inference.verify_run import verify
from medray.models.config import Prediction
from medray.models.predict import Predictor
from medray.storage import ome_zarr
from medray.storage.digests import content_digest, merkle_root
from medray.storage.ledger import Ledger
from medray.storage.lock import locked

PLAIN = Options(region=512, prediction=Prediction(precision="float32"))
RICH = Options(
    region=512,
    prediction=Prediction(precision="float32", probabilities=True, quality=True),
    outlines=True,
)


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def outputs(out: Path) -> dict[str, bytes]:
    """What a person looks at; the rest tells when and how it was made."""
    found = contents(out / "masks")
    return found | {f"outlines/{k}": v for k, v in contents(out / "outlines").items()}


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    for seed in range(2):
        scene = draw_scene(seed, height=700, width=1100)
        write_slide(folder, f"s{seed}", scene, layout="pyramid")
    write_slide(folder, "flat", draw_scene(5, height=300, width=300), layout="flat")
    return folder


@pytest.fixture(scope="module")
def run(slides: Path, model: Path, tmp_path_factory: pytest.TempPathFactory):
    """Return a fresh copy of a run with some options, and how to run it again."""
    made: dict[Options, Path] = {}
    predictors: dict[Options, Predictor] = {}

    def again(out: Path, options: Options, crash_after: int = -1):
        if options not in predictors:
            predictors[options] = Predictor.from_folders(
                [str(model)], options.prediction
            )
        predictor = predictors[options]
        return serial.infer(slides, predictor, model, out, options, crash_after)

    def get(tmp_path: Path, options: Options) -> tuple[Path, Callable]:
        if options not in made:
            made[options] = tmp_path_factory.mktemp("run") / "run"
            commit = again(made[options], options)
            assert (commit.done, commit.failed) == (3, {})
        out = tmp_path / "run"
        shutil.copytree(made[options], out)
        return out, lambda crash_after=-1: again(out, options, crash_after)

    return get


@pytest.mark.parametrize("options", [PLAIN, RICH], ids=["plain", "rich"])
def test_an_untouched_run_is_found_good(run, tmp_path: Path, options: Options) -> None:
    out, again = run(tmp_path, options)
    found = verify(str(out))
    assert (found.verified, found.failed) == (3, {})
    assert found.files == len(outputs(out))
    assert again().done == 0
    assert not (out / "lock.json").exists()


def test_the_root_names_every_file(run, tmp_path: Path) -> None:
    out, _ = run(tmp_path, RICH)
    mask = out / "masks" / "s0.ome.zarr"
    attributes = json.loads((mask / "zarr.json").read_text())["attributes"]["medray"]
    assert {"slide_digest", "model_digest", "run_digest", "settings"} < set(attributes)
    assert attributes["settings"]["versions"]["medray"]
    digests = {
        name: content_digest(data)
        for name, data in contents(mask).items()
        if name != "zarr.json"
    }
    assert attributes["merkle_root"] == merkle_root(digests)
    for name in digests:
        assert merkle_root(digests | {name: "0" * 32}) != (attributes["merkle_root"])


def every_file(out: Path) -> list[str]:
    names = [f"masks/{name}" for name in contents(out / "masks")]
    names += [f"commits/{name}" for name in contents(out / "commits")]
    return names + [f"outlines/{name}" for name in contents(out / "outlines")]


@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
@pytest.mark.parametrize(
    "options",
    [PLAIN, RICH],
    ids=["plain", "rich"],
)
def test_any_damage_is_named_and_repaired(
    run, tmp_path: Path, options: Options, how: str
) -> None:
    out, again = run(tmp_path, options)
    whole = outputs(out)
    names = every_file(out)
    rng = np.random.default_rng(0)
    for name in rng.choice(names, 6, replace=False):
        path = out / name
        data = bytearray(path.read_bytes())
        if how == "remove":
            path.unlink()
        elif how == "cut":
            path.write_bytes(data[: len(data) // 2])
        else:
            data[len(data) // 2] ^= 0x10
            path.write_bytes(data)
        found = verify(str(out))
        slide = Path(name).parts[1].split(".")[0]
        assert set(found.failed) == {slide}
        assert name in found.failed[slide]
        commit = again()
        assert (commit.done, commit.failed) == (1, {}), name
        assert outputs(out) == whole, name
        # Just what was damaged: a shard is one region, metadata may be all of them.
        if "/c/" in name:
            assert commit.regions <= 1, name
        assert verify(str(out)).failed == {}


def test_a_file_that_passes_for_a_shard_is_found_and_removed(
    run, tmp_path: Path
) -> None:
    out, again = run(tmp_path, PLAIN)
    whole = outputs(out)
    stray = out / "masks" / "flat.ome.zarr" / "0" / "c" / "7" / "7"
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"x")
    assert "not recorded" in verify(str(out)).failed["flat"]
    commit = again()
    assert (commit.done, commit.regions) == (1, 0)
    assert outputs(out) == whole


def test_damage_of_a_slide_under_way_is_found(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each record is written at once, however quick the regions are.
    monkeypatch.setattr("medray.storage.ledger._FLUSH_S", 0.0)
    out, again = run(tmp_path, PLAIN)
    whole = outputs(out)
    shutil.rmtree(out / "masks")
    (out / "slides.parquet").unlink()
    with pytest.raises(serial.CrashError):
        again(crash_after=4)
    ledger = Ledger(str(out))
    ledger.flush()
    committed = {k: v for k, v in ledger.regions.items() if v}
    record = next(iter(next(iter(committed.values())).values()))
    name = next(iter(record["files"]))
    (out / name).write_bytes(b"")
    found = verify(str(out))
    assert name in " ".join(found.failed.values())
    assert again().failed == {}
    assert outputs(out) == whole


def test_a_lost_mask_of_a_slide_under_way_is_made_anew(run, tmp_path: Path) -> None:
    out, again = run(tmp_path, PLAIN)
    whole = outputs(out)
    row = Ledger(str(out)).slides["s0"]
    ledger = Ledger(str(out))
    record = json.loads((out / "commits" / "s0.json").read_text())
    regions = {int(k): v for k, v in record["regions"].items()}
    ledger.reopen("s0", row["digest"], regions)
    ledger.flush()
    shutil.rmtree(out / "masks" / "s0.ome.zarr")
    with pytest.raises(serial.CrashError):  # the journal still tells of all regions
        again(crash_after=1)
    commit = again()
    assert commit.done == 1
    # The journal may have the one that was done before the crash: it waits 0.5 s.
    assert len(regions) - commit.regions in (0, 1)
    assert outputs(out) == whole


def test_a_slide_that_changes_while_it_is_read_fails_until_the_next_run(
    slides: Path, model: Path, run, tmp_path: Path
) -> None:
    inbox, out = tmp_path / "slides", tmp_path / "run"
    shutil.copytree(slides, inbox)
    predictor = Predictor.from_folders([str(model)], PLAIN.prediction)

    class Replacing:
        def predict(self, sources):
            shutil.copy(slides / "s1.tif", inbox / "s0.tif")
            return predictor.predict(sources)

    found = serial.infer(inbox, Replacing(), model, out, PLAIN)  # type: ignore[arg-type]
    assert set(found.failed) == {"s0"}
    assert "s0.tif" in found.failed["s0"]
    assert "changed while it was read" in found.failed["s0"]
    assert serial.infer(inbox, predictor, model, out, PLAIN).failed == {}
    masks = [ome_zarr.open_level(mask_uri(str(out), name))[:] for name in ("s0", "s1")]
    assert np.array_equal(*masks)


def test_an_open_file_is_not_taken_for_the_one_that_replaced_it(
    slides: Path, model: Path, tmp_path: Path
) -> None:
    inbox, out = tmp_path / "slides", tmp_path / "run"
    inbox.mkdir()
    predictor = Predictor.from_folders([str(model)], PLAIN.prediction)

    def run_over(name: str) -> np.ndarray:
        shutil.copy(slides / f"{name}.tif", inbox / "a.tif")
        assert serial.infer(inbox, predictor, model, out, PLAIN).failed == {}
        return ome_zarr.open_level(mask_uri(str(out), "a"))[:]

    first = run_over("s0")
    run_over("s1")  # written into the same file, which is still open
    (inbox / "a.tif").unlink()
    assert np.array_equal(run_over("s0"), first)


def test_records_of_a_slide_that_was_replaced_are_no_damage(
    run, tmp_path: Path
) -> None:
    out, _ = run(tmp_path, PLAIN)
    digest = Ledger(str(out)).slides["s0"]["digest"]
    ledger = Ledger(str(out))
    ledger.commit_region("s0@another", 0, {"files": {"masks/x.ome.zarr/0/c/0/0": ""}})
    ledger.flush()
    assert verify(str(out)).failed == {}
    ledger.forget_slide("s0")
    ledger.commit_region(f"s0@{digest}", 1, {"files": {}})
    ledger.flush()
    assert Ledger(str(out)).records_of("s0") == (digest, {1: {"files": {}}})


def test_cleaned_masks_are_verified_and_repaired(run, tmp_path: Path) -> None:
    from medray.inference.postprocess import Cleaning

    options = Options(
        region=512,
        prediction=Prediction(precision="float32"),
        clean=Cleaning(smallest=30, holes=30),
    )
    out, again = run(tmp_path, options)
    whole = outputs(out)
    assert verify(str(out)).failed == {}
    shards = (out / "masks/s0.ome.zarr/0/c").rglob("*")
    next(path for path in shards if path.is_file()).unlink()
    assert "s0" in verify(str(out)).failed
    assert again().done == 1
    assert outputs(out) == whole


def test_leftovers_are_removed_and_nothing_else(run, tmp_path: Path) -> None:
    out, _ = run(tmp_path, RICH)
    whole = contents(out)
    mine = out / "notes.txt"
    mine.write_text("keep me")
    foreign = out / "masks" / "theirs.ome.zarr"
    (foreign / "0").mkdir(parents=True)
    (foreign / "0" / "data").write_text("keep me too")
    kept = contents(out)
    # A slide of which nothing was committed, files being written, an old raw mask.
    shutil.copytree(out / "masks/s0.ome.zarr", out / "masks/gone.ome.zarr")
    shutil.copy(out / "outlines/s0.geojson", out / "outlines/gone.geojson")
    shutil.copytree(out / "masks/s0.ome.zarr", out / "raw/s0.ome.zarr")
    (out / "masks/s1.ome.zarr/0/c/0/.partial-abc").write_bytes(b"x")
    (out / "masks/s1.ome.zarr/0/c/0/0.1234.partial").write_bytes(b"x")
    (out / "journal").mkdir(exist_ok=True)
    (out / "journal/.partial-xyz").write_bytes(b"x")
    told = collect(str(out), dry_run=True)
    assert (out / "raw").is_dir()
    found = collect(str(out))
    assert told.removed == found.removed
    assert len(found.removed) == 6
    assert found.bytes > 0
    assert contents(out) == kept
    assert whole.items() <= kept.items()
    assert collect(str(out)).removed == []
    assert verify(str(out)).failed == {}


def test_leftovers_of_a_crash_are_not_missed_by_the_next_run(
    run, tmp_path: Path
) -> None:
    out, again = run(tmp_path, PLAIN)
    whole = outputs(out)
    shutil.rmtree(out)
    with pytest.raises(serial.CrashError):
        again(crash_after=3)
    collect(str(out))
    assert again().failed == {}
    assert outputs(out) == whole


def test_runs_differ_where_they_differ(run, tmp_path: Path) -> None:
    out, _ = run(tmp_path, PLAIN)
    same, _ = run(tmp_path / "b", PLAIN)
    found = diff(str(out), str(same))
    assert (found.compared, found.changed, found.not_compared) == (3, {}, {})
    assert all(row["f1"] in (1.0, None) for row in found.agreement)
    # Another mask in one region.
    mask = ome_zarr.open_level(mask_uri(str(same), "s1"))
    part = np.asarray(mask[512:700, 0:512])
    changed = part.copy()
    changed[:100, :100] = 1 - changed[:100, :100]
    ome_zarr.write_region(
        mask_uri(str(same), "s1"), Rectangle(512, 0, 188, 512), changed
    )
    found = diff(str(out), str(same))
    assert found.changed == {"s1": [([512, 0, 188, 512], 10000)]}
    one = np.asarray(ome_zarr.open_level(mask_uri(str(out), "s1")))
    two = np.asarray(ome_zarr.open_level(mask_uri(str(same), "s1")))
    total = sum(
        int(np.asarray(ome_zarr.open_level(mask_uri(str(run_), name))).sum())
        for run_ in (out, same)
        for name in ("s0", "flat")
    )
    dice = (2 * (one & two).sum() + total) / (one.sum() + two.sum() + total)
    assert found.agreement[1]["f1"] == pytest.approx(dice)
    # A damaged mask is named; the others are compared.
    folder = same / "masks/s0.ome.zarr/0/c"
    shard = next(path for path in folder.rglob("*") if path.is_file())
    data = bytearray(shard.read_bytes())
    data[: len(data) // 2] = bytes(len(data) // 2)
    shard.write_bytes(data)
    found = diff(str(out), str(same))
    assert found.compared == 2
    assert "medray verify" in found.not_compared["s0"]


def test_the_commands_say_what_they_found(
    run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = run(tmp_path, PLAIN)
    same, _ = run(tmp_path / "b", PLAIN)
    assert main(["verify", str(out)]) == 0
    assert "3 slides are as they were committed, 0 damaged" in capsys.readouterr().out
    assert main(["diff", str(out), str(same)]) == 0
    assert "3 slides compared, 0 differ" in capsys.readouterr().out
    shard = "masks/s0.ome.zarr/0/c/0/0"
    (out / shard).unlink()
    (out / "masks/s1.ome.zarr/.partial-x").write_bytes(b"x")
    assert main(["gc", str(out)]) == 0
    assert "removed  masks/s1.ome.zarr/.partial-x" in capsys.readouterr().out
    assert main(["verify", str(out), "--json"]) == 3
    told = json.loads(capsys.readouterr().out)
    assert told["failed"] == {"s0": f"{shard}: missing"}
    assert told["noted"]
    assert main(["verify", str(tmp_path)]) == 2


def test_runs_of_other_classes_are_not_compared(run, tmp_path: Path) -> None:
    out, _ = run(tmp_path, PLAIN)
    other, _ = run(tmp_path / "b", PLAIN)
    settings = (other / "run.yaml").read_text()
    (other / "run.yaml").write_text(settings.replace("tumour", "stroma"))
    with pytest.raises(ConfigError, match="stroma"):
        diff(str(out), str(other))
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        verify(str(tmp_path))


def test_a_run_in_use_is_not_verified(run, tmp_path: Path) -> None:
    out, _ = run(tmp_path, PLAIN)
    with locked(str(out), "infer"):
        with pytest.raises(ConfigError, match=r"in use by `medray infer`, process \d+"):
            verify(str(out))
        with pytest.raises(ConfigError, match="in use"):
            collect(str(out))
    assert verify(str(out)).failed == {}
