"""Headless Chromium, a server of folders, and Neuroglancer and Viv on pages of it."""

import io
import math
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

SIDE = 600  # pixels of a picture
VIV = Path(__file__).parent / "viv" / "dist"  # by `make test-slow`


class Show(Protocol):
    """What takes a picture of a mask in a viewer."""

    def __call__(
        self, source: str, *, mpp: float, factor: int, middle: tuple[int, int]
    ) -> npt.NDArray[np.uint8]:
        """Give (SIDE, SIDE) label values, as the screen shows them.

        Args:
            source: Address of the OME-Zarr.
            mpp: Its microns a pixel.
            factor: Its pixels a pixel of the picture: the viewer takes that level.
            middle: (y, x) of the picture's middle, in pixels of the picture.
        """


@contextmanager
def chromium() -> Iterator[Any]:
    """Start a browser that draws WebGL in software."""
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-background-networking", "--no-first-run"]
    flags += ["--disable-sync", "--use-gl=angle", "--use-angle=swiftshader"]
    flags += ["--enable-unsafe-swiftshader"]
    where = shutil.which("chromium")
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=where, args=flags) as browser,
    ):
        yield browser


@contextmanager
def served(**folders: str) -> Iterator[str]:
    """Serve folders on loopback, parts of files and to pages of other servers too."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware
    from starlette.routing import Mount
    from starlette.staticfiles import StaticFiles

    app = Starlette(
        routes=[
            Mount(f"/{name}", StaticFiles(directory=folder, html=True))
            for name, folder in folders.items()
        ],
        middleware=[Middleware(CORSMiddleware, allow_origins=["*"])],
    )
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def neuroglancer() -> Iterator[Show]:
    """Open Neuroglancer."""
    import neuroglancer as ng

    ng.set_server_bind_address("127.0.0.1")
    viewer: Any = ng.Viewer()
    with viewer.config_state.txn() as config:
        config.show_ui_controls = config.show_panel_borders = False
        config.viewer_size = [SIDE, SIDE]

    def show(
        source: str, *, mpp: float, factor: int, middle: tuple[int, int]
    ) -> npt.NDArray[np.uint8]:
        with viewer.txn() as state:
            # Each label in the grey of its value.
            state.layers["mask"] = ng.SegmentationLayer(
                source=f"zarr://{source}",
                segments=range(1, 256),
                segment_colors={v: f"#{v:02x}{v:02x}{v:02x}" for v in range(1, 256)},
                selected_alpha=1,
            )
            state.dimensions = ng.CoordinateSpace(
                names=["x", "y"], units="um", scales=[mpp, mpp]
            )
            # Whole numbers are the middles of pixels of level 0.
            state.position = [factor * place - 0.5 for place in reversed(middle)]
            state.cross_section_scale = factor
            state.layout = "xy"
            state.cross_section_background_color = "#000000"
            state.show_axis_lines = state.show_scale_bar = False
            state.show_default_annotations = False
        taken: list[Any] = []
        done = threading.Event()
        viewer.async_screenshot(lambda answer: (taken.append(answer), done.set()))
        if not done.wait(120):
            raise TimeoutError(f"Neuroglancer has not shown {source} in 120 s")
        pixels: npt.NDArray[np.uint8] = taken[0].screenshot.image_pixels[..., 0]
        return pixels

    try:
        with chromium() as browser:
            page = browser.new_page(viewport={"width": 1000, "height": 750})
            page.goto(viewer.get_viewer_url())
            yield show
    finally:
        ng.stop()


@contextmanager
def viv() -> Iterator[Show]:
    """Open Viv, on the page of benchmarks/viv."""
    with served(viv=str(VIV)) as address, chromium() as browser:

        def show(
            source: str, *, mpp: float, factor: int, middle: tuple[int, int]
        ) -> npt.NDArray[np.uint8]:
            page = browser.new_page(viewport={"width": SIDE, "height": SIDE})
            page.goto(f"{address}/viv/index.html")
            view = [-math.log2(factor), [factor * place for place in reversed(middle)]]
            page.evaluate("(args) => show(...args)", [source, *view])
            picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            page.close()
            return np.asarray(picture)[..., 0]

        yield show


def differing(
    found: npt.NDArray[np.uint8],
    mask: npt.NDArray[np.uint8],
    middle: tuple[int, int],
) -> int:
    """Count the pixels of a picture of a mask that are others than the mask's.

    Beyond the mask nothing is compared: Neuroglancer draws its last row there once more
    at some levels.
    """
    half = SIDE // 2
    y, x = middle
    there = np.pad(np.ones_like(mask), half)[y : y + SIDE, x : x + SIDE]
    wanted = np.pad(mask, half)[y : y + SIDE, x : x + SIDE]
    return int(((found != wanted) & (there > 0)).sum())
