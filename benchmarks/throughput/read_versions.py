r"""Reading slides by two versions of medray, in one process.

Two processes that run the same code differ by 15 % in what they take for JPEG tiles, by
where their memory happens to lie. So both versions are imported into one process, and
read the same rectangles in turn.

git worktree add ../before COMMIT
python benchmarks/read_versions.py --before ../before SLIDE.svs SLIDE.tiff
"""

import argparse
import datetime
import json
import platform
import random
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

OpenSlide = Any  # medray.open_slide of one of the versions


def load(checkout: Path) -> OpenSlide:
    """Import a version's open_slide; the modules of the other one stay in use."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "medray"]:
        del sys.modules[name]
    sys.path.insert(0, str(checkout.resolve()))
    try:
        from medray.slides import open_slide
    finally:
        sys.path.pop(0)
    found = Path(sys.modules["medray"].__file__ or "").resolve()
    if not found.is_relative_to(checkout.resolve()):
        raise SystemExit(f"{checkout}: expected a checkout of medray, found {found}")
    return open_slide


def measure(
    opens: dict[str, OpenSlide], path: str, side: int, rounds: int
) -> dict[str, Any]:
    """Return the quotients before / after of the CPU time of reading and opening."""
    slides = {name: open_it(path) for name, open_it in opens.items()}
    level = slides["after"].levels[0]
    side = min(side, level.height, level.width)
    reads = max(2, 24 * 512 * 512 // side**2)
    reading: dict[str, list[float]] = {name: [] for name in slides}
    opening: dict[str, list[float]] = {name: [] for name in slides}
    for k in range(rounds):
        rng = random.Random(k)
        places = [
            (rng.randint(0, level.height - side), rng.randint(0, level.width - side))
            for _ in range(reads)
        ]
        for name in sorted(slides, reverse=bool(k % 2)):
            start = time.process_time()
            for y, x in places:
                slides[name].read(y, x, side, side)
            reading[name].append(time.process_time() - start)
            start = time.process_time()
            opens[name](path).close()
            opening[name].append(time.process_time() - start)
    return {
        "slide": Path(path).name,
        "side": side,
        "reads": reads,
        "reading, before / after": quartiles(reading),
        "opening, before / after": quartiles(opening),
        "opening, ms": round(1e3 * statistics.median(opening["after"]), 2),
    }


def quartiles(seconds: dict[str, list[float]]) -> list[float]:
    pairs = zip(seconds["before"], seconds["after"], strict=True)
    return [round(q, 3) for q in statistics.quantiles([b / a for b, a in pairs], n=4)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("slides", nargs="+")
    parser.add_argument("--before", type=Path, required=True, help="another checkout")
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=21)
    args = parser.parse_args()
    opens = {"before": load(args.before), "after": load(Path(__file__).parents[1])}
    record = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("tifffile", "imagecodecs")},
    }
    print(json.dumps(record))
    for path in args.slides:
        for side in args.sides:
            print(json.dumps(measure(opens, path, side, args.rounds)), flush=True)


if __name__ == "__main__":
    main()
