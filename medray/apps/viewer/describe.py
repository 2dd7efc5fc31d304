"""The JSON that the viewer's pages show of a run and its slides."""

from __future__ import annotations

from medray.apps.viewer.run import ViewedRun, source_of, version_of
from medray.apps.viewer.tiles import last_zoom, open_unchanged
from medray.errors import MedrayError
from medray.evaluation import AGREEMENT
from medray.storage import files
from medray.types import Row

COLORS = ("#000000", *AGREEMENT.values())
"""Of the differences, by their value in `medray.apps.viewer.layers.KINDS`."""


def describe_run(viewed: ViewedRun) -> Row:
    """Return what the gallery shows: the run and each of its slides."""
    classes = viewed.settings.classes
    return {
        "run": viewed.uri.rpartition("/")[2],
        "model": viewed.settings.names,
        "report": bool(viewed.report),
        "classes": _legend(classes.names, classes.colors),
        "slides": [_card(viewed, row) for row in viewed.rows().values()],
    }


def _card(viewed: ViewedRun, row: Row) -> Row:
    score = viewed.scores.get(row["slide"], {})
    names = viewed.settings.classes.names
    card = {key: row[key] for key in ("slide", "status", "message")}
    card |= {"f1": score.get("f1"), "note": row.get("note") or ""}
    card |= {"version": version_of(row), "area": None, "um2": None}
    if row["status"] == "done":
        found = sum(row.get(f"px_{name}") or 0 for name in names[1:])
        card["area"] = found / (row["height"] * row["width"])
        card["um2"] = found * row["mpp"] ** 2 if row["mpp"] else None
    return card


def describe_slide(viewed: ViewedRun, row: Row) -> Row:
    """Return what the page of a slide shows."""
    classes = viewed.settings.classes
    source = source_of(viewed, row)
    problem = ""
    try:
        open_unchanged(source)
    except MedrayError as error:
        problem = f"{error}"
    score = viewed.scores.get(row["slide"], {})
    names = {"f1": "F1", "iou": "IoU", "precision": "Precision", "recall": "Recall"}
    done = row["status"] == "done"
    probabilities = source.probabilities and files.exists(source.probabilities)
    uncertainty = source.uncertainty and files.exists(source.uncertainty)
    return _card(viewed, row) | {
        "run": viewed.uri.rpartition("/")[2],
        "height": source.height,
        "width": source.width,
        "mpp": source.mpp,
        "last_zoom": last_zoom(source.height, source.width),
        "problem": problem,
        "layers": {
            "slide": not problem,
            "mask": bool(source.mask),
            "probability": bool(source.mask and probabilities),
            "uncertainty": bool(source.mask and uncertainty),
            "difference": bool(source.mask and source.truth),
            "truth": bool(source.truth),
        },
        "classes": _legend(classes.names, classes.colors),
        "kinds": _legend(("", *AGREEMENT), COLORS)[: 4 if len(classes) > 2 else 3],
        "facts": {
            "Model": viewed.settings.names,
            "Slide": (
                f"{row['mpp_x']:.4g} µm per pixel ({row['mpp_from']})"
                if row.get("mpp_x")
                else ""
            ),
            "Mask": f"{row['mpp']:.3g} µm per pixel" if done and row["mpp"] else "",
            "Pixels": f"{source.width} \N{MULTIPLICATION SIGN} {source.height}",
        }
        | {
            name: f"{score[key]:.3f}"
            for key, name in names.items()
            if score.get(key) is not None
        },
    }


def _legend(names: tuple[str, ...], colors: tuple[str, ...]) -> list[Row]:
    """Return name, colour and value of all but the first, which is not drawn."""
    legend = [
        {"value": value, "name": name, "color": color}
        for value, (name, color) in enumerate(zip(names, colors, strict=True))
    ]
    return legend[1:]
