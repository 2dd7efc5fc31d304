"""The answers of the viewer: pages, JSON, tiles."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.resources
import re
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from medray.apps.viewer.describe import COLORS, describe_run, describe_slide
from medray.apps.viewer.layers import (
    difference_tile,
    mask_tile,
    probability_tile,
    truth_outlines,
    uncertainty_tile,
)
from medray.apps.viewer.pictures import UNSURE, as_heat, as_jpeg, as_overlay
from medray.apps.viewer.run import ViewedRun, source_of, version_of
from medray.apps.viewer.tiles import TILE, open_unchanged, slide_tile, tile_region
from medray.apps.viewer.worst import worst_regions
from medray.errors import ConfigError
from medray.evaluation import INK
from medray.slides import read_thumbnail
from medray.storage import files

_THUMBNAIL = 384  # pixels
_LAYERS = ("slide", "mask", "probability", "uncertainty", "difference", "truth")

# A report has its style and script within itself: it is shown as a stranger's page.
_REPORT_POLICY = (
    "sandbox allow-scripts allow-popups; default-src 'none'; img-src data:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; frame-ancestors 'none'"
)


def read_assets() -> dict[str, tuple[bytes, str]]:
    """Read the pages and what they need: bytes and type by name.

    Raises:
        ConfigError: Leaflet is not installed.
    """
    kinds = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
    found = {
        item.name: item.read_bytes()
        for item in importlib.resources.files("medray.apps.viewer")
        .joinpath("static")
        .iterdir()
        if item.is_file()
    }
    try:
        packed = importlib.metadata.files("XStatic-Leaflet") or []
    except importlib.metadata.PackageNotFoundError:
        packed = []
    for file in packed:
        if file.name in ("leaflet.js", "leaflet.css"):
            found[file.name] = file.read_binary()
    if not {"leaflet.js", "leaflet.css"} <= found.keys():
        raise ConfigError("the viewer needs XStatic-Leaflet; install `medray[view]`")
    return {
        name: (data, kinds[name.rpartition(".")[2]])
        for name, data in found.items()
        if name.rpartition(".")[2] in kinds
    }


def asset_response(
    assets: dict[str, tuple[bytes, str]], name: str, request: Request
) -> Response:
    """Return one of the pages, or what they need."""
    if name not in assets:
        raise LookupError(f"there is no {name!r}")
    data, kind = assets[name]
    return _kept(request, data, kind, "no-cache")


def _kept(request: Request, data: bytes, kind: str, cache: str) -> Response:
    """Return bytes with their digest, or status 304 if the browser has them."""
    tag = f'"{hashlib.blake2b(data, digest_size=12).hexdigest()}"'
    headers = {"ETag": tag, "Cache-Control": cache}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=kind, headers=headers)


def _picture(request: Request, row: dict[str, Any], data: bytes, kind: str) -> Response:
    """Return a picture; cached for a day if its slide is done and its version named."""
    final = row["status"] == "done" and _asked(request, "v") == version_of(row)
    cache = "private, max-age=86400, immutable" if final else "private, no-cache"
    return _kept(request, data, kind, cache)


def _asked(request: Request, name: str) -> str:
    return request.query_params.get(name, "")


def report_response(viewed: ViewedRun, request: Request) -> Response:
    """Return the report's page."""
    if not viewed.report:
        raise LookupError("there is no report; give --report, or `medray evaluate`")
    data = files.read_bytes(files.join(viewed.report, "report.html"))
    answer = _kept(request, data, "text/html", "no-cache")
    answer.headers["Content-Security-Policy"] = _REPORT_POLICY
    return answer


def run_response(viewed: ViewedRun, request: Request) -> Response:
    """Return what the gallery shows of the run."""
    return JSONResponse(describe_run(viewed))


def slide_response(viewed: ViewedRun, request: Request) -> Response:
    """Return what the page of a slide shows."""
    row = viewed.row(_asked(request, "slide"))
    return JSONResponse(describe_slide(viewed, row))


def worst_response(viewed: ViewedRun, request: Request) -> Response:
    """Return the squares of a slide in which most is wrong or least certain."""
    row = viewed.row(_asked(request, "slide"))
    source = source_of(viewed, row)
    if not source.mask or not (source.truth or source.uncertainty):
        raise LookupError(
            "this slide has no mask, or neither a truth to compare it with nor an "
            "uncertainty (infer with --quality)"
        )
    return JSONResponse(worst_regions(source, viewed.settings.classes))


def thumbnail_response(viewed: ViewedRun, request: Request) -> Response:
    """Return the thumbnail of a slide."""
    row = viewed.row(_asked(request, "slide"))
    slide = open_unchanged(source_of(viewed, row))
    pixels, _, _ = read_thumbnail(slide, _THUMBNAIL)
    return _picture(request, row, as_jpeg(pixels), "image/jpeg")


def tile_response(viewed: ViewedRun, request: Request) -> Response:
    """Draw one tile; `shown` names the classes, or differences, to be seen."""
    layer = request.path_params["layer"]
    if layer not in _LAYERS:
        raise LookupError(f"there are the layers {', '.join(_LAYERS)}, found {layer!r}")
    zoom, y, x = (request.path_params[name] for name in ("zoom", "y", "x"))
    classes = viewed.settings.classes
    row = viewed.row(_asked(request, "slide"))
    source = source_of(viewed, row)
    region, step = tile_region(source, zoom, y, x)
    shown = _shown(_asked(request, "shown"))
    if layer == "slide":
        pixels = slide_tile(open_unchanged(source), region, step)
        return _picture(request, row, as_jpeg(pixels, side=TILE), "image/jpeg")
    if layer != "truth" and not source.mask:
        raise LookupError("this slide has no mask")
    if layer in ("truth", "difference") and not source.truth:
        raise LookupError("this slide has no truth")
    if layer == "probability":
        if not source.probabilities:
            raise LookupError("the run kept no probabilities; infer with them")
        shares = probability_tile(source, region, step)
        data = as_heat(shares, classes.colors, shown)
    elif layer == "uncertainty":
        if not source.uncertainty:
            raise LookupError("the run kept no uncertainty; infer with --quality")
        data = as_heat(uncertainty_tile(source, region, step)[None], (UNSURE,), {0})
    elif layer == "truth":
        lines = truth_outlines(source, region, step, classes)
        # In the differences the colours of classes have other meanings.
        dark = [INK] * len(classes) if _asked(request, "dark") else classes.colors
        data = as_overlay(lines, dark, shown)
    else:
        if layer == "difference":
            values = difference_tile(source, region, step, classes)
            colors: Sequence[str] = COLORS
        else:
            values, colors = mask_tile(source, region, step), classes.colors
        data = as_overlay(values, colors, shown)
    return _picture(request, row, data, "image/png")


def _shown(text: str) -> set[int]:
    if not re.fullmatch(r"(\d{1,3}(,\d{1,3})*)?", text, re.ASCII):
        raise ValueError(f"shown: expected values such as 1,2, found {text[:40]!r}")
    return {int(part) for part in text.split(",") if part}
