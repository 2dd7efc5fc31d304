"""What the viewer knows of a run: its slides, their state, scores and truths."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from medray.annotations import match_names
from medray.apps.viewer.tiles import SlideSource, open_unchanged, whole_step
from medray.errors import ConfigError, MedrayError
from medray.evaluation import list_ground_truth, name_in
from medray.inference import (
    RunSettings,
    layer_uri,
    mask_uri,
    probabilities_uri,
    raw_uri,
    read_run,
)
from medray.slides import SlideFile, find_slides
from medray.storage import Ledger, files, group_attributes, ome_zarr
from medray.types import Row

log = logging.getLogger(__name__)

_FRESH_S = 2.0  # how long what was read of the run counts as new


@dataclass
class ViewedRun:
    """A run that is looked at; what it holds is read again as it grows.

    Attributes:
        uri: Its folder.
        settings: Of run.yaml.
        report: Folder of an evaluation of it; empty when there is none.
        truth: Where the truth lies; empty when not given.
        ground_truths: Names of each truth, by its address.
        kind: What they are: annotation or labels.
        scores: Row of each slide in the report.
        moved: Where slides lie now, by slide.
    """

    uri: str
    settings: RunSettings
    report: str = ""
    truth: str = ""
    ground_truths: Mapping[str, list[str]] = field(default_factory=dict)
    kind: str = ""
    scores: Mapping[str, Row] = field(default_factory=dict)
    moved: Mapping[str, str] = field(default_factory=dict)
    _rows: dict[str, Row] = field(default_factory=dict)
    _truth_of: dict[str, str] = field(default_factory=dict)
    _read_at: float = -math.inf

    def rows(self) -> dict[str, Row]:
        """Return one row per slide: of slides.parquet, or of what is under way."""
        if time.monotonic() - self._read_at > _FRESH_S:
            self._rows = read_rows(self.uri)
            slides = [SlideFile(slide, row["uri"]) for slide, row in self._rows.items()]
            self._truth_of = match_names(slides, self.ground_truths)
            self._read_at = time.monotonic()
        return self._rows

    def truth_of(self, slide: str) -> str:
        """Return the address of a slide's truth; empty when there is none."""
        self.rows()
        return self._truth_of.get(slide, "")

    def row(self, slide: str) -> Row:
        """Return the row of a slide.

        Raises:
            LookupError: The run has no such slide.
        """
        rows = self.rows()
        if slide not in rows:
            raise LookupError(f"the run has no slide {slide!r}")
        return rows[slide]


def open_viewed(
    run: str, *, report: str | None, truth: str | None, slides: str | None
) -> ViewedRun:
    """Find everything that can be shown of a run.

    Args:
        run: Folder of a run.
        report: Folder of a report on it; None: `report` next to it, if it is there.
        truth: Dataset or folder of annotations; None: what the report was made of.
        slides: Folder with the slides, where they were moved; None: as the run says.

    Raises:
        ConfigError: There is no such run, or what was named does not suit it.
    """
    run = files.absolute(run)
    settings = read_run(run)
    named = report is not None
    folder = files.absolute(report or files.join(run.rpartition("/")[0], "report"))
    metrics = _read_report(folder, settings, named=named)
    scores: dict[str, Row] = {}
    if metrics:
        table = files.read_table(files.join(folder, "per_slide.parquet"))
        scores = {row["slide"]: row for row in table.to_pylist()}
    source = files.absolute(truth) if truth else str(metrics.get("truth", ""))
    ground_truths: dict[str, list[str]] = {}
    kind = ""
    try:
        if source:
            ground_truths, kind = list_ground_truth(source, settings.classes)
    except MedrayError as error:
        if truth:
            raise
        log.warning("the report's truth is not shown: %s", error)
        source = ""
    moved = {file.slide: file.uri for file in find_slides([slides])} if slides else {}
    folder = folder if metrics else ""
    return ViewedRun(run, settings, folder, source, ground_truths, kind, scores, moved)


def _read_report(folder: str, settings: RunSettings, *, named: bool) -> Row:
    """Read the metrics of a report on this very run; empty when it is none."""
    uri = files.join(folder, "metrics.json")
    if not files.exists(uri):
        if named:
            raise ConfigError(
                f"{folder}: expected a report with a metrics.json; `medray evaluate` "
                f"writes one"
            )
        return {}
    metrics: Row = files.read_json(uri)
    if metrics.get("provenance", {}).get("run digest") == settings.digest():
        return metrics
    if named:
        raise ConfigError(f"{folder}: is a report on another run; evaluate this one")
    log.warning("%s is a report on another run and is not shown", folder)
    return {}


def read_rows(run: str) -> dict[str, Row]:
    """Read what a run says of its slides, those under way included.

    Returns:
        Rows by slide; `status` is done, failed or `under way`. Only slides.parquet
        says that a slide is done.
    """
    ledger = Ledger(run)
    rows = dict(ledger.slides)
    committed = {
        key.rpartition("@")[0]: len(regions) for key, regions in ledger.regions.items()
    }
    end = ".ome.zarr"
    for name in files.list_folder(files.join(run, "masks")):
        slide = name.strip("/").removesuffix(end)
        if name.strip("/").endswith(end) and not slide.endswith(".probabilities"):
            committed.setdefault(slide, 0)
    for slide, regions in committed.items():
        said = f"{regions} regions are committed so far"
        row = {"slide": slide, "status": "under way", "message": said, "uri": ""}
        rows.setdefault(slide, row | {"fingerprint": "", "digest": ""})
    return dict(sorted(rows.items()))


# --- a slide --------------------------------------------------------------------------


def source_of(viewed: ViewedRun, row: Row) -> SlideSource:
    """Find where a slide's pixels, mask and truth lie.

    Raises:
        MedrayError: Nothing states the size of the slide.
    """
    slide, settings = row["slide"], viewed.settings
    moved = name_in(slide, viewed.moved)
    uri = viewed.moved[moved] if moved else row["uri"]
    truth = viewed.truth_of(slide)
    common: Row = {"slide": slide, "uri": uri, "truth": truth}
    common |= {"kind": viewed.kind, "fingerprint": row["fingerprint"] or ""}
    common |= {"digest": row["digest"] or "", "version": version_of(row)}
    common |= {"scene": row.get("scene"), "plane": row.get("plane")}
    probabilities = ""
    if settings.options.prediction.probabilities:
        probabilities = probabilities_uri(viewed.uri, slide)
    uncertainty = ""
    if "uncertainty" in settings.layers:
        uncertainty = layer_uri(viewed.uri, slide, "uncertainty")
    layers: Row = {"probabilities": probabilities, "uncertainty": uncertainty}
    if row["status"] == "done":
        step = whole_step(row["downsample"] / row["scale"]) * row["scale"]
        return SlideSource(
            **common,
            height=row["level0_height"],
            width=row["level0_width"],
            mpp=row["mpp"] / row["downsample"] if row["mpp"] else None,
            mask=mask_uri(viewed.uri, slide),
            mask_step=step,
            mask_shape=(row["height"], row["width"]),
            **layers,
        )
    if row["status"] == "failed":
        opened = open_unchanged(SlideSource(**common, height=0, width=0, mpp=None))
        top = opened.levels[0]
        mpp = row.get("given_mpp") or opened.mpp
        return SlideSource(**common, height=top.height, width=top.width, mpp=mpp)
    return _under_way(viewed, common, layers)


def _under_way(viewed: ViewedRun, common: Row, layers: Row) -> SlideSource:
    """Place a slide of which there is no row yet, by the attributes of its mask."""
    slide = common["slide"]
    mask = mask_uri(viewed.uri, slide)
    told = group_attributes.read_attributes(mask)
    if not told:
        raise MedrayError(f"{mask}: not begun, or damaged; look again in a while")
    if viewed.settings.options.clean:  # the mask itself is written at the end
        mask = raw_uri(viewed.uri, slide)
    shape = ome_zarr.open_level(mask).shape
    step = whole_step(told["downsample"])
    common["digest"] = told["slide_digest"]
    common |= _chosen(told["slide_digest"])
    height, width = (math.ceil(n * step) for n in shape)
    if common["uri"]:
        opened = open_unchanged(SlideSource(**common, height=0, width=0, mpp=None))
        height, width = opened.levels[0].height, opened.levels[0].width
    return SlideSource(
        **common,
        height=height,
        width=width,
        mpp=told["mpp"] / step if told["mpp"] else None,
        mask=mask,
        mask_step=step,
        mask_shape=(shape[0], shape[1]),
        coarsest=ome_zarr.AT_ONCE - 1,
        **layers,
    )


def _chosen(digest: str) -> dict[str, int]:
    """Return the scene and the plane that a slide's digest names, if the user chose."""
    said = dict(part.partition("=")[::2] for part in digest.split("+")[1:])
    return {name: int(said[name]) for name in ("scene", "plane") if name in said}


def version_of(row: Row) -> str:
    """Return a version of what is shown of a slide: another version, other pixels."""
    parts = [row.get(key) for key in ("slide", "digest", "merkle_root", "committed_at")]
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()
