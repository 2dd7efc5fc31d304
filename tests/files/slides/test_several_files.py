"""Slides of several files: found as one, known by all of them, refused if one lacks."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from dicoms import picture
from several_files import write_mrxs, write_vms
from stages import empty_stage

from medray.apps.nightly.inbox import Watch, plan_night
from medray.errors import SlideError
from medray.execution.commit import changed_slides
from medray.execution.stage import plan_slide
from medray.execution.tasks import NotPlanned
from medray.slides.discovery import find_slides
from medray.slides.fingerprint import slide_digest, slide_fingerprint
from medray.slides.members import slide_members
from medray.slides.opening import open_slide
from medray.storage import files
from medray.storage.ledger import Ledger

pytest.importorskip("openslide")

MIB = 1 << 20
WRITERS = {"x.mrxs": write_mrxs, "x.vms": write_vms}


@pytest.fixture(params=WRITERS)
def slide(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "slides" / request.param
    WRITERS[request.param](path, picture(512, 768))
    return path


def members(slide: Path) -> list[Path]:
    return [Path(member.uri) for member in slide_members(f"{slide}")]


def test_its_pixels_are_those_that_were_written(slide: Path) -> None:
    with open_slide(slide) as opened:
        whole = opened.read(0, 0, 512, 768).astype(int)
        assert np.abs(whole - picture(512, 768)).max() <= 8
        assert opened.mpp == pytest.approx(0.5)
    with pytest.raises(SlideError, match="only OpenSlide reads it"):
        open_slide(slide, reader="tifffile")


def test_it_is_found_as_one(slide: Path) -> None:
    (found,) = find_slides([f"{slide.parent}"])
    assert (found.slide, found.uri, found.path) == ("x", f"{slide}", slide.name)
    # All files that were written belong to it.
    written = {path for path in slide.parent.rglob("*") if path.is_file()}
    assert set(members(slide)) == written
    assert members(slide)[0] == slide


def test_a_picture_beside_a_vms_is_a_slide_of_its_own(tmp_path: Path) -> None:
    write_vms(tmp_path / "x.vms", picture(512, 768))
    (tmp_path / "x-image.jpg").rename(tmp_path / "y.jpg")
    # Also while the slide is not complete, or is damaged, its files are none.
    assert [file.slide for file in find_slides([f"{tmp_path}"])] == ["x", "y"]
    (tmp_path / "x.vms").write_bytes(
        (tmp_path / "x.vms").read_bytes().replace(b"[Virtual", b"\xff\0irtual")
    )
    assert [file.slide for file in find_slides([f"{tmp_path}"])] == ["x", "y"]
    named = find_slides([f"{tmp_path}/x.vms", f"{tmp_path}/x-map.jpg"])
    assert {file.slide for file in named} == {"x", "x-map"}


def test_each_of_its_files_that_is_missing_is_named(slide: Path) -> None:
    for path in members(slide):
        path.rename(path.with_name("away"))
        for look in (open_slide, slide_digest):
            with pytest.raises(SlideError, match=path.name) as raised:
                look(f"{slide}")
            assert str(slide) in str(raised.value)
        if path != slide:
            ledger = Ledger(f"{slide.parent.parent}/out")
            (task,) = changed_slides(find_slides([f"{slide}"]), ledger)
            plan = plan_slide(empty_stage("out", []), task)
            assert isinstance(plan, NotPlanned)
            assert path.name in plan.failure.why
        path.with_name("away").rename(path)
    assert slide_digest(f"{slide}")


def test_each_of_its_files_that_is_replaced_makes_it_another(slide: Path) -> None:
    digest, fingerprint = slide_digest(f"{slide}"), slide_fingerprint(f"{slide}")
    assert (slide_digest(f"{slide}"), slide_fingerprint(f"{slide}")) == (
        digest,
        fingerprint,
    )
    for path in members(slide):
        data, status = path.read_bytes(), path.stat()
        changed = bytearray(data)
        changed[-1] ^= 1
        path.write_bytes(changed)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert slide_digest(f"{slide}") != digest
        path.write_bytes(data)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
        assert slide_digest(f"{slide}") == digest
        assert slide_fingerprint(f"{slide}") != fingerprint
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert slide_fingerprint(f"{slide}") == fingerprint


def test_files_that_change_places_make_another_slide(tmp_path: Path) -> None:
    write_mrxs(tmp_path / "x.mrxs", picture(512, 768))
    digest = slide_digest(f"{tmp_path}/x.mrxs")
    first, second = (tmp_path / "x" / f"Data000{i}.dat" for i in range(2))
    first.rename(tmp_path / "other")
    second.rename(first)
    (tmp_path / "other").rename(second)
    assert slide_digest(f"{tmp_path}/x.mrxs") != digest


def test_a_moved_slide_is_the_same(slide: Path) -> None:
    digest, fingerprint = slide_digest(f"{slide}"), slide_fingerprint(f"{slide}")
    moved = slide.parent.rename(slide.parent.parent / "moved") / slide.name
    assert (slide_digest(f"{moved}"), slide_fingerprint(f"{moved}")) == (
        digest,
        fingerprint,
    )


def test_large_files_are_known_at_a_bounded_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, size = 40, 300 * MIB
    write_mrxs(tmp_path / "x.mrxs", picture(512, 768), files=count)
    data = [tmp_path / "x" / f"Data{i:04}.dat" for i in range(count)]
    for path in data:
        os.truncate(path, size)
    read: list[int] = []

    def counted(uri: str, starts: Any, lengths: Any) -> list[bytes]:
        read.extend(lengths)
        return [bytes(min(length, 4096)) for length in lengths]

    whole = files.read_ranges
    monkeypatch.setattr(files, "read_ranges", counted)
    slide_digest(f"{tmp_path}/x.mrxs")
    assert sum(read) <= 64 * MIB + 2 * MIB * len(slide_members(f"{tmp_path}/x.mrxs"))
    monkeypatch.setattr(files, "read_ranges", whole)
    digest = slide_digest(f"{tmp_path}/x.mrxs")
    for place in (0, size - 1):  # of each file at least its ends count
        with open(data[7], "r+b") as file:
            file.seek(place)
            before = file.read(1)
            file.seek(place)
            file.write(bytes([before[0] ^ 1]))
        after = slide_digest(f"{tmp_path}/x.mrxs")
        assert after != digest
        digest = after


@pytest.mark.parametrize("size", [0, 1000, 64 * MIB, 64 * MIB + 1, 200 * MIB + 12345])
def test_the_digest_of_one_file_is_what_it_always_was(
    tmp_path: Path, size: int
) -> None:
    import hashlib

    path = tmp_path / "x.tif"
    with open(path, "wb") as file:
        file.truncate(size)
        for place in range(0, size, 7 * MIB + 3):
            file.seek(place)
            file.write(str(place).encode()[: size - place])
    data = path.read_bytes()
    parts = [data]
    if size > 64 * MIB:
        step = (size - MIB) // 63
        starts = [*(i * step for i in range(63)), size - MIB]
        parts = [data[start : start + MIB] for start in starts]
    text = b"".join(parts) + str(size).encode()
    named = hashlib.blake2b(text, digest_size=16).hexdigest()
    assert slide_digest(f"{path}") == f"blake2b:{named}"
    status = path.stat()
    assert slide_fingerprint(f"{path}") == f"{status.st_size} {status.st_mtime}"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("FILE_1 = Data0001.dat", "FILE_1 = ../Data0001.dat", "in the same folder"),
        ("FILE_1 = Data0001.dat", r"FILE_1 = a\b.dat", "in the same folder"),
        ("INDEXFILE = Index.dat", "INDEXFILE = ..", "in the same folder"),
        ("FILE_1 = Data0001.dat", "FILE_1 =", "in the same folder"),
        ("FILE_COUNT = 3", "FILE_COUNT = 1000000000", "FILE_COUNT is 1000000000"),
        ("FILE_COUNT = 3", "FILE_COUNT = three", "it is damaged, copy it again"),
        ("FILE_COUNT = 3", "FILE_COUNT = 4", "FILE_3"),
        ("[DATAFILE]", "[DATA]", "DATAFILE"),
        ("[GENERAL]", "GENERAL", "expected sections and keys"),
        ("[GENERAL]", "\0\0\0", "expected sections and keys"),
    ],
)
def test_a_damaged_slidedat_is_refused(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    write_mrxs(tmp_path / "x.mrxs", picture(512, 768))
    ini = tmp_path / "x" / "Slidedat.ini"
    text = ini.read_text()
    assert old in text
    ini.write_text(text.replace(old, new))
    for look in (open_slide, slide_digest, slide_fingerprint):
        with pytest.raises(SlideError, match=r"Slidedat\.ini.*" + said):
            look(f"{tmp_path}/x.mrxs")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[HIERARCHICAL]", "= 7\n[HIERARCHICAL]"),
        ("FILE_1 =", "   FILE_1="),
        ("[DATAFILE]", "\n# note\n[DATAFILE]\nFILE_1 = Data0001.dat\nOTHER"),
    ],
)
def test_a_slidedat_may_be_untidy(tmp_path: Path, old: str, new: str) -> None:
    write_mrxs(tmp_path / "x.mrxs", picture(512, 768))
    ini = tmp_path / "x" / "Slidedat.ini"
    ini.write_text(ini.read_text().replace(old, new))
    assert len(slide_members(f"{tmp_path}/x.mrxs")) == 6


def test_a_vms_without_images_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.vms"
    path.write_text("[Other]\nImageFile=a.jpg\n")
    with pytest.raises(SlideError, match=r"x\.vms: expected \[Virtual Micro.*Other"):
        open_slide(path)


def test_a_night_takes_it_when_all_files_are_there(slide: Path) -> None:
    inbox = slide.parent
    watch = Watch(inbox=f"{inbox}", out=f"{inbox.parent}/out", models=(), settle=0.0)
    last = members(slide)[-1]
    last.rename(inbox.parent / "arriving")
    first = plan_night(watch, {}, "2026-01-01")
    assert first["slides"] == []
    assert last.name in first["left_out"][slide.name]
    (inbox.parent / "arriving").rename(last)
    second = plan_night(watch, {}, "2026-01-02")
    (planned,) = second["slides"]
    assert (planned["file"], second["left_out"]) == (slide.name, {})
    json.dumps(second)


def test_a_night_leaves_a_slide_whose_file_grows(
    slide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = members(slide)[-1]

    def grow(_: float) -> None:
        with open(last, "ab") as file:
            file.write(b"more")

    monkeypatch.setattr("medray.apps.nightly.inbox.time.sleep", grow)
    watch = Watch(inbox=f"{slide.parent}", out=f"{slide.parent.parent}/o", models=())
    plan = plan_night(watch, {}, "2026-01-01")
    assert (plan["slides"], list(plan["left_out"])) == ([], [slide.name])


def test_an_ome_tiff_with_a_companion_file_is_refused(tmp_path: Path) -> None:
    xml = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/'
        '2016-06" UUID="urn:uuid:1"><BinaryOnly MetadataFile="x.companion.ome" '
        'UUID="urn:uuid:2"/></OME>'
    )
    path, options = tmp_path / "x.ome.tif", {"photometric": "rgb", "metadata": None}
    tifffile.imwrite(path, picture(96, 96), description=xml, **options)
    with pytest.raises(SlideError, match=r"x\.companion\.ome.*one OME-TIFF"):
        open_slide(path)
