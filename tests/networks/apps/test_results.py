"""What commands return prints itself, and is documented as `--json` prints it."""

import dataclasses

import json_keys
import pytest

from medray import cli
from medray.apps.commands.request import Request
from medray.apps.doctor.findings import Diagnosis, Finding
from medray.errors import ConfigError, StoppedError
from medray.evaluation.compare_runs import Comparison
from medray.execution.commit import Summary
from medray.inference.estimate_run import Estimate


def test_the_page_has_the_keys_of_every_result() -> None:
    page = json_keys.PAGE.read_text()
    written = page.partition(json_keys.START)[2].strip()
    assert written == json_keys.render().strip(), "run `python tests/json_keys.py`"


def test_every_result_prints_itself() -> None:
    for kind in json_keys.results():
        assert "__str__" in vars(kind), kind


def run(monkeypatch: pytest.MonkeyPatch, result: object, *words: str) -> int:
    """Run a command that returns this, or raises it."""

    def give(*_: object) -> object:
        if isinstance(result, BaseException):
            raise result
        return result

    monkeypatch.setattr(Request, "run", give)
    return cli.main(["infer", "s", "--model", "m", "--out", "r", *words])


def test_the_last_line_sums_up_and_failures_decide_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = Summary("runs/a", 3, 1, {}, 12, 1.5)
    assert run(monkeypatch, done) == 0
    assert capsys.readouterr().out.splitlines() == [
        "out     runs/a",
        "infer: 3 slides done, 1 done before, 0 failed, 1.5 s",
    ]
    some = dataclasses.replace(done, failed={"b": "damaged"})
    assert run(monkeypatch, some) == 3
    assert run(monkeypatch, some, "--partial-ok") == 0
    assert (
        run(monkeypatch, Diagnosis([Finding("ray", "FAIL", "none", "start it")])) == 1
    )
    printed = capsys.readouterr().out.splitlines()
    assert printed[-3:] == [
        "FAIL  ray: none",
        "      start it",
        "infer: 1 checks, 1 failed, 0 warnings",
    ]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("no"), 2),
        (StoppedError(15, "kept"), 143),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_have_their_codes(
    error: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, error) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("medray infer: ")


def test_what_is_not_known_is_not_printed() -> None:
    estimate = Estimate(
        out="",
        slides=4,
        sampled=4,
        regions=8,
        windows=100,
        gpu_workers=2,
        window_s=0.002,
        seconds=(1.0, 3.0),
        output_bytes=2**30,
        host_bytes=2**31,
        device_bytes=0,
        store_bytes=2**30,
        copied_bytes=0,
        cache_bytes=0,
        budget_bytes=2**32,
        cost=None,
        failed={"x": "no"},
    )
    lines = str(estimate).splitlines()
    assert [line.split()[0] for line in lines] == [
        "work", "time", "memory", "output", "failed", "4",
    ]  # fmt: skip
    priced = dataclasses.replace(estimate, cost=(2.0, 4.0), device_bytes=2**30)
    assert "cost     2.00 to 4.00, 0.5000 to 1.0000 a slide" in str(priced)
    assert "device   1.0 GiB" in str(priced)
    unscored = Comparison(
        "o", "o/c.html", 4, 4, 0, None, None, None, None, None, [], [], {}
    )
    assert "F1" not in str(unscored)
    assert "4 slides compared, 4 differ, 0 have a truth" in str(unscored)
