"""Nights: what is new, what is reported, one at a time; a simulated week."""

import datetime
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from hashlib import blake2b
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from s3 import serving

from medray.apps.nightly.catalog import (
    Found,
    Outcome,
    current,
    note_files,
    note_outcomes,
)
from medray.apps.nightly.drift import SlideValues, run_values, stain_values, watch
from medray.apps.nightly.inbox import Watch, plan_night
from medray.apps.nightly.night import night_of, nightly
from medray.errors import ConfigError
from medray.inference.run import Options
from medray.slides.scanner import scanner_of
from medray.storage import files


def digest(data: bytes) -> str:
    """What slide_digest is for files of at most 64 MiB, from its documentation."""
    return (
        f"blake2b:{blake2b(data + str(len(data)).encode(), digest_size=16).hexdigest()}"
    )


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    folder = tmp_path / "inbox"
    folder.mkdir()
    return folder


def plan(inbox: Path, catalog: dict, night: str = "2026-01-02", **how: Any) -> dict:
    how = {"settle": 0.0} | how
    out = str(inbox.parent / "out")
    return plan_night(
        Watch(inbox=str(inbox), out=out, models=(), **how), catalog, night
    )


def keep(
    catalog: dict, plan: dict, failed: tuple[str, ...] = (), tries: int = 3
) -> None:
    """Note a plan and its outcomes as the night that ends does."""
    note_files(catalog, [Found(**f) for f in plan["files"]], plan["night"])
    outcomes = [
        Outcome(s["digest"], s["slide"], reason="bad" if s["file"] in failed else "")
        for s in plan["slides"]
    ]
    note_outcomes(catalog, outcomes, plan["night"], tries)


# --- what is new ----------------------------------------------------------------------


def test_new_is_by_content_not_by_name(inbox: Path) -> None:
    (inbox / "a.tif").write_bytes(b"one")
    (inbox / "b.tif").write_bytes(b"two")
    (inbox / "notes.txt").write_bytes(b"no slide")
    (inbox / ".hidden.tif").write_bytes(b"no slide either")
    catalog: dict = {}
    first = plan(inbox, catalog)
    todo = {slide["file"]: slide["digest"] for slide in first["slides"]}
    assert todo == {"a.tif": digest(b"one"), "b.tif": digest(b"two")}
    keep(catalog, first)

    (inbox / "week").mkdir()
    (inbox / "week" / "late.tif").write_bytes(b"three")
    (inbox / "week" / "later.tif").write_bytes(b"three")
    (inbox / "copy of a.tif").write_bytes(b"one")
    (inbox / "b.tif").write_bytes(b"two, scanned again")
    os.utime(inbox / "a.tif", (1, 1))  # touched, not changed
    second = plan(inbox, catalog, "2026-01-03")
    todo = {slide["file"]: slide["digest"] for slide in second["slides"]}
    assert todo == {
        "b.tif": digest(b"two, scanned again"),
        "week/late.tif": digest(b"three"),
    }
    assert second["copies"] == [
        {"name": "copy of a.tif", "same_as": "a.tif"},
        {"name": "week/later.tif", "same_as": "week/late.tif"},
    ]
    replaced = {"before": digest(b"two"), "now": digest(b"two, scanned again")}
    assert second["replaced"] == [{"name": "b.tif"} | replaced]
    keep(catalog, second)
    assert catalog[digest(b"two")]["status"] == "done"
    assert catalog[digest(b"two")]["replaced_by"] == digest(b"two, scanned again")
    assert catalog[digest(b"one")]["names"] == ["a.tif", "copy of a.tif"]
    assert catalog[digest(b"one")]["first_seen"] == "2026-01-02"

    before = json.dumps(catalog, sort_keys=True)
    third = plan(inbox, catalog, "2026-01-04")
    assert third["files"] == third["slides"] == third["copies"] == []
    keep(catalog, second)  # a night that is noted twice
    assert json.dumps(catalog, sort_keys=True) == before


def test_a_file_that_was_replaced_and_comes_back(inbox: Path) -> None:
    catalog: dict = {}
    for night, data in enumerate((b"old", b"new!", b"old")):
        (inbox / "a.tif").write_bytes(data)
        os.utime(inbox / "a.tif", (night, night))
        today = plan(inbox, catalog, f"2026-01-0{night + 1}")
        keep(catalog, today)
    assert today["slides"] == []  # it is known
    assert catalog[digest(b"old")]["replaced_by"] == ""
    assert catalog[digest(b"new!")]["replaced_by"] == digest(b"old")
    assert current(catalog)["a.tif"].digest == digest(b"old")


def test_failures_are_tried_again_so_many_nights(inbox: Path) -> None:
    (inbox / "a.tif").write_bytes(b"bad")
    catalog: dict = {}
    statuses = []
    for night in ("2026-01-01", "2026-01-02", "2026-01-03"):
        today = plan(inbox, catalog, night, tries=2)
        keep(catalog, today, failed=("a.tif",), tries=2)
        statuses.append((len(today["slides"]), catalog[digest(b"bad")]["status"]))
        keep(catalog, today, failed=("a.tif",), tries=2)  # the same night again
    assert statuses == [(1, "failed"), (1, "given up"), (0, "given up")]
    more = plan(inbox, catalog, "2026-01-04", tries=3)
    assert more["retried"] == ["a.tif"]
    (inbox / "a.tif").unlink()
    assert plan(inbox, catalog, "2026-01-04", tries=3)["slides"] == []


def test_a_slide_of_which_something_else_is_said_is_new(inbox: Path) -> None:
    for name in ("a", "b", "c"):
        (inbox / f"{name}.tif").write_bytes(name.encode())
    table, catalog = inbox.parent / "mpp.csv", {}
    keep(catalog, plan(inbox, catalog), failed=("a.tif",), tries=1)
    assert catalog[digest(b"a")]["status"] == "given up"
    todo = []
    for night, rows in enumerate(("a,0.5\nb,0.25\n", "a,0.5\nb,0.3\n", ""), 2):
        table.write_text(f"slide,mpp\n{rows}")
        how = {"options": Options(mpp=str(table)), "tries": 1}
        today = plan(inbox, catalog, f"2026-01-0{night}", **how)
        todo.append({s["file"]: s["digest"] for s in today["slides"]})
        assert plan(inbox, catalog, f"2026-01-0{night}", **how) == today
        keep(catalog, today)
    assert todo == [
        {"a.tif": digest(b"a") + "+mpp=0.5", "b.tif": digest(b"b") + "+mpp=0.25"},
        {"b.tif": digest(b"b") + "+mpp=0.3"},
        {},  # what it was without the table is known: given up, or done
    ]


def test_files_that_still_grow_are_left_out(inbox: Path) -> None:
    (inbox / "whole.tif").write_bytes(b"whole")
    (inbox / "lost.tif").symlink_to(inbox / "nowhere")
    stop = threading.Event()

    def grow() -> None:
        with open(inbox / "growing.tif", "wb", buffering=0) as file:
            while not stop.wait(0.02):
                file.write(b"more")

    writer = threading.Thread(target=grow)
    writer.start()
    while not (inbox / "growing.tif").exists():
        time.sleep(0.01)
    today = plan(inbox, {}, settle=0.5)
    stop.set()
    writer.join()
    assert [slide["file"] for slide in today["slides"]] == ["whole.tif"]
    assert sorted(today["left_out"]) == ["growing.tif", "lost.tif"]
    tomorrow = plan(inbox, {})
    assert [s["file"] for s in tomorrow["slides"]] == ["growing.tif", "whole.tif"]


def test_a_name_that_is_no_unicode_costs_only_itself(inbox: Path) -> None:
    (inbox / "a.tif").write_bytes(b"a")
    with open(os.fsencode(inbox) + b"/\xff.tif", "wb") as file:
        file.write(b"b")
    today = plan(inbox, {})
    assert [slide["file"] for slide in today["slides"]] == ["a.tif"]
    assert list(today["left_out"]) == ["\\udcff.tif"]
    json.dumps(today, ensure_ascii=False).encode()


# --- drift ----------------------------------------------------------------------------


def slides_with(
    name: str, values: list[float], scanner: str = "S"
) -> list[SlideValues]:
    return [SlideValues(f"{name}{i}", scanner, {"v": v}) for i, v in enumerate(values)]


def test_drift_is_told_in_medians_and_their_deviations() -> None:
    known = [0.4 + 0.02 * (i % 7) for i in range(30)] + [9.0]  # with an outlier
    center = statistics.median(known)
    spread = 1.4826 * statistics.median(abs(v - center) for v in known)
    near, far = center + 4.9 * spread, center + 5.1 * spread
    before = slides_with("b", known) + slides_with("c", [near] * 30, "another")
    (calm,) = watch(slides_with("t", [near] * 3), before, against="x")
    assert (calm.flagged, calm.outliers) == (False, ())
    assert calm.z == pytest.approx(4.9)
    (one,) = watch(slides_with("t", [near, near, far]), before, against="x")
    assert (one.flagged, one.outliers) == (False, ("t2",))
    (drift,) = watch(slides_with("t", [far] * 3), before, against="x")
    assert (drift.flagged, drift.slides, drift.reference_slides) == (True, 3, 31)
    (below,) = watch(slides_with("t", [-far]), before, against="x")
    assert below.flagged
    assert below.z < 0


def test_drift_needs_a_reference_and_a_change_one_could_see() -> None:
    tonight = slides_with("t", [0.9])
    assert watch(tonight, slides_with("b", [0.5] * 19), against="x") == []
    assert watch(tonight, slides_with("b", [0.5] * 20, "other"), against="x") == []
    assert watch(tonight, slides_with("b", [0.5] * 20), against="x")[0].flagged
    same = slides_with("b", [0.88] * 20)  # no deviation: at least 0.01 is the spread
    assert not watch(tonight, same, against="x")[0].flagged


def test_values_of_a_slide(tmp_path: Path) -> None:
    """Staining is measured on tissue: twice the stain is twice the density."""
    stain = np.array([0.65, 0.70, 0.29])
    stain /= np.linalg.norm(stain)
    found = []
    for amount in (0.5, 1.0):
        rgb = np.full((400, 400, 3), 255, np.uint8)
        rgb[100:300, 100:300] = np.rint(255 * np.exp(-amount * stain))
        tifffile.imwrite(tmp_path / "a.tif", rgb, photometric="rgb")
        found.append(stain_values(str(tmp_path / "a.tif")))
    for values, amount in zip(found, (0.5, 1.0), strict=True):
        # The tissue's edge may be a pixel off: 4 % of its pixels at most are glass.
        assert values["haematoxylin_mean"] == pytest.approx(amount, rel=0.05)
        assert values["eosin_mean"] == pytest.approx(0, abs=0.02)
    tifffile.imwrite(tmp_path / "b.tif", np.full((400, 400, 3), 240, np.uint8))
    assert stain_values(str(tmp_path / "b.tif")) == {}
    row = {"predicted_px": 200, "px_background": 800, "px_tumour": 50}
    assert run_values(row, ("background", "tumour")) == {"share_tumour": 0.25}
    assert run_values(row | {"predicted_px": 0}, ("background", "tumour")) == {}


def test_scanners_are_named_by_their_files(tmp_path: Path) -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)

    def named(name: str, **how: Any) -> str:
        tifffile.imwrite(tmp_path / name, pixels, photometric="rgb", **how)
        return scanner_of(str(tmp_path / name))

    svs = "Aperio Image Library v1\n32x32 |AppMag = 20|ScanScope ID = SS1234|MPP = 0.5"
    assert named("a.svs", description=svs, metadata=None) == "Aperio SS1234"
    tags = [(271, 2, 0, "Acme", True), (272, 2, 0, "Scan 3", True)]
    assert named("b.tif", extratags=tags, metadata=None) == "Acme Scan 3"
    assert named("c.tif") == "unknown"
    (tmp_path / "d.tif").write_bytes(b"II*\0 nothing")
    assert scanner_of(str(tmp_path / "d.tif")) == "unknown"
    assert scanner_of(str(tmp_path / "gone.tif")) == "unknown"


# --- a night without slides: what is reported, one at a time --------------------------


@pytest.fixture
def hook() -> Iterator[tuple[str, list]]:
    """A server that takes what is sent to /take and never answers at /hang."""
    taken: list = []
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/hang":
                ended.wait(30)
            else:
                taken.append((self.headers["Content-Type"], json.loads(body)))
                self.send_response(200 if self.path == "/take" else 500)
                self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", taken
    ended.set()
    server.shutdown()
    server.server_close()


def night(inbox: Path, model: Path, date: str, out: str = "", **more: Any) -> Any:
    more = {"settle": 0.0} | more
    out = out or str(inbox.parent / "out")
    return nightly(str(inbox), model=str(model), out=out, night=date, **more)


def test_a_webhook_gets_the_summary_and_cannot_fail_a_night(
    inbox: Path,
    model: Path,
    hook: tuple[str, list],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    address, taken = hook
    first = night(inbox, model, "2026-01-01", webhook=f"{address}/take")
    summary = json.loads(Path(first.summary).with_suffix(".json").read_text())
    assert taken == [("application/json", summary)]
    night(inbox, model, "2026-01-01", webhook=f"{address}/take")
    assert len(taken) == 1  # committed before: nothing is reported again
    # Only now, for the one that hangs: on a busy machine an answer may take a second.
    monkeypatch.setattr("medray.apps.nightly.summary._WEBHOOK_S", 0.5)
    for day, broken in enumerate(
        (f"{address}/refuse?secret", f"{address}/hang?secret", "http://127.0.0.1:9/")
    ):
        caplog.clear()
        done = night(inbox, model, f"2026-01-1{day}", webhook=broken)
        assert Path(done.summary).exists()
        assert "did not take the summary" in caplog.text
        assert "secret" not in caplog.text
    with pytest.raises(ConfigError, match="http"):
        night(inbox, model, "2026-01-20", webhook="ftp://127.0.0.1/x")


def test_wrong_requests_are_told_before_anything_is_done(
    inbox: Path, model: Path, tmp_path: Path
) -> None:
    for wrong, said in (
        ({"date": "2026-13-01"}, "YYYY-MM-DD"),
        ({"date": "2026-01-01", "truth": str(tmp_path / "none")}, "truth"),
        ({"date": "2026-01-01", "out": str(inbox / "out")}, "inside the inbox"),
        ({"date": "2026-01-01", "tries": 0}, "tries"),
        ({"date": "2026-01-01", "settle": float("nan")}, "settle"),
    ):
        with pytest.raises(ConfigError, match=said):
            night(inbox, model, **wrong)
    with pytest.raises(ConfigError, match="expected a folder, the inbox"):
        night(tmp_path / "no inbox", model, "2026-01-01")
    with pytest.raises(ConfigError, match="model folder"):
        night(inbox, tmp_path, "2026-01-01")
    assert not (tmp_path / "out" / "nights").exists()
    night(inbox, model, "2026-01-05")
    with pytest.raises(ConfigError, match="its last night is 2026-01-05"):
        night(inbox, model, "2026-01-04")


def test_a_second_one_ends_at_once_and_a_dead_one_does_not_block(
    inbox: Path, model: Path
) -> None:
    """The first one looks at its inbox for a minute: it is killed then."""
    (inbox / "a.tif").write_bytes(b"new")
    out = inbox.parent / "out"
    command = [sys.executable, "jobs/nightly.py", "--inbox", str(inbox)]
    command += ["--out", str(out), "--model", str(model), "--settle", "60"]
    first = subprocess.Popen(
        command, cwd=Path(__file__).parents[3], stderr=subprocess.PIPE
    )
    while not (out / "lock.json").exists() or not (out / "lock.json").read_text():
        assert first.poll() is None
        time.sleep(0.1)
    with pytest.raises(ConfigError, match=f"in use by `medray nightly`, .*{first.pid}"):
        night(inbox, model, "2026-01-01")
    first.kill()
    first.communicate()
    (inbox / "a.tif").unlink()
    assert night(inbox, model, "2026-01-01").done == 0


def test_nights_in_a_bucket(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as (_, environment):
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        out = f"s3://bucket/{tmp_path.name}"
        for before in (False, True):  # nothing has arrived yet
            done = nightly(
                "s3://bucket/inbox", model=str(model), out=out, night="2026-01-01"
            )
            assert done.summary == f"{out}/nights/2026-01-01/summary.html"
            assert done.committed_before == before
        files.write_bytes("s3://bucket/inbox/a.tif", b"new")
        watched = Watch(inbox="s3://bucket/inbox", out=out, models=(), settle=0)
        (slide,) = plan_night(watched, {}, "2026-01-02")["slides"]
        assert slide["file"] == "a.tif"
        assert slide["digest"] == digest(b"new")


@pytest.mark.parametrize(
    ("moment", "night"),
    [
        ("2026-11-30T22:00:00+00:00", "2026-11-30"),
        ("2026-12-01T00:30:00+00:00", "2026-11-30"),  # taken up again after midnight
        ("2026-12-01T09:00:00+00:00", "2026-11-30"),
        ("2026-12-01T12:00:00+00:00", "2026-12-01"),
        ("2026-11-30T22:00:00-06:00", "2026-11-30"),  # evenings elsewhere
        ("2026-11-30T22:00:00+09:00", "2026-11-30"),
        ("2027-01-01T03:00:00+01:00", "2026-12-31"),
    ],
)
def test_a_night_has_the_date_of_its_evening(moment: str, night: str) -> None:
    assert night_of(datetime.datetime.fromisoformat(moment)) == night
