"""Processes that are killed while they copy a slide, or read a copy."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import s3
from dicoms import picture
from read_copies import SIZE, copies, prepare, size_of, start_reader

from medray.slides import cache
from medray.slides.opening import open_slide
from medray.storage import object_store

pytest.importorskip("openslide")


@pytest.fixture
def bucket(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[tuple[str, s3.Proxy]]:
    with s3.serving() as (proxy, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path / "cache"))
        yield "s3://bucket/slides", proxy


def test_what_killed_processes_leave_is_never_read_and_makes_room(
    bucket: tuple[str, s3.Proxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, proxy = bucket
    uris = prepare(address, tmp_path / "slides", 3)
    most = max(map(size_of, uris)) * 3 // 2  # room for one
    monkeypatch.setenv(cache.SIZE_VARIABLE, str(most / 2**30))
    unfinished = 0
    for turn in range(10):
        proxy.delay = 0.05
        before = proxy.requests
        readers = [start_reader(uris, seed) for seed in (turn, turn + 100)]
        # After another request each time: while files are looked at, copied, read.
        while proxy.requests < before + 3 * turn + 1:
            assert any(reader.poll() is None for reader in readers)
            time.sleep(0.005)
        for reader in readers:
            reader.kill()
            reader.communicate()
        root = tmp_path / "cache"
        unfinished += root.is_dir() and any(
            p.suffix == ".new" for p in copies(tmp_path)
        )
        proxy.delay = 0.0
        seed = turn % 3
        with open_slide(uris[seed]) as slide:
            off = slide.read(0, 0, *SIZE).astype(int) - picture(*SIZE, seed)
            assert np.abs(off).max() <= 8
        (kept,) = copies(tmp_path)
        stored = sum(p.stat().st_size for p in kept.rglob("*") if p.is_file())
        assert stored == size_of(uris[seed]) == int(kept.name.rpartition("-")[2])
    assert unfinished >= 3
    object_store._bucket.cache_clear()
