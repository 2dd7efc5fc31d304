"""`medray plan` compared with what a run then takes."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.peak_memory import MARK, run_watched
from medray.datasets.synthetic import write_slide
from medray.datasets.synthetic_scene import draw_scene
from medray.errors import ConfigError
from medray.execution import cluster
from medray.execution.memory import check_budget
from medray.inference.estimate_run import estimate
from medray.inference.infer_run import settings_of
from medray.inference.memory import bounds
from medray.inference.run import Options, against_plan
from medray.models.config import Prediction
from medray.storage.files import read_table
from medray.types import Executor

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.mark.parametrize("executor", ["ray", "processes", "local"])
def test_a_plan_says_what_the_run_takes(
    executor: Executor, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slides = tmp_path / "slides"
    for seed in range(3):
        scene = draw_scene(seed, height=1100, width=1400)
        write_slide(slides, f"s{seed}", scene, layout="pyramid")
    (slides / "bad.tif").write_text("no slide")
    options = Options(prediction=Prediction(probabilities=True), region=512)
    run = str(tmp_path / "run")
    plan = estimate(
        [str(slides)],
        model=str(model),
        options=options,
        price=2.0,
        out=run,
        executor=executor,
    )
    assert (plan.slides, plan.sampled) == (4, 4)
    assert set(plan.failed) == {"bad"}
    assert plan.cost is not None
    assert 0 < plan.cost[0] < plan.cost[1]

    (slides / "bad.tif").unlink()
    # With a Ray of its own: that of the tests keeps what they have started.
    monkeypatch.setenv(MARK, "plan")
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")  # as a user's
    command = [sys.executable, "-m", "medray.cli", "infer", str(slides), "--json"]
    command += ["--model", str(model), "--out", run, "--executor", executor]
    command += ["--region", "512", "--probabilities"]
    summary, peak = run_watched(command)
    assert (summary["done"], summary["failed"]) == (3, {})
    rows = [r for r in read_table(f"{run}/slides.parquet").to_pylist() if r["regions"]]
    assert sum(row["windows"] for row in rows) == plan.windows
    assert sum(row["regions"] for row in rows) == plan.regions
    written = sum(p.stat().st_size for p in Path(run).rglob("*") if p.is_file())
    assert written <= plan.output_bytes + (1 << 20)
    assert 500 << 20 < peak.bytes <= plan.host_bytes
    print(f"most {peak.mib} MiB, bound {plan.host_bytes >> 20} MiB")
    words = against_plan(run, rows)
    assert words["windows"] == f"{plan.windows}, planned {plan.windows}"
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["slides"] == 4


def test_a_sample_stands_for_the_rest(model: Path, tmp_path: Path) -> None:
    for seed in range(6):
        write_slide(tmp_path, f"s{seed}", draw_scene(seed, height=300, width=300))
    plan = estimate([str(tmp_path)], model=str(model), sample=3)
    assert (plan.slides, plan.sampled) == (6, 3)
    assert plan.regions == 6


def test_too_little_memory_is_refused_with_advice(model: Path) -> None:
    cluster.connect()
    settings = settings_of([str(model)], Options(region=16384))
    host, store = bounds(settings, 1 << 30)
    assert host > store > 16384**2
    with pytest.raises(ConfigError, match="smaller --region"):
        check_budget(host, host - 1)
