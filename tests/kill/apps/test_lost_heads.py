"""A night whose head is lost: its pod's processes end, and KubeRay starts another."""

import json
import subprocess
import time
from pathlib import Path

import pytest
import serial
from heads import BIN, head_node, jobs_of

from medray.datasets.synthetic import write_slide
from medray.datasets.synthetic_scene import draw_scene
from medray.inference.run import read_run
from medray.models.predict import Predictor

pytestmark = pytest.mark.timeout(900)


def test_the_night_goes_on_where_it_was(slow_model: Path, tmp_path: Path) -> None:
    """Everything in the head's pod is killed; another comes, as KubeRay starts one."""
    inbox, out = tmp_path / "inbox", tmp_path / "nights"
    for seed in range(6):
        scene = draw_scene(seed, height=1100, width=1400)
        write_slide(inbox, f"s{seed}", scene, layout="pyramid")
    words = ["--job", "night", "--stage", "nightly", "--"]
    words += ["python", "jobs/nightly.py", "--inbox", str(inbox), "--model"]
    words += [str(slow_model), "--out", str(out), "--settle", "0", "--region", "512"]
    words += ["--everywhere", "--precision", "float32"]
    command = [str(BIN / "medray"), "submit", "--json", *words]

    def committed() -> int:
        journals = out.glob("nights/*/run/journal/*.jsonl")
        return sum(path.read_text().count("\n") for path in journals)

    with head_node() as first:
        following = subprocess.Popen(
            command, env=first.environment, stdout=subprocess.PIPE, text=True
        )
        with following:
            try:
                deadline = time.monotonic() + 240
                while committed() < 5:
                    assert following.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
                first.kill()
                assert not list(out.glob("nights/*/summary.json"))
                before = committed()
                with head_node() as second:
                    answer, _ = following.communicate(timeout=400)
                    (job,) = jobs_of(second.environment)
            finally:
                following.kill()
    assert following.returncode == 0
    result = json.loads(answer)
    assert (result["status"], result["lost"], result["job"]) == (
        "SUCCEEDED",
        1,
        "night",
    )
    assert job["metadata"] == {"stage": "nightly"}
    (night,) = out.glob("nights/*")
    summary = json.loads((night / "summary.json").read_text())
    assert [one["status"] for one in summary["slides"]] == ["done"] * 6
    assert before >= 5

    # As if no head had been lost: a plain loop in this process.
    options = read_run(str(night / "run")).options
    predictor = Predictor.from_folders([str(slow_model)], options.prediction)
    serial.infer(inbox, predictor, slow_model, tmp_path / "alone", options)

    def masks(run: Path) -> dict[str, bytes]:
        files = (path for path in run.glob("masks/**/*") if path.is_file())
        return {str(path.relative_to(run)): path.read_bytes() for path in files}

    assert masks(night / "run") == masks(tmp_path / "alone")
