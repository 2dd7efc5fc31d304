"""Pictures of the viewer's pages, at the width of a desk and of a phone.

Run: python benchmarks/view_pictures.py URL OUT, where `medray view` serves URL.
Needs playwright and a Chromium on the PATH.
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--disable-sync",
]
# Nothing is left to come, and something is there.
LOADED = """() => document.querySelectorAll('img.leaflet-tile').length &&
  !document.querySelector('img.leaflet-tile:not(.leaflet-tile-loaded)')"""
SIZES = {"desk": (1280, 800), "phone": (390, 844)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="as `medray view` printed it")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--slide", help="its id (the one with the worst F1)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=FLAGS
        )
        for name, (width, height) in SIZES.items():
            page = browser.new_page(viewport={"width": width, "height": height})
            page.goto(f"{args.url}?sort=f1")
            page.wait_for_selector(".card")
            page.wait_for_load_state("networkidle")
            page.screenshot(path=args.out / f"gallery-{name}.jpg", quality=82)
            if args.slide:
                page.goto(f"{args.url}slide?slide={args.slide}")
            else:
                page.click(".card")
            page.wait_for_selector("body[data-ready]")
            page.wait_for_function(LOADED)
            page.screenshot(path=args.out / f"slide-{name}.jpg", quality=82)
            page.keyboard.press("3")
            page.keyboard.press("w")
            page.keyboard.press("t")
            page.wait_for_function("() => document.querySelector('#said').textContent")
            page.wait_for_function(LOADED)
            page.screenshot(path=args.out / f"worst-{name}.jpg", quality=82)
            page.keyboard.press("?")
            page.screenshot(path=args.out / f"keys-{name}.jpg", quality=82)
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
