"""What a run will take, before it is started: `medray plan`.

Regions and windows come from headers and tissue thumbnails, the way `medray infer`
plans them; of many slides a sample is looked at. How long a window takes and what the
model needs is measured on one of the cluster's own GPU workers, or in this process.
Bounds on memory are sums of what may be held at once; the budget is what Ray has, which
follows the limits of the container rather than of the machine, or that limit itself.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from medray.datasets import with_overrides
from medray.errors import ConfigError, check_positive
from medray.execution import map_rows, settle_executor
from medray.inference.infer_run import settings_of, slides_within
from medray.inference.memory import kept_layers
from medray.inference.place import check_budget, measure_place
from medray.inference.plan import plan_slide
from medray.inference.regions import Within, wanted_windows
from medray.inference.run import Options, RunSettings
from medray.slides import (
    SlideFile,
    cache_bytes,
    copied_bytes,
    find_slides,
    fingerprint_of,
    open_slide,
)
from medray.storage import files
from medray.types import Executor

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will take.

    Attributes:
        out: Where the estimate is kept; "" if nowhere.
        slides: To do.
        sampled: How many of them were looked at; the rest is taken to be alike.
        regions: Regions with something to predict.
        windows: Windows to predict.
        gpu_workers: Devices that predict.
        window_s: Seconds of one GPU worker for a window, median of a short measurement.
        seconds: Least and most time of the stage.
        output_bytes: At most, if nothing could be compressed.
        host_bytes: Bound on the memory of all processes of a node together, or of this
            one.
        device_bytes: Peak of a GPU's memory; 0 without.
        store_bytes: Bound on what a node's object store holds at once; 0 without Ray.
        copied_bytes: Of all slides that are copied whole from an object store, to the
            nodes that read them; see medray.slides.cache.
        cache_bytes: Bound on these copies on a node at once.
        budget_bytes: Memory that Ray has on the smallest node, its store included; or
            that this machine or its container has.
        cost: Least and most, in the price's currency; None without a price.
        failed: Reason of each slide that cannot be planned, by slide.
    """

    out: str
    slides: int
    sampled: int
    regions: int
    windows: int
    gpu_workers: int
    window_s: float
    seconds: tuple[float, float]
    output_bytes: int
    host_bytes: int
    device_bytes: int
    store_bytes: int
    copied_bytes: int
    cache_bytes: int
    budget_bytes: int
    cost: tuple[float, float] | None
    failed: dict[str, str]

    def __str__(self) -> str:
        gib = 2**30
        least, most = self.seconds
        lines = [
            f"work     {self.regions} regions, {self.windows} windows at "
            f"{self.window_s * 1e3:.1f} ms on each of {self.gpu_workers} GPU workers",
            f"time     {least:.0f} to {most:.0f} s",
            f"memory   at most {self.host_bytes / gib:.1f} GiB a node, "
            f"{self.store_bytes / gib:.1f} GiB of it the object store; Ray has "
            f"{self.budget_bytes / gib:.1f} GiB",
        ]
        if self.device_bytes:
            lines.append(f"device   {self.device_bytes / gib:.1f} GiB")
        if self.copied_bytes:
            lines.append(
                f"copies   {self.copied_bytes / gib:.2f} GiB of slides whole from "
                f"their store, at most {self.cache_bytes / gib:.1f} GiB of them on a "
                f"node at once"
            )
        lines.append(
            f"output   at most {self.output_bytes / gib:.2f} GiB, usually a hundredth"
        )
        if self.cost:
            low, high = self.cost
            lines.append(
                f"cost     {low:.2f} to {high:.2f}, {low / self.slides:.4f} to "
                f"{high / self.slides:.4f} a slide"
            )
        lines += [f"failed   {name}: {why}" for name, why in self.failed.items()]
        lines.append(
            f"{self.slides} slides, {self.sampled} of them looked at, "
            f"{len(self.failed)} cannot be planned"
        )
        return "\n".join(lines)


def estimate(
    slides: Sequence[str],
    *,
    model: str | Sequence[str],
    options: Options | None = None,
    sample: int = 200,
    price: float | None = None,
    out: str = "",
    executor: Executor = "auto",
) -> Estimate:
    """Estimate a run without starting it.

    Args:
        slides: Files, globs, folders, s3:// or gs:// addresses, or a dataset.
        model: Model folder, as `medray train` writes it, or several: an ensemble.
        options: As for `medray.infer`.
        sample: Slides that are looked at, chosen by chance where there are more.
        price: Price of an hour of one GPU worker's machine.
        out: Folder of the run, to keep the estimate as plan.json; `medray infer`
            then reports how it compares.
        executor: Where the run would be: on a Ray cluster, or in this process.

    Raises:
        ConfigError: The request is wrong, or would need more memory than there is.
    """
    check_positive(price=price)
    options = options or Options()
    if options.coarse > 1:
        raise ConfigError("coarse: what its second pass will do is not known before")
    settings = settings_of([model] if isinstance(model, str) else model, options)
    named = with_overrides(
        find_slides(slides),
        mpp=options.mpp,
        scene=options.scene,
        plane=options.plane,
    )
    wanted, areas = slides_within(named, options.within)
    executor = settle_executor(executor, [slide.uri for slide in wanted])
    chosen = wanted
    if len(wanted) > sample:
        chosen = random.Random(0).sample(chosen, sample)
    plan = functools.partial(_plan, settings=settings, areas=areas)
    plans = dict(map_rows(plan, chosen, executor=executor))
    failed = {f.slide: f"{plans[f]}" for f in chosen if isinstance(plans[f], Exception)}
    counts = [plans[f] for f in chosen if not isinstance(plans[f], Exception)]
    if not counts:
        first = next(iter(failed.values()), "no slides")
        raise ConfigError(f"none of the slides can be planned; the first: {first}")
    place = measure_place(settings, executor)
    share = len(wanted) / len(chosen)
    windows = [found.windows for found in counts]
    total = sum(windows) * share
    # Twice the standard error of a total that is scaled up from a sample.
    unsure = 0.0
    if share > 1 and len(windows) > 1:
        unsure = 2 * statistics.stdev(windows) * math.sqrt(len(windows)) * share / total
    fastest = min(place.window_s) / place.gpu_workers
    slowest = max(place.window_s) / place.gpu_workers
    least = total * (1 - unsure) * fastest / place.efficiency[1]
    most = total * (1 + unsure) * slowest / place.efficiency[0]
    span = (least + place.start_s / 2, most + 2 * place.start_s)
    hours = [seconds * place.gpu_workers / 3600 for seconds in span]
    result = Estimate(
        out=files.absolute(out) if out else "",
        slides=len(wanted),
        sampled=len(chosen),
        regions=round(sum(found.regions for found in counts) * share),
        windows=round(total),
        gpu_workers=place.gpu_workers,
        window_s=statistics.median(place.window_s),
        seconds=span,
        output_bytes=round(sum(found.output_bytes for found in counts) * share),
        host_bytes=place.host_bytes,
        device_bytes=place.device_bytes,
        store_bytes=place.store_bytes,
        copied_bytes=copied_bytes(file.uri for file in wanted)[1],
        cache_bytes=cache_bytes(),
        budget_bytes=place.budget_bytes,
        cost=None if price is None else (hours[0] * price, hours[1] * price),
        failed=failed,
    )
    check_budget(place, executor)
    if out:
        files.write_json(files.join(out, "plan.json"), dataclasses.asdict(result))
    return result


@dataclass(frozen=True)
class _Planned:
    """What a slide takes.

    Attributes:
        regions: With something to predict.
        windows: To predict.
        output_bytes: That are stored, uncompressed.
    """

    regions: int
    windows: int
    output_bytes: int


def _plan(file: SlideFile, settings: RunSettings, areas: dict[str, str]) -> _Planned:
    """Return the estimate of one slide."""
    within = None
    if area := areas.get(file.slide):
        within = Within(area, file.uri, fingerprint_of(file.uri, area))
    with open_slide(file.uri, scene=file.scene, plane=file.plane) as slide:
        facts, planned = plan_slide(slide, settings, within=within, given_mpp=file.mpp)
    windows = [
        wanted_windows(facts.working, one.region, one.part, settings).sum()
        for one in planned
    ]
    pixels = sum(one.region.height * one.region.width for one in planned)
    return _Planned(
        regions=len(planned),
        windows=int(sum(windows)),
        output_bytes=pixels * kept_layers(settings) * 4 // 3,
    )
