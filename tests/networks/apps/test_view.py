"""The viewer: what its tiles hold, whom it answers, and how it looks in a browser."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.testclient import TestClient

from medray import open_mask
from medray.apps.viewer.layers import differences, outlines
from medray.apps.viewer.run import open_viewed
from medray.apps.viewer.server import Viewing, build_app, view
from medray.apps.viewer.tiles import last_zoom, slide_tile
from medray.classes import Classes
from medray.cli import main
from medray.errors import ConfigError, StoppedError
from medray.evaluation.ground_truth import read_truth
from medray.evaluation.html import INK
from medray.evaluation.overlay import AGREEMENT
from medray.geometry import Rectangle
from medray.inference.run import layer_uri
from medray.slides.image import ArraySlide

HERE = {"base_url": "http://127.0.0.1:8000"}


@pytest.fixture(scope="module")
def viewed(model: Path, slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with slides (one of them no slide), their truth, a run and a report."""
    from medray.evaluation.evaluate_run import evaluate
    from medray.inference.infer_run import infer
    from medray.inference.run import Options
    from medray.models.config import Prediction

    folder = tmp_path_factory.mktemp("viewed")
    shutil.copytree(slides / "slides", folder / "slides")
    shutil.copytree(slides / "annotations", folder / "annotations")
    (folder / "slides" / "broken.tif").write_bytes(b"II*\0nothing")
    options = Options(prediction=Prediction(probabilities=True, quality=True))
    run = str(folder / "run")
    infer(
        [str(folder / "slides")],
        model=str(model),
        out=run,
        options=options,
        executor="local",
    )
    evaluate(
        run,
        truth=str(folder / "annotations"),
        out=str(folder / "report"),
        executor="local",
    )
    return folder


@pytest.fixture
def copied(viewed: Path, tmp_path: Path) -> Path:
    """Another such folder, to be damaged; its run tells of the first one's slides."""
    shutil.copytree(viewed, tmp_path / "copy", copy_function=shutil.copy2)
    return tmp_path / "copy"


def client(folder: Path, token: str = "", **choices: Any) -> TestClient:
    wanted = {"report": None, "truth": None, "slides": None} | choices
    run = open_viewed(str(folder / "run"), **wanted)
    return TestClient(build_app(run, token=token), **HERE)


@pytest.fixture(scope="module")
def browser_of(viewed: Path) -> TestClient:
    return client(viewed)


@pytest.fixture(scope="module")
def one(viewed: Path) -> dict[str, Any]:
    """A slide with tumour: its row, pixels, mask and truth, read plainly."""
    rows = pq.read_table(viewed / "run" / "slides.parquet").to_pylist()
    places = {path.stem: path for path in (viewed / "annotations").iterdir()}
    for row in rows:
        if row["status"] != "done" or row["slide"] not in places:
            continue
        whole = Rectangle(0, 0, row["height"], row["width"])
        at = {"truth": str(places[row["slide"]]), "kind": "annotation"}
        truth = read_truth(row | at, whole, Classes())
        if truth.any():
            store = viewed / "run" / "masks" / f"{row['slide']}.ome.zarr"
            mask = zarr.open_array(store / "0", mode="r")[:]
            pixels = tifffile.imread(row["uri"])
            return row | {"pixels": pixels, "mask": mask, "true": truth}
    raise AssertionError("no slide has tumour")


def picture(answer: Any) -> Image.Image:
    assert answer.status_code == 200, answer.text
    return Image.open(io.BytesIO(answer.content))


def tile(of: TestClient, layer: str, slide: str, place: str, more: str = "") -> Any:
    return of.get(f"/tile/{layer}/{place}?slide={slide}{more}")


def part(array: Any, y: int, x: int) -> Any:
    """Tile (y, x) of an array, filled up with zeros."""
    found = np.zeros((256, 256, *array.shape[2:]), array.dtype)
    cut = array[256 * y : 256 * (y + 1), 256 * x : 256 * (x + 1)]
    found[: cut.shape[0], : cut.shape[1]] = cut
    return found


# --- pixels ---------------------------------------------------------------------------


def test_tiles_of_a_slide_hold_its_pixels(
    browser_of: TestClient, one: dict[str, Any]
) -> None:
    last = last_zoom(*one["pixels"].shape[:2])
    slide = ArraySlide(one["pixels"])
    for step in (1, 2):
        whole = one["pixels"].reshape(768 // step, step, 640 // step, step, 3)
        whole = whole.mean(axis=(1, 3))
        for y, x in ((0, 0), (1, 1)):
            size = [
                min(256, n - 256 * k)
                for n, k in zip(whole.shape[:2], (y, x), strict=True)
            ]
            region = Rectangle(256 * y, 256 * x, *size)
            exact = slide_tile(slide, region, step)
            wanted = whole[region.slices()]
            assert np.abs(exact - wanted).max() <= 0.5
            place = f"{last - (step == 2)}/{y}/{x}"
            seen = picture(tile(browser_of, "slide", one["slide"], place))
            got = np.asarray(seen, float)[: size[0], : size[1]]
            assert seen.size == (256, 256)
            assert np.abs(got - wanted).mean() < 4  # what JPEG takes


def test_overlays_hold_mask_truth_and_differences(
    browser_of: TestClient, one: dict[str, Any]
) -> None:
    last, mask, true = last_zoom(768, 640), one["mask"], one["true"]
    seen = {1: (mask == 1) & (true == 1), 2: mask > true, 3: mask < true}
    kinds = sum(where.astype(np.uint8) * kind for kind, where in seen.items())
    wanted = {"mask": mask, "difference": kinds, "truth": outlines(true)}
    for layer, values in wanted.items():
        for y in range(3):
            for x in range(3):
                place, shown = f"{last}/{y}/{x}", "&shown=1,2,3"
                got = picture(tile(browser_of, layer, one["slide"], place, shown))
                assert got.mode == "P"
                assert np.array_equal(np.asarray(got), part(values, y, x)), layer
    assert {*np.unique(kinds)} >= {1, 2}
    colors = picture(
        tile(browser_of, "difference", one["slide"], f"{last}/1/1", "&shown=2")
    ).convert("RGBA")
    opaque = part(kinds, 1, 1) == 2
    assert np.array_equal(np.asarray(colors)[..., 3] == 255, opaque)
    orange = [*bytes.fromhex(AGREEMENT["wrongly marked"][1:]), 255]
    assert (np.asarray(colors)[opaque] == orange).all()
    dark = picture(
        tile(browser_of, "truth", one["slide"], f"{last}/1/1", "&shown=1&dark=1")
    ).convert("RGBA")
    ink = [*bytes.fromhex(INK[1:]), 255]
    assert (np.asarray(dark)[part(outlines(true), 1, 1) > 0] == ink).all()


def test_coarse_overlays_are_the_coarse_levels(
    viewed: Path, browser_of: TestClient, one: dict[str, Any]
) -> None:
    store = viewed / "run" / "masks" / f"{one['slide']}.ome.zarr"
    level = zarr.open_array(store / "1", mode="r")[:]
    got = picture(tile(browser_of, "mask", one["slide"], "1/0/0", "&shown=1"))
    assert np.array_equal(np.asarray(got), part(level, 0, 0))


def test_probabilities_are_as_opaque_as_they_are_high(
    viewed: Path, browser_of: TestClient, one: dict[str, Any]
) -> None:
    store = viewed / "run" / "masks" / f"{one['slide']}.probabilities.ome.zarr"
    shares = zarr.open_array(store / "0", mode="r")[1]
    got = picture(tile(browser_of, "probability", one["slide"], "2/1/0", "&shown=1"))
    assert np.array_equal(np.asarray(got)[..., 3], part(shares, 1, 0))
    none = picture(tile(browser_of, "probability", one["slide"], "2/1/0"))
    assert not np.asarray(none).any()


def test_the_worst_region_is_where_most_is_wrong(
    browser_of: TestClient, one: dict[str, Any]
) -> None:
    found = browser_of.get(f"/api/worst?slide={one['slide']}").json()
    wrong = one["mask"] != one["true"]
    shares = {}
    for y in range(0, 768, 512):
        for x in range(0, 640, 512):
            shares[y, x] = int(wrong[y : y + 512, x : x + 512].sum())
    best = max(shares, key=lambda place: shares[place])
    assert (found[0]["y"], found[0]["x"]) == best
    area = found[0]["height"] * found[0]["width"]
    assert found[0]["wrong"] * area == pytest.approx(shares[best])


def test_uncertainty_is_opaque_where_it_is_high(
    viewed: Path, browser_of: TestClient, one: dict[str, Any]
) -> None:
    uri = layer_uri(str(viewed / "run"), one["slide"], "uncertainty")
    stored = np.asarray(open_mask(uri))
    got = picture(tile(browser_of, "uncertainty", one["slide"], "2/1/0"))
    assert np.array_equal(np.asarray(got)[..., 3], part(stored, 1, 0))


def test_without_a_truth_the_least_certain_region_is_the_worst(
    viewed: Path, copied: Path, one: dict[str, Any]
) -> None:
    shutil.rmtree(copied / "report")
    told = client(copied).get(f"/api/slide?slide={one['slide']}").json()
    assert told["layers"]["uncertainty"]
    assert not told["layers"]["difference"]
    found = client(copied).get(f"/api/worst?slide={one['slide']}").json()
    uri = layer_uri(str(viewed / "run"), one["slide"], "uncertainty")
    stored = np.asarray(open_mask(uri)).astype(np.int64)
    sums = {
        (y, x): int(stored[y : y + 512, x : x + 512].sum())
        for y in range(0, 768, 512)
        for x in range(0, 640, 512)
    }
    best = max(sums, key=lambda place: sums[place])
    assert (found[0]["y"], found[0]["x"]) == best
    area = found[0]["height"] * found[0]["width"]
    assert found[0]["uncertain"] * 255 * area == pytest.approx(sums[best])


# --- what is shown --------------------------------------------------------------------


def test_the_gallery_tells_status_and_scores(
    viewed: Path, browser_of: TestClient
) -> None:
    told = browser_of.get("/api/run").json()
    scores = pq.read_table(viewed / "report" / "per_slide.parquet").to_pylist()
    wanted = {row["slide"]: row["f1"] for row in scores}
    assert {card["slide"]: card["f1"] for card in told["slides"]} == {
        "broken": None
    } | wanted
    by_name = {card["slide"]: card for card in told["slides"]}
    assert by_name["broken"]["status"] == "failed"
    assert "broken.tif" in by_name["broken"]["message"]
    assert picture(browser_of.get("/thumbnail?slide=slide_000")).size == (320, 384)
    report = browser_of.get("/report")
    assert "<h1>" in report.text
    assert report.headers["content-security-policy"].startswith("sandbox allow-scripts")


@pytest.mark.parametrize(
    ("url", "status", "said"),
    [
        ("/tile/slide/2/0/9?slide=slide_000", 404, "zoom 2 has 3 x 3 tiles"),
        ("/tile/slide/9/0/0?slide=slide_000", 404, "zooms 0 to 2"),
        ("/tile/nothing/0/0/0?slide=slide_000", 404, "there are the layers"),
        ("/tile/mask/0/0/0?slide=slide_000&shown=../1", 400, "shown: expected"),
        ("/tile/mask/0/0/0?slide=slide_999", 404, "no slide 'slide_999'"),
        ("/tile/mask/0/0/0", 404, "no slide ''"),
        ("/tile/mask/0/0/0?slide=broken", 409, "broken.tif"),
        ("/api/worst?slide=broken", 409, "broken.tif"),
        ("/static/view.py", 404, "there is no"),
    ],
)
def test_wrong_requests_are_answered_in_words(
    browser_of: TestClient, url: str, status: int, said: str
) -> None:
    answer = browser_of.get(url)
    assert answer.status_code == status
    assert said in answer.json()["error"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_nothing_can_be_sent(browser_of: TestClient, method: str) -> None:
    for url in ("/", "/api/run", "/tile/mask/0/0/0?slide=slide_000"):
        assert browser_of.request(method, url).status_code == 405


@settings(max_examples=25)
@given(st.text(max_size=40) | st.sampled_from(["../run.yaml", "/etc/passwd", "%2e%2e"]))
def test_a_slide_is_never_a_path(browser_of: TestClient, text: str) -> None:
    for url in ("/api/slide", "/thumbnail", "/tile/mask/0/0/0", "/api/worst"):
        answer = browser_of.get(url, params={"slide": text})
        assert answer.status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "/static/../view.py",
        "/static/..%2fview.py",
        "/static/%2e%2e/run.py",
        "/static//etc/passwd",
        "/report/../run/run.yaml",
        "/run.yaml",
        "/tile/../../run.yaml",
    ],
)
def test_no_path_leads_out(browser_of: TestClient, path: str) -> None:
    assert browser_of.get(path).status_code == 404


def test_tiles_are_kept_by_the_browser(
    browser_of: TestClient, one: dict[str, Any]
) -> None:
    version = browser_of.get(f"/api/slide?slide={one['slide']}").json()["version"]
    first = tile(browser_of, "mask", one["slide"], "2/0/0", f"&shown=1&v={version}")
    assert "immutable" in first.headers["cache-control"]
    other = tile(browser_of, "mask", one["slide"], "2/0/0", "&shown=1&v=other")
    assert "immutable" not in other.headers["cache-control"]
    again = browser_of.get(
        f"/tile/mask/2/0/0?slide={one['slide']}&shown=1",
        headers={"If-None-Match": first.headers["etag"]},
    )
    assert (again.status_code, again.content) == (304, b"")


# --- who is answered ------------------------------------------------------------------


def test_only_names_of_this_machine_are_answered(browser_of: TestClient) -> None:
    for host in ("localhost:9", "127.0.0.1", "[::1]:80"):
        assert browser_of.get("/", headers={"Host": host}).status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example:8000", "localhost.evil", ""):
        answer = browser_of.get("/api/run", headers={"Host": host})
        assert answer.status_code == 403
    page = browser_of.get("/")
    assert "access-control-allow-origin" not in page.headers
    assert "script-src 'self';" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"


def test_a_token_opens_once_and_then_a_cookie_does(viewed: Path) -> None:
    strange = client(viewed, token="right")
    for url in ("/", "/api/run", "/static/view.css", "/?token=wrong", "/?token=é"):
        assert strange.get(url, headers={"Host": "any"}).status_code == 403
    wrong = strange.get("/", headers={"Cookie": "medray=right"})
    assert "token" in wrong.json()["error"]
    answer = strange.get("/slide?slide=a&token=right", follow_redirects=False)
    assert answer.headers["location"] == "/slide?slide=a"
    assert "HttpOnly" in answer.headers["set-cookie"]
    assert strange.get("/api/run").status_code == 200
    away = strange.get("//evil.example/?token=right", follow_redirects=False)
    assert not away.headers.get("location", "").startswith("//")


# --- what goes wrong ------------------------------------------------------------------


def test_a_slide_under_way_shows_what_is_there(copied: Path) -> None:
    table = pq.read_table(copied / "run" / "slides.parquet")
    rows = [row for row in table.to_pylist() if row["slide"] != "slide_001"]
    pq.write_table(table.from_pylist(rows), copied / "run" / "slides.parquet")
    seen = client(copied)
    cards = {card["slide"]: card for card in seen.get("/api/run").json()["slides"]}
    assert cards["slide_001"]["status"] == "under way"
    told = seen.get("/api/slide?slide=slide_001").json()
    assert (told["height"], told["width"]) == (768, 640)
    assert "--slides" in told["problem"]
    store = copied / "run" / "masks" / "slide_001.ome.zarr"
    mask = zarr.open_array(store / "0", mode="r")[:]
    got = picture(tile(seen, "mask", "slide_001", "2/0/0", "&shown=1"))
    assert np.array_equal(np.asarray(got), part(mask, 0, 0))
    moved = client(copied, slides=str(copied / "slides"))
    assert picture(tile(moved, "slide", "slide_001", "2/0/0")).size == (256, 256)


def test_a_run_without_any_finished_slide_opens(copied: Path) -> None:
    (copied / "run" / "slides.parquet").unlink()
    cards = client(copied, report=None).get("/api/run").json()["slides"]
    assert {card["status"] for card in cards} == {"under way"}


def test_a_damaged_mask_names_what_finds_it(copied: Path) -> None:
    store = copied / "run" / "masks" / "slide_001.ome.zarr" / "0" / "c" / "0" / "0"
    store.write_bytes(b"\x00" * 40)
    seen = client(copied)
    answer = tile(seen, "mask", "slide_001", "2/0/0", "&shown=1")
    assert answer.status_code == 409
    assert "medray verify" in answer.json()["error"]
    assert tile(seen, "slide", "slide_001", "2/0/0").status_code == 200


def test_a_slide_that_is_gone_or_another_one_is_not_shown(copied: Path) -> None:
    rows = pq.read_table(copied / "run" / "slides.parquet").to_pylist()
    for row in rows:  # the copied run shall tell of the copied slides
        row["uri"] = str(copied / "slides" / Path(row["uri"]).name)
    pq.write_table(
        pq.read_table(copied / "run" / "slides.parquet").from_pylist(rows),
        copied / "run" / "slides.parquet",
    )
    first, second = (copied / "slides" / f"slide_00{i}.tif" for i in (0, 1))
    os.utime(first)  # touched, but the same
    shutil.copyfile(copied / "slides" / "slide_002.tif", second)
    (copied / "slides" / "slide_003.tif").unlink()
    seen = client(copied)
    assert tile(seen, "slide", "slide_000", "2/0/0").status_code == 200
    changed = tile(seen, "slide", "slide_001", "2/0/0")
    assert (changed.status_code, "changed" in changed.text) == (409, True)
    gone = tile(seen, "slide", "slide_003", "2/0/0")
    assert (gone.status_code, "is gone" in gone.text) == (409, True)
    assert tile(seen, "mask", "slide_003", "2/0/0", "&shown=1").status_code == 200
    assert "is gone" in seen.get("/api/slide?slide=slide_003").json()["problem"]


def test_without_a_report_there_are_no_scores_and_no_truth(copied: Path) -> None:
    shutil.rmtree(copied / "report")
    seen = client(copied)
    told = seen.get("/api/slide?slide=slide_001").json()
    assert told["f1"] is None
    assert told["layers"] == {
        "slide": True,
        "mask": True,
        "probability": True,
        "uncertainty": True,
        "difference": False,
        "truth": False,
    }
    assert seen.get("/report").status_code == 404
    with_truth = client(copied, truth=str(copied / "annotations"))
    assert with_truth.get("/api/slide?slide=slide_001").json()["layers"]["truth"]


def test_wrong_folders_are_refused(
    viewed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["view", str(tmp_path / "none")]) == 2
    assert "expected a run" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"expected a report with a metrics\.json"):
        client(viewed, report=str(tmp_path))
    metrics = json.loads((viewed / "report" / "metrics.json").read_text())
    metrics["provenance"]["run digest"] = "another"
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(ConfigError, match="another run"):
        client(viewed, report=str(tmp_path))
    assert main(["view", str(viewed / "run"), "--port", "99999"]) == 2
    assert "choose another --port" in capsys.readouterr().err


@pytest.mark.timeout(60)
def test_a_signal_as_soon_as_it_has_said_where_it_is(viewed: Path) -> None:
    """The server has no handlers of its own yet."""

    def interrupt(_: Viewing) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(StoppedError):
        view(str(viewed / "run"), port=0, announce=interrupt)


# --- in a browser ---------------------------------------------------------------------


@pytest.fixture
def served(viewed: Path) -> Iterator[str]:
    """The address at which `medray view` serves; Ctrl-C ends it."""
    command = [sys.executable, "-m", "medray.cli", "view", str(viewed / "run")]
    process = subprocess.Popen(
        [*command, "--port", "0", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    told = json.loads(process.stdout.readline())
    assert told["slides"] == 5
    assert told["truth"] == str(viewed / "annotations")
    yield told["url"]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert json.loads(out)["exit_code"] == 130
    assert "Traceback" not in err


def test_in_a_browser(served: str, viewed: Path, one: dict[str, Any]) -> None:
    """Open, filter, zoom, toggle; the screenshot holds the pixels that it should."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("there is no chromium here")
    api = pytest.importorskip("playwright.sync_api")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    flags += ["--no-first-run", "--disable-sync"]
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(60_000)
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(f"{error}"))
        page.on(
            "console",
            lambda said: errors.append(said.text) if "Refused" in said.text else None,
        )
        strangers: list[str] = []
        page.on("request", lambda request: strangers.append(request.url))
        page.goto(served)
        page.wait_for_selector(".card")
        assert page.locator(".card").count() == 5
        page.select_option("#status", "failed")
        assert page.locator(".card b").all_text_contents() == ["broken"]
        page.select_option("#status", "")
        page.fill("#text", one["slide"][-3:])
        page.wait_for_url("**/?text=*")
        page.click(".card")
        page.wait_for_selector("body[data-ready]")

        # Zoomed to the slide's own pixels, a tile stands as it is on the screen.
        last = last_zoom(768, 640)
        page.evaluate(f"location.hash = '#{last}/384/384'")

        def seen() -> Any:
            page.wait_for_function(
                f"""() => document.querySelector(
                      'img.leaflet-tile[src*="/tile/slide/{last}/1/1?"]') &&
                    !document.querySelector('img.leaflet-tile:not(.leaflet-tile-loaded)')
                    && [...document.querySelectorAll('img.leaflet-tile')].every(
                      tile => Number(tile.style.opacity || 1) === 1)  // faded in
                """
            )
            box = page.locator(f'img[src*="/tile/slide/{last}/1/1?"]').bounding_box()
            shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            left, top = round(box["x"]), round(box["y"])
            return np.asarray(shot.crop((left, top, left + 256, top + 256)), float)

        served_tile = page.request.get(
            f"{served}tile/slide/{last}/1/1?slide={one['slide']}"
        )
        bare = np.asarray(Image.open(io.BytesIO(served_tile.body())), float)
        mask, true = (part(one[key], 1, 1) for key in ("mask", "true"))
        orange = np.array([*bytes.fromhex(Classes().colors[1][1:])], float)
        wanted = np.where(mask[..., None] == 1, (bare + orange) / 2, bare)
        assert np.abs(seen() - wanted).max() <= 3
        page.click("#toggles input")  # the class is switched off
        page.wait_for_function(
            "() => !document.querySelector('img[src*=\"/tile/mask\"]')"
        )
        assert np.abs(seen() - bare).max() <= 2
        page.keyboard.press("3")
        for _ in range(5):
            page.keyboard.press("]")
        page.wait_for_selector(f'img[src*="/tile/difference/{last}/1/1"]')
        shown = seen()
        kinds = differences(mask, true)
        for kind, color in enumerate(list(AGREEMENT.values())[:3], 1):
            if (kinds == kind).any():
                there = shown[kinds == kind]
                assert np.abs(there - [*bytes.fromhex(color[1:])]).max() <= 2
        assert np.abs(shown[kinds == 0] - bare[kinds == 0]).max() <= 2
        page.keyboard.press("w")
        page.wait_for_function(
            "() => /worst/.test(document.querySelector('#said').innerText)"
        )
        assert re.search(r"#[\d.]+/\d+/\d+$", page.url)
        page.keyboard.press("?")
        assert page.locator("#help").is_visible()
        page.keyboard.press("Escape")
        page.keyboard.press("g")
        page.wait_for_selector(".card")
        assert not errors
        assert all(url.startswith((served, "data:")) for url in strangers)
        browser.close()
