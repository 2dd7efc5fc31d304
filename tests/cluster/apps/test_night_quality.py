"""A night with slide quality control: what is quarantined, flagged, and tried again."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import tifffile

from medray.apps.nightly.night import Night, nightly
from medray.datasets.synthetic_faults import blur, draw_pen
from medray.datasets.synthetic_scene import draw_scene


def write(path: Path, pixels: Any) -> None:
    tifffile.imwrite(
        path,
        pixels,
        photometric="rgb",
        tile=(256, 256),
        resolution=(2e4, 2e4),
        resolutionunit="CENTIMETER",
        metadata=None,
    )


def test_a_poor_slide_is_not_predicted_and_another_is_flagged(
    cluster: None, model: Path, tmp_path: Path
) -> None:
    inbox, out, limits = (tmp_path / name for name in ("inbox", "out", "qc.yaml"))
    inbox.mkdir()
    limits.write_text("focus: {quarantine: 0.35}\n")
    clean = draw_scene(11, height=1024, width=1024, artefacts=False).pixels
    rng = np.random.default_rng(1)
    write(inbox / "clean.tif", clean)
    write(inbox / "blurred.tif", blur(clean, rng, 3, 1))
    write(inbox / "inked.tif", draw_pen(clean, rng, "blue"))
    (inbox / "broken.tif").write_bytes(b"II*\0 nothing")

    def night(day: int, qc: str | None = str(limits)) -> Night:
        return nightly(
            str(inbox),
            model=str(model),
            out=str(out),
            night=f"2026-04-{day:02d}",
            settle=0,
            qc=qc,
        )

    def catalog() -> dict[str, dict]:
        rows = pq.read_table(out / "catalog.parquet").to_pylist()
        return {row["names"][0]: row for row in rows if row["names"]}

    first = night(1)
    folder = out / "nights" / "2026-04-01"
    assert first.done == 2
    assert [*first.quarantined] == ["blurred.tif"]
    assert first.quarantined["blurred.tif"].startswith("slide quality: focus 0.1")
    assert first.quarantined["blurred.tif"].endswith("is below 0.35")
    assert first.poor["inked.tif"].startswith("pen_share")
    assert "clean.tif" not in first.poor
    assert [*first.handed_on] == ["broken.tif"]  # the run says why
    run = pq.read_table(folder / "run/slides.parquet")["slide"].to_pylist()
    assert sorted(run) == ["broken", "clean", "inked"]
    assert "1 quarantined" in str(first)
    page = (folder / "summary.html").read_text()
    assert first.quarantined["blurred.tif"] in page
    assert first.poor["inked.tif"] in page
    summary = json.loads((folder / "summary.json").read_text())
    said = {slide["file"]: slide for slide in summary["slides"]}
    assert said["blurred.tif"]["status"] == "quarantined"
    assert said["blurred.tif"]["values"]["qc_focus"] < 0.35
    assert said["inked.tif"]["flagged"] == first.poor["inked.tif"]
    rows = catalog()
    assert rows["blurred.tif"]["status"] == "quarantined"
    assert rows["blurred.tif"]["tried"] == []
    assert rows["inked.tif"]["qc_pen_share"] > 0.01

    # The night is killed after its catalog and taken up again without limits: the
    # verdicts are those that it began with.
    before = {
        name: (folder / name).read_bytes()
        for name in ("quality.parquet", "summary.html", "../../catalog.parquet")
    }
    (folder / "summary.json").unlink()
    again = night(1, qc=None)
    assert (again.quarantined, again.poor) == (first.quarantined, first.poor)
    for name in ("quality.parquet", "../../catalog.parquet"):
        assert (folder / name).read_bytes() == before[name]

    # It is not tried again every night, but once a limit lets it pass.
    (inbox / "broken.tif").unlink()
    second = night(2)
    assert (second.done, second.quarantined, second.handed_on) == (0, {}, {})
    limits.write_text("focus: {quarantine: 0.01}\n")
    third = night(3)
    assert third.done == 1
    assert third.poor["blurred.tif"].startswith("focus")
    assert catalog()["blurred.tif"]["status"] == "done"
    assert catalog()["blurred.tif"]["tried"] == ["2026-04-03"]

    # A night all of whose slides are quarantined makes no run.
    limits.write_text("focus: {quarantine: 0.35}\n")
    shutil.rmtree(inbox)
    inbox.mkdir()
    write(inbox / "blurred.tif", blur(clean, rng, 2.5, 1))
    last = night(4)
    assert [*last.quarantined] == ["blurred.tif"]
    assert not (out / "nights/2026-04-04/run").exists()
