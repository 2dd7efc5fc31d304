"""Files that all tests share: made once, by whichever process comes first.

They lie outside the folders of pytest's workers, in `.pytest_cache/made/DIGEST/NAME`,
where DIGEST is of all that makes them, so that `make test` and `make test-slow` share
them too. Nothing may write into them: a fixture that gives them checks it at its end.
"""

import functools
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
_DAY_S = 24 * 3600


@functools.cache
def digest_of_sources() -> str:
    """Return a digest of the package, of these helpers and of the pinned packages."""
    digest = hashlib.sha256()
    sources = [
        *ROOT.joinpath("medray").rglob("*.py"),
        *Path(__file__).parent.glob("*.py"),
    ]
    for path in [*sorted(sources), ROOT / "constraints.txt"]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """Return the folder `name`; the first process that asks calls `make` to fill it.

    Args:
        name: What it is called below the folder of this version of the sources.
        make: Called with an empty folder. If it raises, the next process tries again.
    """
    made = ROOT / ".pytest_cache" / "made"
    version = made / digest_of_sources()
    version.mkdir(parents=True, exist_ok=True)
    # Not renamed when it is complete: what is made may hold its own addresses.
    folder, complete = version / name, version / f"{name}.complete"
    with FileLock(version / f"{name}.lock"):
        if not complete.exists():
            _remove_old(made)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            complete.touch()
    os.utime(version)
    return folder


def unchanged(folder: Path) -> Iterator[Path]:
    """Yield a shared folder to tests; fail if they wrote into it."""
    before = _contents(folder)
    yield folder
    after = _contents(folder)
    changed = {path for path, _ in before.items() ^ after.items()}
    assert not changed, f"tests wrote into {folder}: {sorted(changed)}"


def _contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of change of each file, by path."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            status = path.stat()
            found[str(path)] = (status.st_size, status.st_mtime_ns)
    return found


def _remove_old(made: Path) -> None:
    """Remove what versions made that were not used for a day."""
    for version in made.iterdir():
        if version.stat().st_mtime < time.time() - _DAY_S:
            shutil.rmtree(version, ignore_errors=True)
