"""What viewers show: Neuroglancer and Viv in Chromium, napari in its window."""

import io
import math
import multiprocessing
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
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
        self, place: Path, *, mpp: float, factor: int, middle: tuple[int, int]
    ) -> npt.NDArray[np.uint8]:
        """Return (SIDE, SIDE) label values, as the screen shows them.

        Args:
            place: The OME-Zarr's folder.
            mpp: Its microns per pixel.
            factor: Its pixels per pixel of the picture: the viewer takes that level.
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
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on loopback, parts of files and to pages of other servers too."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware
    from starlette.routing import Mount
    from starlette.staticfiles import StaticFiles

    app = Starlette(
        routes=[Mount("/", StaticFiles(directory=folder, html=True))],
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
        place: Path, *, mpp: float, factor: int, middle: tuple[int, int]
    ) -> npt.NDArray[np.uint8]:
        with served(place) as address:
            return picture(address, mpp, factor, middle)

    def picture(
        address: str, mpp: float, factor: int, middle: tuple[int, int]
    ) -> npt.NDArray[np.uint8]:
        with viewer.txn() as state:
            # Each label in the grey of its value.
            state.layers["mask"] = ng.SegmentationLayer(
                source=f"zarr://{address}",
                segments=range(1, 256),
                segment_colors={v: f"#{v:02x}{v:02x}{v:02x}" for v in range(1, 256)},
                selected_alpha=1,
            )
            state.dimensions = ng.CoordinateSpace(
                names=["x", "y"], units="um", scales=[mpp, mpp]
            )
            # Whole numbers are the middles of pixels of level 0.
            state.position = [factor * at - 0.5 for at in reversed(middle)]
            state.cross_section_scale = factor
            state.layout = "xy"
            state.cross_section_background_color = "#000000"
            state.show_axis_lines = state.show_scale_bar = False
            state.show_default_annotations = False
        taken: list[Any] = []
        done = threading.Event()
        viewer.async_screenshot(lambda answer: (taken.append(answer), done.set()))
        if not done.wait(120):
            raise TimeoutError(f"Neuroglancer has not shown {address} in 120 s")
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
    """Open Viv, on the page of viv/."""
    with served(VIV) as page_address, chromium() as browser:

        def show(
            place: Path, *, mpp: float, factor: int, middle: tuple[int, int]
        ) -> npt.NDArray[np.uint8]:
            page = browser.new_page(viewport={"width": SIDE, "height": SIDE})
            page.goto(f"{page_address}/index.html")
            view = [-math.log2(factor), [factor * at for at in reversed(middle)]]
            with served(place) as address:
                page.evaluate("(args) => show(...args)", [address, *view])
                picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            page.close()
            return np.asarray(picture)[..., 0]

        yield show


# --- napari ---------------------------------------------------------------------------

_window: Any = None  # of the process that _open_napari has made napari's own


def _open_napari(display: str) -> None:
    global _window
    os.environ |= {"DISPLAY": display, "QT_QPA_PLATFORM": "xcb"}
    os.environ["NAPARI_CONFIG"] = ""  # no settings in the home folder
    import napari

    _window = napari.Viewer()


def _show_in_napari(
    place: str, mpp: float, factor: int, middle: tuple[int, int]
) -> npt.NDArray[np.uint8]:
    from napari.layers import Labels
    from napari.utils import DirectLabelColormap

    _window.layers.clear()
    # With labels of a group its image and its other labels come too.
    plugin = "napari" if Path(place).is_file() else "napari-ome-zarr"
    layers = {layer.name: layer for layer in _window.open(place, plugin=plugin)}
    for layer in layers.values():
        layer.visible = False
    layer = layers.get("mask") or next(iter(layers.values()))
    # Each label in the grey of its value.
    if isinstance(layer, Labels):
        greys = {value: [value / 255] * 3 + [1.0] for value in range(256)}
        colors: dict[int | None, Any] = {None: "red", **greys}
        layer.colormap = DirectLabelColormap(color_dict=colors)
        layer.opacity = 1
    else:  # of a TIFF
        layer.contrast_limits = (0, 255)
    layer.visible = True
    # Whole numbers are the middles of pixels of level 0.
    _window.camera.center = [mpp * (factor * at - 0.5) for at in middle]
    _window.camera.zoom = 1 / (mpp * factor)
    picture = _window.screenshot(size=(SIDE, SIDE), scale=1, flash=False)
    shown: npt.NDArray[np.uint8] = picture[..., 0]
    return shown


@contextmanager
def xvfb() -> Iterator[str]:
    """Start an X server that draws in memory; gives the DISPLAY of its clients."""
    reader, writer = os.pipe()
    command = ["Xvfb", "-displayfd", f"{writer}", "-screen", "0", "1280x900x24"]
    with subprocess.Popen(
        [*command, "-nolisten", "tcp"], pass_fds=[writer], stderr=subprocess.DEVNULL
    ) as server:
        os.close(writer)
        try:
            with open(reader) as told:
                number = told.readline().strip()
            if not number:
                raise RuntimeError("Xvfb has ended: expected the number of its display")
            yield f":{number}"
        finally:
            server.terminate()


@contextmanager
def _process_of_napari() -> Iterator[ProcessPoolExecutor]:
    """Start napari in a process of its own: it caches all of dask."""
    context = multiprocessing.get_context("spawn")
    with (
        xvfb() as display,
        ProcessPoolExecutor(1, context, _open_napari, (display,)) as pool,
    ):
        yield pool


@contextmanager
def napari() -> Iterator[Show]:
    """Open napari; of a TIFF it shows the first level, 1 micron a pixel."""
    with _process_of_napari() as pool:

        def show(
            place: Path, *, mpp: float, factor: int, middle: tuple[int, int]
        ) -> npt.NDArray[np.uint8]:
            given = f"{place}", mpp, factor, middle
            return pool.submit(_show_in_napari, *given).result()

        yield show


def _take_window(place: str, picture: str) -> None:
    import napari

    for layer in _window.open(place, plugin="napari-ome-zarr"):
        layer.visible = not isinstance(layer, napari.layers.Labels)
    _window.layers["mask"].visible = True
    _window.reset_view()
    for _ in range(30):  # until the docks have their sizes
        napari.qt.get_qapp().processEvents()
        time.sleep(0.1)
    shown = Image.fromarray(_window.screenshot(canvas_only=False, flash=False))
    shown.save(picture)


def picture_of_napari(place: Path, picture: Path) -> None:
    """Take a picture of its whole window, with an image and its mask."""
    with _process_of_napari() as pool:
        pool.submit(_take_window, f"{place}", f"{picture}").result()


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
