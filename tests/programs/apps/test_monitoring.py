"""k8s/components/monitoring: Prometheus's own tool reads the rules and tries them."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from manifests import ROOT

FOLDER = ROOT / "k8s" / "components" / "monitoring"
NIGHT = '{namespace="medray", cronjob="nightly"}'
STARTED = f"kube_cronjob_status_last_schedule_time{NIGHT}"
SUCCEEDED = f"kube_cronjob_status_last_successful_time{NIGHT}"
FAILED, DONE = "ray_medray_slides_failed_total", "ray_medray_slides_done_total"
GPU = 'ray_node_gpus_utilization{pod="p", ray_io_group="gpu-spot", GpuIndex="0"}'


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not on this machine")
    return found


def run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rules as Prometheus's operator hands them to Prometheus."""
    spec = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["spec"]
    path = tmp_path_factory.mktemp("rules") / "rules.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def test_the_rules_are_prometheus_rules(promtool: str, rules: Path) -> None:
    assert "3 rules found" in run(promtool, "check", "rules", "--lint=all", str(rules))
    spec = yaml.safe_load(rules.read_text())
    for rule in spec["groups"][0]["rules"]:
        assert set(rule["annotations"]) == {"summary", "description"}
        for page in re.findall(r"docs/\w+\.md", rule["annotations"]["description"]):
            assert (ROOT / page).is_file()


def series(name: str, values: str) -> dict[str, str]:
    return {"series": name, "values": values}


CASES: dict[str, tuple[str, str, bool, list[dict[str, str]]]] = {
    # name: alert, when, whether it fires, what was scraped each minute
    "a night that succeeded": (
        "MedrayNightLate",
        *("10h", False),
        [series(STARTED, "0+0x2000"), series(SUCCEEDED, "_x60 3600+0x2000")],
    ),
    "a night that is under way": (
        "MedrayNightLate",
        *("7h", False),
        [series(STARTED, "0+0x2000"), series(SUCCEEDED, "-80000+0x2000")],
    ),
    "a night that does not end": (
        "MedrayNightLate",
        *("9h", True),
        [series(STARTED, "0+0x2000"), series(SUCCEEDED, "-80000+0x2000")],
    ),
    "the first night does not end": (
        "MedrayNightLate",
        *("9h", True),
        [series(STARTED, "0+0x2000")],
    ),
    "no night was started today": (
        "MedrayNightLate",
        *("26h", True),
        [series(STARTED, "0+0x2000"), series(SUCCEEDED, "3600+0x2000")],
    ),
    "many slides failed": (
        "MedrayQuarantineAboveLimit",
        *("2h", True),
        [series(FAILED, "0+0x9 1+1x9 10+0x200"), series(DONE, "0+0x9 9+9x9 90+0x200")],
    ),
    # Ray's agent on the head keeps counters of processes that have ended.
    "many failed two days ago": (
        "MedrayQuarantineAboveLimit",
        *("50h", False),
        [
            series(FAILED, "0+0x9 1+1x9 10+0x4000"),
            series(DONE, "0+0x9 9+9x9 90+0x4000"),
        ],
    ),
    "all failed after a month of good nights": (
        "MedrayQuarantineAboveLimit",
        *("2h", True),
        [series(FAILED, "3+0x9 4+1x59 63+0x200"), series(DONE, "30000+0x300")],
    ),
    "one of few failed": (
        "MedrayQuarantineAboveLimit",
        *("2h", False),
        [series(FAILED, "0+0x9 1+0x200"), series(DONE, "0+0x9 4+0x200")],
    ),
    "few of many failed": (
        "MedrayQuarantineAboveLimit",
        *("2h", False),
        [series(FAILED, "0+0x9 6+0x200"), series(DONE, "0+0x9 900+0x200")],
    ),
    "a GPU that is idle": ("MedrayGpuIdle", "20m", True, [series(GPU, "0+0x60")]),
    "a GPU that was just idle": (
        *("MedrayGpuIdle", "20m", False),
        [series(GPU, "90+0x10 0+0x60")],
    ),
    "a GPU that Ray cannot read, and that works": (
        *("MedrayGpuIdle", "20m", False),
        [series(GPU, "0+0x60"), series('ray_medray_regions_total{pod="p"}', "0+9x60")],
    ),
    "a GPU that works": ("MedrayGpuIdle", "20m", False, [series(GPU, "70+0x60")]),
}


@pytest.mark.parametrize("case", CASES)
def test_an_alert_comes_when_it_should(
    case: str, promtool: str, rules: Path, tmp_path: Path
) -> None:
    alert, when, fires, inputs = CASES[case]
    test: dict[str, Any] = {
        "interval": "1m",
        "input_series": inputs,
        "promql_expr_test": [
            {
                "expr": f'count(ALERTS{{alertname="{alert}", alertstate="firing"}})',
                "eval_time": when,
                "exp_samples": [{"labels": "{}", "value": 1}] if fires else [],
            }
        ],
    }
    path = tmp_path / "test.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "rule_files": [str(rules)],
                "evaluation_interval": "1m",
                "tests": [test],
            }
        )
    )
    assert "SUCCESS" in run(promtool, "test", "rules", str(path))


def test_the_boards_questions_are_prometheus_questions(
    promtool: str, tmp_path: Path
) -> None:
    board = json.loads((FOLDER / "dashboard.json").read_text())
    known = {one["name"] for one in board["templating"]["list"]}
    asked = []
    for panel in board["panels"]:
        for target in panel["targets"]:
            named = set(re.findall(r"\$(\w+)", target["expr"]))
            assert named <= known | {"__range"}, panel["title"]
            expr = target["expr"].replace("$__range", "24h")
            asked.append({"record": "x", "expr": re.sub(r"\$\w+", "1.5", expr)})
    groups = [{"name": f"g{i}", "rules": [one]} for i, one in enumerate(asked)]
    path = tmp_path / "asked.yaml"
    path.write_text(yaml.safe_dump({"groups": groups}))
    # One rule is as good as another here: all are called x.
    said = run(promtool, "check", "rules", "--lint=none", str(path))
    assert f"{len(asked)} rules found" in said


def test_the_cost_is_hours_times_prices(promtool: str, tmp_path: Path) -> None:
    """Two hours of one spot machine at 0.30, and of the head at 0.10."""
    board = json.loads((FOLDER / "dashboard.json").read_text())
    (panel,) = (one for one in board["panels"] if one["title"] == "Cost so far")
    expr = panel["targets"][0]["expr"].replace("$__range", "24h")
    for one in board["templating"]["list"]:
        expr = expr.replace(f"${one['name']}", one["query"])
    test = {
        "interval": "1m",
        "input_series": [
            series('ray_node_mem_total{ray_io_group="gpu-spot", pod="a"}', "9+0x119"),
            series('ray_node_mem_total{ray_io_group="headgroup", pod="h"}', "9+0x119"),
        ],
        "promql_expr_test": [
            {
                "expr": f"round({expr}, 0.01)",
                "eval_time": "119m",
                "exp_samples": [{"labels": "{}", "value": 0.8}],
            }
        ],
    }
    path = tmp_path / "test.yaml"
    path.write_text(yaml.safe_dump({"evaluation_interval": "1m", "tests": [test]}))
    assert "SUCCESS" in run(promtool, "test", "rules", str(path))


def test_actors_that_the_board_counts_are_classes_of_medray() -> None:
    names = re.findall(r'Name=~\\"(\w+)', (FOLDER / "dashboard.json").read_text())
    sources = [path.read_text() for path in (ROOT / "medray").rglob("*.py")]
    assert names
    for name in names:
        assert any(f"class {name}" in source for source in sources), name
