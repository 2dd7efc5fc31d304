"""What medray's HTML pages share: templates, figures, numbers in words."""

from __future__ import annotations

import base64
import datetime
import io
from collections.abc import Sequence

import jinja2
import matplotlib
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from medray.errors import ConfigError
from medray.storage import files

INK, SOFT, LINE, ACCENT = "#1d2429", "#5c6870", "#dfe4e8", "#0b5c8a"
"""Colours of text, of secondary text, of rules and of what matters."""

_TABLES = ("per_slide.parquet", "images.csv", "slides.csv")


def check_folder(out: str, table: str) -> None:
    """Raise an error for a folder with a report whose other table would stay in it.

    Raises:
        ConfigError: It holds another kind of report.
    """
    for name in _TABLES:
        if name != table and files.exists(files.join(out, name)):
            raise ConfigError(
                f"{out} holds another kind of report ({name}); give another --out, "
                f"or delete it"
            )


def render(template: str, **values: object) -> str:
    """Fill a page's template; every value must be given."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("medray.evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "score": score,
        "span": span,
        "px": pixels,
        "moment": moment,
    }
    return environment.get_template(template).render(values)


def finish_axes(axes: Axes, x: str, y: str = "") -> None:
    """Label axes, and give them medray's quiet frame and grid."""
    axes.set_xlabel(x, color=SOFT)
    axes.set_ylabel(y, color=SOFT)
    axes.tick_params(colors=SOFT)
    axes.grid(color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(LINE)


def name_above(axes: Axes) -> None:
    """Name what is drawn above the axes, where it covers nothing."""
    axes.legend(
        frameon=False,
        fontsize=8,
        labelcolor=SOFT,
        ncols=3,
        loc="lower left",
        bbox_to_anchor=(0, 1),
    )


def as_svg(figure: Figure) -> Markup:
    """Draw a figure as an SVG element; the same figure gives the same bytes."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "medray"}):
        figure.savefig(
            buffer,
            format="svg",
            bbox_inches="tight",
            dpi=150,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :])  # matplotlib escapes what it writes


def as_png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Write (H, W, 3) uint8 RGB as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def data_uri(picture: bytes) -> str:
    """Make a PNG or JPEG part of a page."""
    kind = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def score(value: float | None) -> str:
    """Write a score; an undefined one is a dash."""
    return "\N{EN DASH}" if value is None else f"{value:.3f}"


def span(value: Sequence[float] | None) -> str:
    """Write an interval."""
    return "" if value is None else f"{value[0]:.3f} to {value[1]:.3f}"


def pixels(count: int) -> str:
    """Write pixels with a unit: 1234567 as 1.2 M px."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit} px"
    return f"{count} px"


def moment(iso: str) -> str:
    """Write a moment to the minute: 2026-11-30 22:44 UTC."""
    found = datetime.datetime.fromisoformat(iso).astimezone(datetime.UTC)
    return found.strftime("%Y-%m-%d %H:%M UTC")
