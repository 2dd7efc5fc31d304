"""What medray 0.1 wrote, under the names of then, is read with those of today."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from medray.apps.nightly.catalog import Found, read_catalog, read_found
from medray.classes import Classes
from medray.datasets.images import Contours, ImageFile, MissingContours
from medray.datasets.images_request import _asked_of
from medray.errors import ConfigError
from medray.geometry import Windows
from medray.inference.run import Options, RunSettings
from medray.mil.config import SlideRecipe
from medray.models.config import ModelConfig, read_config
from medray.storage import files
from medray.storage.ledger import Ledger
from medray.storage.typed_settings import from_dict
from medray.storage.yaml_config import keep_settings, read_settings, to_dict


def settings(**options: Any) -> RunSettings:
    return RunSettings(
        models=("/model",),
        model_digest="d",
        classes=Classes(("glass", "tumour")),
        windows=Windows(512, 256),
        model_mpp=0.5,
        options=Options(**options),
    )


def test_settings_of_a_run(tmp_path: Path) -> None:
    old = to_dict(settings(timeout=77.0))
    old["options"]["patience"] = old["options"].pop("timeout")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(old))
    assert from_dict(RunSettings, old, "run.yaml") == settings(timeout=77.0)
    keep_settings(str(tmp_path / "run.yaml"), settings())  # the same masks
    with pytest.raises(ConfigError, match="other settings.*coarse"):
        keep_settings(str(tmp_path / "run.yaml"), settings(coarse=2))


def test_an_unknown_key_is_still_refused() -> None:
    wrong = to_dict(settings()) | {"patience": 3}
    with pytest.raises(ConfigError, match="unknown key patience"):
        from_dict(RunSettings, wrong, "run.yaml")


def test_the_names_of_old_ones_are_no_key() -> None:
    wrong = to_dict(settings()) | {"options": {"RENAMED": {"a": "b"}}}
    message = (
        r"unknown key options.RENAMED; remove it \(known here: prediction, .*out\)"
    )
    with pytest.raises(ConfigError, match=message):
        from_dict(RunSettings, wrong, "run.yaml")


def test_an_old_name_beside_the_new_one() -> None:
    both = to_dict(settings(timeout=77.0))
    both["options"]["patience"] = 77
    assert from_dict(RunSettings, both, "run.yaml") == settings(timeout=77.0)
    both["options"]["patience"] = 78
    message = "run.yaml: options.patience is called options.timeout now.* 78 and 77.0"
    with pytest.raises(ConfigError, match=message):
        from_dict(RunSettings, both, "run.yaml")


@pytest.mark.parametrize("written", ["patience", "timeout"])
@pytest.mark.parametrize("override", ["patience", "timeout"])
def test_an_override_has_the_last_word(
    written: str, override: str, tmp_path: Path
) -> None:
    values = to_dict(settings())
    values["options"][written] = values["options"].pop("timeout")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    found = read_settings(
        RunSettings, str(tmp_path / "run.yaml"), [f"options.{override}=7"]
    )
    assert found == settings(timeout=7.0)


def test_the_table_of_a_run_or_dataset(tmp_path: Path) -> None:
    row = {"slide": "s1", "digest": "d", "status": "done", "stamp": "12 3.5"}
    files.write_table(str(tmp_path / "slides.parquet"), pa.Table.from_pylist([row]))
    (found,) = Ledger(str(tmp_path)).slides.values()
    assert found["fingerprint"] == "12 3.5"
    assert "stamp" not in found


def test_the_catalog_of_an_inbox(tmp_path: Path) -> None:
    row = {"digest": "d", "names": ["a.tif"], "stamps": ["12 3.5"]}
    files.write_table(str(tmp_path / "catalog.parquet"), pa.Table.from_pylist([row]))
    assert read_catalog(str(tmp_path))["d"]["fingerprints"] == ["12 3.5"]


def test_the_request_for_a_dataset_of_images() -> None:
    """As medray 0.1 wrote it down: what it made of the same images is not made again."""
    image = ImageFile(
        image="sick/1.png",
        uri="/in/sick/1.png",
        class_name="sick",
        split="",
        fingerprint="12 3.5",
        patient="P1",
    )
    contours = Contours("/in/1_nuc.dat", "/in/1_cyt.dat", ("cyt", "nuc"))
    start = '{"image": "sick/1.png", "uri": "/in/sick/1.png", "class": "sick", '
    start += '"split": "", "stamp": "12 3.5", '
    pair = '"cytoplasm": "/in/1_cyt.dat", "nucleus": "/in/1_nuc.dat", '
    pair += '"contour_stamps": ["cyt", "nuc"], '
    end = '"patient": "P1"}'
    for file, mpp, wanted in (
        (image, None, ""),
        (replace(image, contours=contours), None, f'{pair}"mpp": null, '),
        (
            replace(image, contours=contours, cut=True),
            0.25,
            f'"cut": true, {pair}"mpp": 0.25, ',
        ),
        (
            replace(image, contours=MissingContours("none"), cut=True),
            None,
            '"cut": true, "trouble": "none", "mpp": null, ',
        ),
    ):
        assert json.dumps(_asked_of(file, mpp)) == start + wanted + end


def test_a_model_and_its_digest(tmp_path: Path) -> None:
    values = {
        "architecture": {"name": "unet", "encoder": "resnet18"},
        "classes": {"names": ["glass", "tumour"]},
        "window": {"size": 512, "stride": 256},
        "mpp": 0.5,
        "made_from": {"digest": "blake2b:1"},
    }
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(values))
    assert read_config(str(tmp_path)).provenance == {"digest": "blake2b:1"}


def test_a_night_that_is_yet_to_be_finished() -> None:
    file = {"name": "a.tif", "stamp": "12 3.5", "digest": "d"}
    assert read_found(file) == Found("a.tif", "12 3.5", "d")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("zscore", 1, "model.yaml: zscore: expected true or false, found 1"),
        ("mean", [1, 2], r"mean: expected a list of 3 items, found \[1, 2\]"),
        ("mpp", True, "mpp: expected a number, found True"),
    ],
)
def test_a_wrong_value_of_a_model_is_explained(
    key: str, value: Any, message: str
) -> None:
    values = {
        "architecture": {"name": "unet"},
        "classes": {"names": ["glass", "tumour"]},
        "window": {"size": 512, "stride": 256},
        "mpp": 0.5,
    }
    with pytest.raises(ConfigError, match=message):
        from_dict(ModelConfig, values | {key: value}, "model.yaml")


def test_fractions_of_a_slide_recipe() -> None:
    message = r"r.yaml: fractions: expected a list of 3 items, found \[0.7, 0.3\]"
    with pytest.raises(ConfigError, match=message):
        from_dict(SlideRecipe, {"fractions": [0.7, 0.3]}, "r.yaml")


@pytest.mark.parametrize(
    ("written", "read"), [("0.5", 0.5), (1, 1.0), ("a.csv", "a.csv"), (None, None)]
)
def test_mpp_is_a_number_or_a_file(written: Any, read: Any) -> None:
    found = from_dict(Options, {"mpp": written}, "run.yaml").mpp
    assert (found, type(found)) == (read, type(read))
