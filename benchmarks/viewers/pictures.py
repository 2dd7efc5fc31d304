r"""Pictures of the viewer and of a report, at the width of a desk and of a phone.

Run: python -m benchmarks.viewers.pictures --out OUT --view URL \
         --report report/report.html
where `medray view` serves URL. Needs playwright and a Chromium on the PATH.
"""

from pathlib import Path

from playwright.sync_api import Page

from benchmarks import harness
from benchmarks.viewers.shown import chromium

# Nothing is left to come, and something is there.
LOADED = """() => document.querySelectorAll('img.leaflet-tile').length &&
  !document.querySelector('img.leaflet-tile:not(.leaflet-tile-loaded)')"""
SIZES = {"desk": (1280, 800), "phone": (390, 844)}


def show_view(page: Page, url: str, slide: str | None, out: Path, name: str) -> None:
    """Picture the gallery, a slide, its worst region, what is uncertain, the keys."""

    def shoot(what: str) -> None:
        page.screenshot(path=out / f"{what}-{name}.jpg", quality=82)

    page.goto(f"{url}?sort=f1")
    page.wait_for_selector(".card")
    page.wait_for_load_state("networkidle")
    shoot("gallery")
    if slide:
        page.goto(f"{url}slide?slide={slide}")
    else:
        page.click(".card")
    page.wait_for_selector("body[data-ready]")
    page.wait_for_function(LOADED)
    shoot("slide")
    page.keyboard.press("3")
    page.keyboard.press("w")
    page.keyboard.press("t")
    page.wait_for_function("() => document.querySelector('#said').textContent")
    page.wait_for_function(LOADED)
    shoot("worst")
    page.keyboard.press("4")
    page.wait_for_timeout(500)  # tiles of the other layer are asked for
    page.wait_for_function(LOADED)
    shoot("uncertain")
    page.keyboard.press("?")
    shoot("keys")


def main(
    out: Path,
    view: str | None = None,
    slide: str | None = None,
    report: Path | None = None,
) -> None:
    """Take pictures of the viewer and of a report.

    Args:
        out: Folder to write to.
        view: Address that `medray view` printed.
        slide: Its id; without it the one with the worst F1.
        report: HTML file of a report.
    """
    out.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        for name, (width, height) in SIZES.items():
            page = browser.new_page(viewport={"width": width, "height": height})
            if view:
                show_view(page, view, slide, out, name)
            if report:
                page.goto(report.absolute().as_uri())
                page.screenshot(path=out / f"report-{name}.png", full_page=True)
            page.close()
        if report:  # the top of it, as README shows it
            page = browser.new_page(viewport={"width": 1000, "height": 1180})
            page.goto(report.absolute().as_uri())
            page.screenshot(path=out / "report.png")


if __name__ == "__main__":
    harness.run(main)
