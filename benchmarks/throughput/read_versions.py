r"""Reading slides by two versions of medray, in one process.

Two processes that run the same code differ by 15 % in what they take for JPEG tiles, by
where their memory happens to lie. So both versions are imported into one process, and
read the same rectangles in turn.

git worktree add ../before COMMIT
python -m benchmarks.throughput.read_versions --before ../before \
    --slides SLIDE.svs SLIDE.tiff
"""

import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import harness

OpenSlide = Any  # medray.open_slide of one of the versions


def load(checkout: Path) -> OpenSlide:
    """Import a version's open_slide; the modules of the other one stay in use."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "medray"]:
        del sys.modules[name]
    sys.path.insert(0, str(checkout.resolve()))
    try:
        from medray.slides.opening import open_slide
    finally:
        sys.path.pop(0)
    found = Path(sys.modules["medray"].__file__ or "").resolve()
    if not found.is_relative_to(checkout.resolve()):
        raise SystemExit(f"{checkout}: expected a checkout of medray, found {found}")
    return open_slide


def measure(
    opens: dict[str, OpenSlide], path: str, side: int, rounds: int
) -> harness.Rounds:
    """Return the CPU time of reading and of opening, by version."""
    slides = {name: open_it(path) for name, open_it in opens.items()}
    level = slides["after"].levels[0]
    side = min(side, level.height, level.width)
    reads = max(2, 24 * 512 * 512 // side**2)
    found = harness.Rounds(
        "after", {"slide": Path(path).name, "side": side, "reads": reads}
    )
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
            read = time.process_time() - start
            start = time.process_time()
            opens[name](path).close()
            opened = time.process_time() - start
            found.add(name, **{"reading, ms": 1e3 * read, "opening, ms": 1e3 * opened})
    return found


def main(
    slides: tuple[str, ...],
    before: Path,
    sides: tuple[int, ...] = (512, 2048),
    rounds: int = 21,
) -> Iterator[harness.Result]:
    """Compare the CPU time of reading slides by another checkout and by this one.

    Args:
        slides: Files.
        before: The other checkout.
        sides: Of the regions, pixels.
        rounds: Number of rounds.
    """
    opens = {"before": load(before), "after": load(harness.ROOT)}
    for path in slides:
        for side in sides:
            yield measure(opens, path, side, rounds)


if __name__ == "__main__":
    harness.run(main)
