"""Slides in a bucket, and processes that read their copies by chance."""

import json
import os
import subprocess
import sys
from pathlib import Path

from dicoms import picture
from several_files import write_mrxs

from medray.slides.members import slide_members
from medray.storage import files

SIZE = (512, 768)


def upload(folder: Path, address: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            files.write_bytes(files.join(address, name), path.read_bytes())


def copies(tmp_path: Path) -> list[Path]:
    """What lies in the cache, apart from its locks."""
    root = tmp_path / "cache"
    return sorted(p for p in root.iterdir() if p.suffix != ".lock")


def size_of(uri: str) -> int:
    return sum(member.size for member in slide_members(uri))


_READER = """
import json, random, sys
import numpy as np
from dicoms import picture
from read_copies import SIZE
from medray.slides import open_slide
uris, seed = json.loads(sys.argv[1]), int(sys.argv[2])
chance = random.Random(seed)
slides = {}
for turn in range(25):
    number = chance.randrange(len(uris))
    if number not in slides or chance.random() < 0.2:
        slides[number] = open_slide(uris[number])
    y, x = chance.randrange(400), chance.randrange(600)
    part = slides[number].read(y, x, 100, 150).astype(int)
    off = np.abs(part - picture(*SIZE, number)[y : y + 100, x : x + 150])
    assert off.max() <= 8, (number, off.max())
print("right")
"""


def start_reader(uris: list[str], seed: int) -> subprocess.Popen[str]:
    """Read places of slides by chance in a process, and compare their pixels."""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", _READER, json.dumps(uris), str(seed)],
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def prepare(address: str, folder: Path, count: int) -> list[str]:
    for seed in range(count):
        write_mrxs(folder / f"m{seed}.mrxs", picture(*SIZE, seed))
    upload(folder, address)
    return [f"{address}/m{seed}.mrxs" for seed in range(count)]
