"""A run over DICOM, MRXS and VMS: a row and a mask each, from a disk and a bucket."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import s3
import serial
from dicoms import Scan, write_series
from read_copies import upload
from several_files import write_mrxs, write_vms

from medray.datasets.synthetic_scene import draw_scene
from medray.inference.run import Options
from medray.inference.verify_run import verify
from medray.models.config import Prediction
from medray.models.predict import Predictor
from medray.slides import cache
from medray.storage import files

pytest.importorskip("openslide")

OPTIONS = Options(region=512, prediction=Prediction(precision="float32"))


def masks(run: str) -> dict[str, bytes]:
    return {
        name: files.read_bytes(files.join(run, name))
        for name in files.list_files(run)
        if name.startswith("masks/")
    }


def test_a_run_over_slides_of_several_files(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = draw_scene(1, height=768, width=768).pixels
    source = tmp_path / "slides"
    write_series(source / "case1", pixels, Scan("j2k", parts=2, levels=2))
    write_mrxs(source / "m.mrxs", pixels)
    write_vms(source / "v.vms", pixels)
    write_mrxs(source / "broken.mrxs", pixels)
    (source / "broken" / "Data0002.dat").unlink()
    predictor = Predictor.from_folders([str(model)], OPTIONS.prediction)
    run = f"{tmp_path}/run"
    first = serial.infer(source, predictor, model, Path(run), OPTIONS)
    assert (first.done, list(first.failed)) == (3, ["broken"])
    assert "Data0002.dat is missing" in first.failed["broken"]
    rows = files.read_table(f"{run}/slides.parquet").to_pylist()
    slides = {row["slide"]: row for row in rows}
    assert slides["case1"]["uri"] == f"{source}/case1"
    assert verify(run).failed == {}

    # Complete now; another is changed, in one of its files, the others are not.
    shutil.copy(source / "m" / "Data0002.dat", source / "broken")
    other = source / "m" / "Data0001.dat"
    data = bytearray(other.read_bytes())
    data[5] ^= 1  # of its header, which no reader looks at
    other.write_bytes(data)
    second = serial.infer(source, predictor, model, Path(run), OPTIONS)
    assert (second.done, second.failed) == (2, {})

    with s3.serving() as (_, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path / "cache"))
        upload(source, "s3://bucket/slides")
        there = "s3://bucket/run"
        third = serial.infer("s3://bucket/slides", predictor, model, there, OPTIONS)
        assert (third.done, third.failed) == (4, {})
        ours, theirs = masks(run), masks(there)
        assert ours == theirs
        assert np.unique([len(value) for value in ours.values()]).size > 1
        assert len(list((tmp_path / "cache").glob("*[0-9]"))) == 4
