"""Slides that only OpenSlide reads, from buckets: copied whole, bounded, shared."""

import functools
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import s3
import tifffile
from dicoms import Scan, picture, write_series
from read_copies import SIZE, copies, prepare, size_of, start_reader, upload
from several_files import write_mrxs, write_vms
from stages import empty_stage

import medray
from medray.errors import ConfigError, SlideError, StoreError
from medray.execution import scheduler, streamed
from medray.execution.commit import changed_slides
from medray.execution.gpu_worker import GpuWorker
from medray.execution.stage import plan_slide
from medray.execution.tasks import (
    FinishTask,
    Plan,
    PlannedRegion,
    PlannedSlide,
    RegionTask,
    SlideInput,
    SlideTask,
)
from medray.geometry import Rectangle
from medray.slides import cache
from medray.slides.bounds import scanned_bounds
from medray.slides.discovery import SlideFile, find_slides
from medray.slides.fingerprint import slide_digest
from medray.slides.members import slide_members
from medray.slides.opening import open_slide
from medray.storage import files, object_store, remote_files
from medray.storage.ledger import Ledger

pytest.importorskip("openslide")


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[s3.Proxy, dict[str, str]]]:
    with s3.serving() as (proxy, environment):
        yield proxy, environment


@pytest.fixture
def bucket(
    served: tuple[s3.Proxy, dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> Iterator[tuple[str, s3.Proxy]]:
    proxy, environment = served
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path / "cache"))
    object_store._bucket.cache_clear()
    proxy.heal()
    yield f"s3://bucket/{request.node.name.replace('[', '-').rstrip(']')}", proxy
    proxy.heal()
    object_store._bucket.cache_clear()


def limit(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setenv(cache.SIZE_VARIABLE, str(size / 2**30))


def write_all(folder: Path) -> None:
    write_mrxs(folder / "m.mrxs", picture(*SIZE))
    write_vms(folder / "v.vms", picture(*SIZE))
    write_series(folder / "case1", picture(*SIZE), Scan(parts=2))
    for seed in "bc":
        write_series(folder / "two", picture(*SIZE), Scan(seed=seed, suffix=""))


def test_slides_of_buckets_are_those_of_disks(
    bucket: tuple[str, s3.Proxy], tmp_path: Path
) -> None:
    address, proxy = bucket
    here = tmp_path / "slides"
    write_all(here)
    upload(here, address)
    there = find_slides([address])
    local = find_slides([f"{here}"])
    assert [file.slide for file in there] == [file.slide for file in local]
    assert len(there) == 5
    for ours, theirs in zip(there, local, strict=True):
        assert slide_digest(ours.uri) == slide_digest(theirs.uri)
        with open_slide(ours.uri) as a, open_slide(theirs.uri) as b:
            assert (a.levels, a.mpp, a.format) == (b.levels, b.mpp, b.format)
            for level, size in enumerate(a.levels):
                shape = size.height, size.width
                np.testing.assert_array_equal(
                    a.read(0, 0, *shape, level), b.read(0, 0, *shape, level)
                )
    # Each file was fetched once, apart from headers.
    before = proxy.fetched
    for file in there:
        open_slide(file.uri).close()
    headers = 5 * (64 << 10) * 8
    assert proxy.fetched - before < headers
    assert cache.copied_bytes(file.uri for file in there) == (
        5,
        sum(size_of(file.uri) for file in there),
    )
    # A series by its address, by a file of it, and by a glob.
    uid = Scan(seed="b").uid
    assert [f.uri for f in find_slides([f"{address}/two/{uid}"])] == [
        f"{address}/two/{uid}"
    ]
    assert [f.uri for f in find_slides([f"{address}/case1/*.dcm"])] == [
        f"{address}/case1"
    ]


def test_what_is_missing_in_a_bucket_is_named(
    bucket: tuple[str, s3.Proxy], tmp_path: Path
) -> None:
    address, _ = bucket
    write_all(tmp_path / "slides")
    upload(tmp_path / "slides", address)
    files.remove(f"{address}/m/Data0001.dat")
    files.remove(f"{address}/v-map.jpg")
    for name, missing in (("m.mrxs", "m/Data0001.dat"), ("v.vms", "v-map.jpg")):
        with pytest.raises(SlideError, match=f"{address}/{missing} is missing"):
            open_slide(f"{address}/{name}")
    for name in ("none.mrxs", "none.vms", "none.dcm", "none"):
        with pytest.raises(SlideError, match="no such file"):
            open_slide(f"{address}/{name}")


@pytest.mark.parametrize("name", ["bad.dcm", "README"])
def test_an_object_that_is_forbidden_costs_at_most_a_row(
    bucket: tuple[str, s3.Proxy],
    tmp_path: Path,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    address, proxy = bucket
    here = tmp_path / "slides"
    write_series(here / "case1", picture(*SIZE))
    (here / name).write_text("no slide" * 100)
    upload(here, address)
    proxy.closed = f"/{name}"
    found = {file.slide: file.uri for file in find_slides([address])}
    refused = {"bad": f"{address}/bad.dcm"} if name == "bad.dcm" else {}
    assert found == {"case1": f"{address}/case1"} | refused
    for uri in refused.values():
        with pytest.raises(
            StoreError, match=r"bad\.dcm: cannot be read.*check the cred"
        ):
            open_slide(uri)
    assert (f"{address}/{name}: cannot be read" in caplog.text) == (not refused)
    proxy.expired = True
    with pytest.raises(StoreError, match="cannot be read"):
        find_slides([address])


def test_a_replaced_object_is_fetched_again(
    bucket: tuple[str, s3.Proxy], tmp_path: Path
) -> None:
    address, _ = bucket
    for seed in (1, 2):
        folder = tmp_path / f"slides{seed}"
        write_mrxs(folder / "m.mrxs", picture(*SIZE, seed))
        upload(folder, address)
        with open_slide(f"{address}/m.mrxs") as slide:
            off = slide.read(0, 0, *SIZE).astype(int) - picture(*SIZE, seed)
            assert np.abs(off).max() <= 8
    # Replaced while it is copied: neither the old nor the new, nor a mixture.
    upload(tmp_path / "slides1", address)
    members = slide_members(f"{address}/m.mrxs")
    for copy in copies(tmp_path):
        files.remove(f"{copy}")
    files.write_bytes(members[-1].uri, b"x" * members[-1].size)
    with pytest.raises(SlideError, match="changed while it was copied"):
        with cache.local_copy(members):
            pass
    assert copies(tmp_path) == []


def test_what_was_used_longest_ago_makes_room(
    bucket: tuple[str, s3.Proxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, proxy = bucket
    for seed in range(3):
        write_mrxs(tmp_path / "slides" / f"m{seed}.mrxs", picture(*SIZE, seed))
    upload(tmp_path / "slides", address)
    uris = [f"{address}/m{seed}.mrxs" for seed in range(3)]
    limit(monkeypatch, sum(map(size_of, uris)) - 1)  # room for two
    slides = [open_slide(uri) for uri in uris[:2]]
    assert len(copies(tmp_path)) == 2
    slides[0].read(0, 0, 8, 8)  # now the other is the older
    slides.append(open_slide(uris[2]))
    assert len(copies(tmp_path)) == 2
    assert sum(int(c.name.rpartition("-")[2]) for c in copies(tmp_path)) < (
        cache.cache_bytes()
    )
    before = proxy.fetched
    slides[0].read(0, 0, 8, 8)
    assert proxy.fetched == before
    # A slide that lost its copy while it was open has it made again.
    for _ in range(2):
        for seed, slide in enumerate(slides):
            off = slide.read(0, 0, *SIZE).astype(int) - picture(*SIZE, seed)
            assert np.abs(off).max() <= 8
            assert len(copies(tmp_path)) == 2
    assert proxy.fetched > before


def test_a_copy_that_is_read_stays(
    bucket: tuple[str, s3.Proxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, _ = bucket
    for seed in range(2):
        write_mrxs(tmp_path / "slides" / f"m{seed}.mrxs", picture(*SIZE, seed))
    upload(tmp_path / "slides", address)
    held, other = (slide_members(f"{address}/m{seed}.mrxs") for seed in range(2))
    limit(monkeypatch, size_of(f"{address}/m0.mrxs") * 3 // 2)
    monkeypatch.setattr(cache, "_WAIT_S", 0.5)
    with cache.local_copy(held) as path:
        with pytest.raises(StoreError, match=r"in use for.*MEDRAY_SLIDE_CACHE_GIB"):
            with cache.local_copy(other):
                pass
        assert path.is_file()
        # A waiting process gets the room as soon as no process reads.
        monkeypatch.setattr(cache, "_WAIT_S", 60.0)
        there: list[Path] = []

        def wait() -> None:
            with cache.local_copy(other) as copy:
                there.append(copy)

        waiting = threading.Thread(target=wait)
        waiting.start()
    waiting.join()
    assert there
    assert not path.is_file()


def test_a_slide_larger_than_the_cache_is_refused_with_sizes(
    bucket: tuple[str, s3.Proxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, proxy = bucket
    write_mrxs(tmp_path / "slides" / "m.mrxs", picture(*SIZE))
    upload(tmp_path / "slides", address)
    limit(monkeypatch, size_of(f"{address}/m.mrxs") - 1)
    before = proxy.fetched
    with pytest.raises(SlideError, match=r"m\.mrxs: its 6 files have .* GiB.*may have"):
        open_slide(f"{address}/m.mrxs")
    assert proxy.fetched - before < 64 << 10
    for wrong in ("0", "-1", "much", "nan", "inf"):
        monkeypatch.setenv(cache.SIZE_VARIABLE, wrong)
        with pytest.raises(ConfigError, match=f"{wrong!r}, expected a positive"):
            open_slide(f"{address}/m.mrxs")


def test_a_full_or_closed_disk_is_said_with_sizes(
    bucket: tuple[str, s3.Proxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, _ = bucket
    write_mrxs(tmp_path / "slides" / "m.mrxs", picture(*SIZE))
    upload(tmp_path / "slides", address)

    class Full:
        free = 1000

    with monkeypatch.context() as patched:
        patched.setattr(cache.shutil, "disk_usage", lambda _: Full)
        with pytest.raises(StoreError, match=r"needs .* GiB, the disk .* free"):
            open_slide(f"{address}/m.mrxs")
    # It fills up while the copy is made: a real write beyond a real limit.
    script = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "from medray.slides import open_slide\n"
        "open_slide(sys.argv[1])\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, f"{address}/m.mrxs"],
        capture_output=True,
        text=True,
    )
    assert "StoreError" in ended.stderr
    assert "the slide has" in ended.stderr
    assert "free" in ended.stderr
    assert copies(tmp_path) == []
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.raises(StoreError, match=r"cannot be written.*MEDRAY_SLIDE_CACHE"):
        open_slide(f"{address}/m.mrxs")


def test_large_objects_are_copied_in_parts(
    bucket: tuple[str, s3.Proxy], tmp_path: Path
) -> None:
    address, _ = bucket
    data = np.random.default_rng(0).bytes((150 << 20) + 12345)
    for name, content in (("large", data), ("empty", b"")):
        files.write_bytes(f"{address}/{name}", content)
        parts = [*remote_files.download(f"{address}/{name}", f"{tmp_path}/{name}")]
        assert (sum(parts), len(parts) > 5) == (len(content), name == "large")
        assert (tmp_path / name).read_bytes() == content
    with pytest.raises(FileNotFoundError):
        next(remote_files.download(f"{address}/none", f"{tmp_path}/none"))


def test_a_copy_says_that_it_goes_on(
    bucket: tuple[str, s3.Proxy], tmp_path: Path
) -> None:
    address, _ = bucket
    here = tmp_path / "slides"
    write_mrxs(here / "m.mrxs", picture(*SIZE))
    with (here / "m" / "Data0001.dat").open("ab") as data:
        data.truncate(100 << 20)
    tifffile.imwrite(here / "x.tif", picture(*SIZE), tile=(256, 256))
    upload(here, address)
    uri = f"{address}/m.mrxs"
    assert [*cache.fetch_if_copied(f"{here}/m.mrxs")] == []
    assert [*cache.fetch_if_copied(f"{address}/x.tif")] == []
    assert [*cache.fetch_if_copied(f"{address}/none.mrxs")] == []
    # Of a TIFF whose tiles only OpenSlide puts together the header tells.
    trestle = tmp_path / "trestle" / "t.tif"
    trestle.parent.mkdir()
    tifffile.imwrite(trestle, picture(*SIZE), tile=(256, 256), software="MedScan 1")
    upload(trestle.parent, address)
    assert len([*cache.fetch_if_copied(f"{address}/t.tif")]) == 1
    shutil.rmtree(tmp_path / "cache")
    making = cache.fetch_if_copied(uri)
    for _ in range(3):
        next(making)
    assert copies(tmp_path)[0].suffix == ".new"
    # Who waits for it sees it grow, as long as it does.
    seen: list[int] = []

    def wait() -> None:
        for _ in cache.fetch_if_copied(uri):
            seen.append(len(seen))

    waiting = threading.Thread(target=wait)
    waiting.start()
    for _ in range(50):
        if seen:
            break
        waiting.join(0.1)
    assert seen == [0]
    parts = sum(1 for _ in making)
    waiting.join()
    assert parts >= 6
    (made,) = copies(tmp_path)
    assert made.is_dir()
    assert made.suffix != ".new"
    assert [*cache.fetch_if_copied(uri)] == []


def test_who_has_a_limit_has_the_copy_made_before(
    bucket: tuple[str, s3.Proxy],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address, _ = bucket
    (uri,) = prepare(address, tmp_path / "slides", 1)
    source = SlideInput(SlideFile("m0", uri))
    slide = PlannedSlide(source, "d", None, 1, 1, copied=True)
    task = RegionTask(slide, PlannedRegion(0, Rectangle(0, 0, 1, 1), None))
    monkeypatch.setattr(scheduler, "bound_memory", lambda: None)

    def made(*_: Any) -> str:
        (copy,) = copies(tmp_path)
        return "there" if copy.suffix != ".new" else "not yet"

    for name in ("plan_slide", "finish_slide", "do_region"):
        for module in (scheduler, streamed):
            monkeypatch.setattr(module, name, made, raising=False)
    stage: Any = SimpleNamespace(device=None)
    gpu_worker: Any = SimpleNamespace(_loading=Future(), _group=1)
    gpu_worker._loading.set_result(None)
    gpu_worker._work = lambda tasks: iter([made() for _ in tasks])
    worker = scheduler.SlideWorker(stage)

    def stream(tasks: list[Any]) -> Iterator[list[Any]]:
        """As `medray.execution.feed` does it: each yield says that it goes on."""
        steps = streamed.do_task(stage, tasks[0])
        while True:
            try:
                next(steps)
            except StopIteration as end:
                found = end.value
                yield [found.plan if isinstance(tasks[0], SlideTask) else found]
                return
            yield []

    for work, given in (
        (worker.work, SlideTask(source)),
        (worker.work, FinishTask(slide, {})),
        (stream, SlideTask(source)),
        (stream, FinishTask(slide, {})),
        (stream, task),
        (functools.partial(GpuWorker.work, gpu_worker), task),
    ):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        *before, result = work([given])
        assert result == ["there"]
        assert len(before) >= 6
        assert not any(before)


def test_the_row_of_a_copied_slide_says_so(
    bucket: tuple[str, s3.Proxy], tmp_path: Path
) -> None:
    address, _ = bucket
    prepare(address, tmp_path / "slides", 1)
    for items, said in (([address], True), ([f"{tmp_path}/slides"], False)):
        ledger = Ledger(out := f"{tmp_path}/out{said}")
        (task,) = changed_slides(find_slides(items), ledger)
        region = PlannedRegion(0, Rectangle(0, 0, 1, 1), None)
        plan = plan_slide(empty_stage(out, [region]), task)
        assert isinstance(plan, Plan)
        assert [one.slide.copied for one in plan.todo] == [said]
        ledger.close()


def test_check_says_what_it_copies(
    bucket: tuple[str, s3.Proxy], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    address, _ = bucket
    prepare(address, tmp_path / "slides", 2)
    with caplog.at_level("INFO"):
        checked = medray.check([address])
    assert [row["status"] for row in checked.slides] == ["ok", "ok"]
    assert "2 slides, " in caplog.text
    assert "are copied whole from their store" in caplog.text


def test_bounds_are_those_of_a_disk(
    bucket: tuple[str, s3.Proxy], tmp_path: Path
) -> None:
    address, _ = bucket
    write_mrxs(tmp_path / "slides" / "m.mrxs", picture(*SIZE))
    upload(tmp_path / "slides", address)
    size = {"height": SIZE[0], "width": SIZE[1]}
    there = scanned_bounds(f"{address}/m.mrxs", **size)
    assert there == scanned_bounds(f"{tmp_path}/slides/m.mrxs", **size)


def test_processes_share_a_cache_that_is_too_small(
    bucket: tuple[str, s3.Proxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, _ = bucket
    uris = prepare(address, tmp_path / "slides", 4)
    most = max(map(size_of, uris)) * 5 // 2  # room for two of four
    limit(monkeypatch, most)
    readers = [start_reader(uris, seed) for seed in range(4)]
    ended: list[Any] = [reader.communicate() for reader in readers]
    assert [out.strip() for out, _ in ended] == ["right"] * 4, ended
    assert 0 < sum(int(c.name.rpartition("-")[2]) for c in copies(tmp_path)) <= most


def test_processes_fetch_a_slide_once(
    bucket: tuple[str, s3.Proxy], tmp_path: Path
) -> None:
    address, proxy = bucket
    (uri,) = prepare(address, tmp_path / "slides", 1)
    before = proxy.fetched
    readers = [start_reader([uri], seed) for seed in range(3)]
    ended = [reader.communicate() for reader in readers]
    assert [out.strip() for out, _ in ended] == ["right"] * 3, ended
    ini = (tmp_path / "slides" / "m0" / "Slidedat.ini").stat().st_size
    assert proxy.fetched - before <= size_of(uri) + 3 * 2 * ini
