"""The groups of a page of help, and which option stands in which."""

from __future__ import annotations

from cyclopts import Group

_OPTIONS = {
    "Input": (
        *("slides", "images", "inbox", "source", "run", "other", "data", "command"),
        *("annotations", "truth", "report", "compare", "reference", "classes"),
        *("mpp", "scene", "plane", "groups", "splits", "split", "cohorts", "labels"),
        *("ignore_unknown", "fractions", "seed", "remove_missing", "side", "patients"),
        *("by_loss", "contours", "qc", "settle", "everywhere", "within", "coarse"),
    ),
    "Model": (
        *("recipe", "overrides", "model", "encoder", "weights", "grid", "asha"),
        *("repeats", "name", "tile_mpp", "tile", "tissue", "stitch", "tta", "vote"),
        *("thresholds", "crf"),
    ),
    "Output": (
        *("out", "format", "to", "with_image", "count", "outlines", "probabilities"),
        *("quality", "smooth", "holes", "smallest", "webhook", "json"),
    ),
    "Where it runs": (
        *("executor", "address", "job", "wait", "stage", "kubernetes", "namespace"),
        *("host", "port", "token", "token_file", "replicas"),
    ),
    "Advanced": (
        *(
            "precision",
            "compile",
            "region",
            "timeout",
            "timeout_s",
            "sample",
            "price",
            "agreement",
            "night",
        ),
        *("tries", "max_mpixel", "max_mbyte", "partial_ok", "dry_run", "verbose"),
    ),
}
GROUPS = {
    name: Group(title, sort_key=number)
    for number, (title, names) in enumerate(_OPTIONS.items())
    for name in names
}
"""The group of each option and argument, by the name of its parameter."""
