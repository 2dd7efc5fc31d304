"""What stands between slides: files that cannot be read, bombs, folders of globs."""

import logging
import resource
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
import tifffile
from dicoms import Scan, picture, write_ct, write_series
from pydicom.uid import DeflatedExplicitVRLittleEndian
from several_files import write_mrxs, write_vms

import medray
from medray.errors import ConfigError, SlideError, StoreError
from medray.slides import dicom, dicom_header
from medray.slides.discovery import find_slides
from medray.slides.listing import find_files
from medray.slides.opening import open_slide
from medray.storage import files, object_store

SIZE = (512, 768)


def ids(*items: object) -> list[str]:
    return sorted(file.slide for file in find_slides(map(str, items)))


def unreadable(path: Path) -> None:
    """Put a file there that can be opened and not read: EIO, also for root."""
    path.symlink_to("/proc/self/mem")


# --- headers --------------------------------------------------------------------------


def element(group: int, number: int, kind: bytes, value: bytes) -> bytes:
    head = group.to_bytes(2, "little") + number.to_bytes(2, "little") + kind
    if kind in (b"OB", b"UN"):
        return head + bytes(2) + len(value).to_bytes(4, "little") + value
    return head + len(value).to_bytes(2, "little") + value


def first_element(path: Path) -> int:
    """Where the data set begins, behind the meta information."""
    with path.open("rb") as file:
        file.seek(132)
        pydicom.filereader._read_file_meta_info(file)
        return file.tell()


def test_a_deflated_file_is_refused_before_it_is_inflated(tmp_path: Path) -> None:
    path = tmp_path / "case1" / "bomb.dcm"
    path.parent.mkdir()
    write_ct(path)
    data = pydicom.dcmread(path)
    data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    data.save_as(path, enforce_file_format=True)
    start = first_element(path)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = element(8, 0x18, b"OB", b"")[:8] + (1 << 29).to_bytes(4, "little")
    packed = deflate.compress(bomb)
    for _ in range(32):
        packed += deflate.compress(bytes(1 << 24))
    path.write_bytes(path.read_bytes()[:start] + packed + deflate.flush())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SlideError, match=r"bomb\.dcm: is DICOM compressed as a whole"):
        dicom_header.read_header(str(path))
    assert ids(tmp_path) == ["case1__bomb"]  # a row with that reason
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 << 10  # kB


def test_what_is_read_of_a_header_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = write_series(tmp_path, picture(*SIZE), Scan(levels=1, others=False))
    whole, start = path.read_bytes(), first_element(path)
    known = dicom_header.read_header(str(path))
    assert known is not None

    def changed(found: bytes) -> dicom_header.Instance | None:
        path.write_bytes(whole[:start] + found + whole[start:])
        return dicom_header.read_header(str(path))

    read: list[int] = []
    original = dicom_header._Header.read

    def counted(self: dicom_header._Header, length: int = -1) -> bytes:
        data = original(self, length)
        read.append(len(data))
        return data

    monkeypatch.setattr(dicom_header._Header, "read", counted)
    # One long value is passed over,
    one = changed(element(7, 0x10, b"OB", bytes(30 << 20)))
    assert one is not None
    assert (one.series, one.flavor) == (known.series, known.flavor)
    assert sum(read) < dicom_header._MOST_BYTES
    # many short ones, or a sequence of many items, are not read to their end,
    items = b"\xfe\xff\x00\xe0" + bytes(4)
    sequence = b"\x07\x00\x10\x00SQ\0\0\xff\xff\xff\xff" + items * (1 << 18)
    for much in (element(7, 0x10, b"LO", b"1234") * (1 << 18), sequence):
        with pytest.raises(SlideError, match="header of at most 1048576 bytes"):
            changed(much)
    # nor one that is needed.
    text = element(8, 0x70, b"UN", b"x" * 5000)
    at = whole.index(b"\x08\x00\x70\x00", start)
    length = int.from_bytes(whole[at + 6 : at + 8], "little")
    path.write_bytes(whole[:at] + text + whole[at + 8 + length :])
    with pytest.raises(SlideError, match="Manufacturer of at most 4096 bytes"):
        dicom_header.read_header(str(path))


def test_meta_information_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "x.dcm"
    write_ct(path)
    data = path.read_bytes()
    long = b"\x02\x00\x02\x01OB\0\0" + (1 << 30).to_bytes(4, "little")
    path.write_bytes(data[: first_element(path)] + long)
    with path.open("ab") as file:
        file.truncate(2 << 30)  # sparse
    with pytest.raises(SlideError, match="header of at most"):
        dicom_header.read_header(str(path))


# --- files that cannot be read --------------------------------------------------------


def test_an_unreadable_file_costs_at_most_its_own_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tifffile.imwrite(tmp_path / "x.tif", picture(*SIZE), tile=(256, 256))
    write_series(tmp_path / "case1", picture(*SIZE))
    unreadable(tmp_path / "bad.dcm")
    unreadable(tmp_path / "case1" / "other.dicom")
    unreadable(tmp_path / "README")
    with caplog.at_level(logging.WARNING):
        assert ids(tmp_path) == ["bad", "case1", "case1__other", "x"]
    assert f"{tmp_path}/README: cannot be read (" in caplog.text
    assert "left out" in caplog.text
    assert "bad.dcm" not in caplog.text
    with pytest.raises(StoreError, match=r"bad\.dcm: cannot be read \(.*Errno 5"):
        open_slide(tmp_path / "bad.dcm")
    # A file that is named is listed, whatever its name.
    assert ids(tmp_path / "README") == ["README"]


def test_a_store_that_is_out_of_reach_ends_the_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "README").write_text("text")

    def gone(*_: object) -> None:
        raise StoreError("s3://b: cannot be read") from ConnectionError()

    monkeypatch.setattr(dicom, "read_header", gone)
    monkeypatch.setattr(object_store, "is_of_one_file", lambda _: False)
    with pytest.raises(StoreError, match="s3://b"):
        find_slides([f"{tmp_path}"])


def test_what_lies_beside_an_unreadable_vms_is_no_slide(tmp_path: Path) -> None:
    write_vms(tmp_path / "v.vms", picture(*SIZE))
    tifffile.imwrite(tmp_path / "x.tif", picture(*SIZE), tile=(256, 256))
    (tmp_path / "v.vms").unlink()
    unreadable(tmp_path / "v.vms")
    # Of /proc only reading fails, at an address that is not mapped; its size is 0.
    with pytest.raises(StoreError):
        files.read_bytes(f"{tmp_path}/v.vms")
    assert ids(tmp_path) == ["v", "x"]


@pytest.mark.parametrize("name", ["x.tif", "x.png", "x.svs", "x", "x.mrxs", "x.dcm"])
def test_why_a_file_cannot_be_read_names_it(tmp_path: Path, name: str) -> None:
    unreadable(tmp_path / name)
    tifffile.imwrite(tmp_path / "good.tif", picture(*SIZE), tile=(256, 256))
    found = medray.check([f"{tmp_path}/{name}", f"{tmp_path}/good.tif"])
    (row,) = [row for row in found.slides if row["uri"].endswith(name)]
    assert row["status"] == "refused"
    assert row["message"].startswith(f"{tmp_path}/{name}")
    assert [row["status"] for row in found.slides].count("ok") == 1


def test_why_a_tile_cannot_be_read_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, picture(*SIZE), tile=(256, 256))
    with open_slide(path) as slide:
        unreadable(tmp_path / "bad")
        with (tmp_path / "bad").open("rb") as bad:
            monkeypatch.setattr(slide, "_file", bad)
            with pytest.raises(OSError, match=rf"Errno 5.*{path}"):
                slide.read(0, 0, 100, 100)


# --- folders that a glob names --------------------------------------------------------


def write_all(folder: Path) -> None:
    write_mrxs(folder / "m.mrxs", picture(*SIZE))
    (folder / "m.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    tifffile.imwrite(folder / "m" / "preview.tif", np.zeros((32, 32, 3), np.uint8))
    (folder / "m" / "Notes").write_text("no slide")
    write_series(folder / "case1", picture(*SIZE))
    for seed in "bc":
        write_series(folder / "two", picture(*SIZE), Scan(seed=seed, suffix=""))
    (folder / "site").mkdir()
    tifffile.imwrite(folder / "site" / "x.tif", picture(*SIZE), tile=(256, 256))
    (folder / "site" / "notes.txt").write_text("no slide")


def expected() -> list[str]:
    return sorted(["m", "case1", "x", *(Scan(seed=seed).uid for seed in "bc")])


def test_a_glob_of_folders_is_what_a_shell_makes_of_it(tmp_path: Path) -> None:
    write_all(tmp_path)
    (tmp_path / "m.geojson").unlink()
    assert ids(tmp_path / "*") == expected()
    assert ids(*sorted(tmp_path.iterdir())) == expected()
    assert ids(tmp_path / "s*") == ["x"]
    assert [name for _, name in find_files([f"{tmp_path}/s*"], (".tif",))] == ["x.tif"]


@pytest.mark.parametrize("item", ["m", "m*", "m/*", "*", "**", "**/*", "", "m/Notes"])
def test_the_data_folder_of_an_mrxs_is_no_slide(tmp_path: Path, item: str) -> None:
    write_all(tmp_path)
    try:
        found = {file.uri: file.slide for file in find_slides([f"{tmp_path}/{item}"])}
    except ConfigError as error:
        assert "no slides in" in f"{error}"  # noqa: PT017
        found = {}
    data = f"{tmp_path}/m"
    assert not [uri for uri in found if uri == data or uri.startswith(f"{data}/")]
    assert (f"{data}.mrxs" in found) == (item in ("m*", "*", "**", "**/*", ""))


def test_globs_of_buckets_are_those_of_disks(tmp_path: Path) -> None:
    write_all(tmp_path)
    address = "memory://globs"
    for path in sorted(tmp_path.rglob("*")):
        if path.is_file():
            name = path.relative_to(tmp_path).as_posix()
            files.write_bytes(files.join(address, name), path.read_bytes())
    assert ids(f"{address}/*") == expected()
    assert ids(f"{address}/s*") == ["x"]
    assert ids(f"{address}/t*") == sorted(Scan(seed=seed).uid for seed in "bc")
    assert ids(f"{address}/**/x.tif") == ["site__x"]
