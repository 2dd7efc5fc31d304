"""DICOM whole slides: found, read as they were written, refused if something lacks."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicoms import Scan, half, picture, write_ct, write_series
from stages import commit_done

from medray.annotations.matching import match_annotations
from medray.apps.nightly.inbox import Watch, plan_night
from medray.errors import ConfigError, SlideError
from medray.execution.commit import changed_slides
from medray.slides import dicom_header
from medray.slides.discovery import SlideFile, find_slides
from medray.slides.fingerprint import slide_digest, slide_fingerprint
from medray.slides.members import slide_members
from medray.slides.opening import open_slide
from medray.slides.scanner import scanner_of
from medray.storage.ledger import Ledger

pytest.importorskip("openslide")

SIZE = (300, 420)


def ids(*items: Path) -> list[str]:
    return sorted(file.slide for file in find_slides(map(str, items)))


# --- pixels ---------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("codec", ["jpeg", "j2k", "j2k_lossy", "raw"])
def test_pixels_are_those_that_were_written(
    tmp_path: Path, codec: str, sparse: bool, parts: int
) -> None:
    expected = picture(*SIZE)
    scan = Scan(codec, sparse=sparse, parts=parts, mpp=(0.25, 0.25), levels=2)
    write_series(tmp_path / "case", expected, scan)
    most, mean = {"jpeg": (12, 1.0), "j2k_lossy": (60, 2.0)}.get(codec, (0, 0.0))
    rng = np.random.default_rng(0)
    with open_slide(tmp_path / "case") as slide:
        assert (slide.format, slide.mpp) == ("dicom", pytest.approx(0.25))
        assert slide.magnification == 20
        assert [(level.height, level.width) for level in slide.levels] == [
            SIZE,
            (SIZE[0] // 2, SIZE[1] // 2),
        ]
        for level, (height, width) in enumerate([SIZE, (SIZE[0] // 2, SIZE[1] // 2)]):
            whole = slide.read(0, 0, height, width, level)
            off = np.abs(whole.astype(int) - expected)
            assert off.max() <= most
            assert off.mean() <= mean
            y, x = int(rng.integers(height - 40)), int(rng.integers(width - 40))
            if level == 0:
                part = slide.read(y, x, 40, 40, level)
                np.testing.assert_array_equal(part, whole[y : y + 40, x : x + 40])
            expected = half(expected)


def test_a_tile_that_was_not_stored_is_white(tmp_path: Path) -> None:
    scan = Scan("j2k", sparse=True, missing=((1, 1),), levels=1)
    write_series(tmp_path / "case", picture(*SIZE), scan)
    expected = picture(*SIZE)
    expected[128:256, 128:256] = 255
    with open_slide(tmp_path / "case") as slide:
        np.testing.assert_array_equal(slide.read(0, 0, *SIZE), expected)


# --- which files are a slide ----------------------------------------------------------


@pytest.mark.parametrize("suffix", [".dcm", ".DCM", ".dicom", "", ".1234"])
def test_a_folder_of_one_series_is_the_slide(tmp_path: Path, suffix: str) -> None:
    case = tmp_path / "slides" / "case1"
    paths = write_series(case, picture(*SIZE), Scan(parts=2, suffix=suffix))
    (tmp_path / "slides" / "LICENSE").write_text("no slide")
    (case / "README").write_text("no slide" * 100)
    expected = SlideFile("case1", f"{case}")
    # However it is named: the folders, the files, one of them, a label.
    named = [f"{tmp_path}/slides", f"{case}", f"{case}/a-*", *map(str, paths)]
    for item in named:
        assert find_slides([item]) == [expected]
    assert find_slides(named) == [expected]
    assert expected.path == "case1"
    assert {member.uri for member in slide_members(f"{case}")} == set(map(str, paths))
    with open_slide(case) as slide, open_slide(paths[-1]) as other:
        assert slide.levels == other.levels


def test_it_is_found_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_series(tmp_path / "case1", picture(*SIZE))
    monkeypatch.chdir(tmp_path)
    assert [file.uri for file in find_slides(["case1"])] == [f"{tmp_path}/case1"]
    assert scanner_of("case1") == "medray tests drawn"
    open_slide("case1").close()
    monkeypatch.chdir(tmp_path / "case1")
    open_slide(paths[1].name).close()
    assert len(slide_members(paths[1].name)) == len(paths)
    paths[0].unlink()
    with pytest.raises(SlideError, match="expected one in full resolution"):
        open_slide(paths[1].name)


def test_series_of_one_folder_are_slides_of_their_own(tmp_path: Path) -> None:
    folder, scans = tmp_path / "slides" / "study", {s: Scan(seed=s) for s in "bc"}
    for seed, scan in scans.items():
        write_series(folder, picture(*SIZE, ord(seed)), scan)
    # The label of another scan does not make its series a slide.
    write_series(folder, picture(*SIZE), Scan(seed="d", levels=0))
    found = find_slides([f"{tmp_path}/slides"])
    assert {file.slide for file in found} == {
        f"study__{scan.uid}" for scan in scans.values()
    }
    for seed, scan in scans.items():
        address = f"{folder}/{scan.uid}"
        assert [file.uri for file in find_slides([address])] == [address]
        assert address in {file.uri for file in found}
        with open_slide(address) as slide:
            off = slide.read(0, 0, *SIZE).astype(int) - picture(*SIZE, ord(seed))
            assert np.abs(off).max() <= 12
    with pytest.raises(SlideError, match="2 series.*SeriesInstanceUID"):
        open_slide(folder)
    # Another series next to them changes neither id nor digest.
    before = {file.uri: slide_digest(file.uri) for file in found}
    write_series(folder, picture(*SIZE), Scan(seed="e"))
    now = {file.uri: slide_digest(file.uri) for file in find_slides([f"{folder}"])}
    assert now.items() > before.items()


def test_a_series_is_not_done_twice_under_two_addresses(tmp_path: Path) -> None:
    folder = tmp_path / "slides" / "case1"
    write_series(folder, picture(*SIZE), Scan(seed="a"))
    ledger = Ledger(f"{tmp_path}/out")

    def run() -> list[str]:
        tasks = changed_slides(find_slides([f"{tmp_path}/slides"]), ledger)
        for task in tasks:
            commit_done(ledger, task.input)
        return [task.input.slide for task in tasks]

    assert run() == ["case1"]
    added = write_series(folder, picture(*SIZE, 1), Scan(seed="b"))
    with pytest.raises(ConfigError, match=r"is done there as 'case1'.*no DICOM series"):
        run()
    (tmp_path / "slides" / "case2").mkdir()
    for path in added:
        path.rename(tmp_path / "slides" / "case2" / path.name)
    assert run() == ["case2"]
    ledger.close()


def test_what_is_no_slide_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = tmp_path / "case1"
    write_series(case, picture(*SIZE))
    write_ct(case / "ct.dcm")
    with caplog.at_level(logging.WARNING):
        assert ids(tmp_path) == ["case1"]
    assert "1 DICOM files" in caplog.text
    assert "ct.dcm (CT Image Storage)" in caplog.text
    with open_slide(case) as slide:
        assert slide.format == "dicom"
    assert ids(case / "ct.dcm") == [
        "ct"
    ]  # named on its own, it is refused with the reason
    with pytest.raises(SlideError, match=r"ct\.dcm: holds CT Image Storage, expected"):
        open_slide(case / "ct.dcm")
    (tmp_path / "ct").mkdir()
    (case / "ct.dcm").rename(tmp_path / "ct" / "1.dcm")
    with pytest.raises(SlideError, match="0 series.*CT Image Storage"):
        open_slide(tmp_path / "ct")
    with pytest.raises(ConfigError, match="no slides in"):
        find_slides([f"{tmp_path}/ct"])


def test_damaged_files_cost_a_slide_each(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "case1", picture(*SIZE))
    (tmp_path / "case1" / "empty.dcm").touch()
    (tmp_path / "case1" / "text.dcm").write_text("no slide" * 100)
    data = paths[0].read_bytes()
    (tmp_path / "case1" / "short.dcm").write_bytes(data[:170])
    found = find_slides([f"{tmp_path}"])
    bad = {"case1__empty", "case1__text", "case1__short"}
    assert {file.slide for file in found} == {"case1", *bad}
    for file in found:
        if file.slide in bad:
            with pytest.raises(SlideError, match="expected DICOM|copy it again|holds"):
                open_slide(file.uri)


@pytest.mark.parametrize("uid", ["../../x", "1.2/../../..", "1", "", "1." * 40 + "1"])
def test_a_uid_that_is_none_leads_nowhere(tmp_path: Path, uid: str) -> None:
    (path, *_) = write_series(tmp_path / "a" / "b", picture(*SIZE), Scan(levels=1))
    data = pydicom.dcmread(path)
    data["SeriesInstanceUID"]._value = uid
    data.save_as(path)
    uris = {file.uri for file in find_slides([f"{tmp_path}"])}
    assert str(path) in uris
    assert all(uri.startswith(f"{tmp_path}/a/b") for uri in uris)
    with pytest.raises(SlideError, match="expected DICOM with a SeriesInstanceUID"):
        open_slide(path)


def test_without_pydicom_it_is_said_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_series(tmp_path / "case1", picture(*SIZE))
    dicom_header._read_header.cache_clear()
    monkeypatch.setitem(sys.modules, "pydicom.filereader", None)
    with pytest.raises(ConfigError, match=r"pip install 'medray\[openslide\]'"):
        find_slides([f"{tmp_path}"])
    with pytest.raises(SlideError, match=r"pip install 'medray\[openslide\]'"):
        open_slide(tmp_path / "case1")


def test_annotations_are_found_by_name(tmp_path: Path) -> None:
    write_series(tmp_path / "slides" / "case1", picture(*SIZE))
    for seed in "bc":
        write_series(tmp_path / "slides" / "two", picture(*SIZE), Scan(seed=seed))
    b, c = (Scan(seed=seed).uid for seed in "bc")
    folder = tmp_path / "annotations"
    (folder / "two").mkdir(parents=True)
    names = {"case1": "case1.geojson", f"two__{b}": f"{b}.geojson"}
    names[f"two__{c}"] = f"two/{c}.geojson"
    for name in names.values():
        (folder / name).touch()
    found = match_annotations(find_slides([f"{tmp_path}/slides"]), f"{folder}")
    assert found == {slide: f"{folder}/{name}" for slide, name in names.items()}


# --- what is missing ------------------------------------------------------------------


def without(index: int) -> Callable[[list[Path]], None]:
    return lambda paths: paths[index].unlink()


@pytest.mark.parametrize(
    ("scan", "harm", "said"),
    [
        (Scan(), without(0), "RESAMPLED, expected one in full resolution"),
        (Scan(parts=3), without(0), "part 1 of 3 of the concatenation"),
        (Scan(parts=3), without(1), "part 2 of 3 of the concatenation"),
        (Scan(parts=3), without(2), "part 3 of 3 of the concatenation"),
        (Scan(parts=3, sparse=True), without(2), "part 3 of 3"),
        (Scan(parts=2), without(3), "part 2 of 2 of the concatenation"),
        (Scan(missing=((1, 1),)), lambda paths: None, "holds 11 tiles, expected 12"),
    ],
)
def test_a_series_without_all_of_its_pixels_is_refused(
    tmp_path: Path, scan: Scan, harm: Callable[[list[Path]], None], said: str
) -> None:
    harm(write_series(tmp_path / "case1", picture(*SIZE), scan))
    (found,) = find_slides([f"{tmp_path}"])
    with pytest.raises(SlideError, match=said) as raised:
        open_slide(found.uri)
    assert str(raised.value).startswith(f"{tmp_path}/case1: ")


def test_a_level_that_is_missing_changes_no_pixel(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "case1", picture(*SIZE), Scan("j2k"))
    digest, fingerprint = (
        slide_digest(f"{tmp_path}/case1"),
        slide_fingerprint(f"{tmp_path}/case1"),
    )
    paths[1].unlink()
    with open_slide(tmp_path / "case1") as slide:
        np.testing.assert_array_equal(slide.read(0, 0, *SIZE), picture(*SIZE))
    assert slide_digest(f"{tmp_path}/case1") != digest
    assert slide_fingerprint(f"{tmp_path}/case1") != fingerprint


@pytest.mark.parametrize("codec", ["jpeg", "j2k", "raw"])
def test_a_file_that_is_cut_off_gives_no_other_pixels(
    tmp_path: Path, codec: str
) -> None:
    paths = write_series(tmp_path / "case1", picture(*SIZE), Scan(codec, levels=1))
    with open_slide(tmp_path / "case1") as slide:
        whole = slide.read(0, 0, *SIZE)
    data, refused = paths[0].read_bytes(), 0
    for length in range(200, len(data) - 1, len(data) // 23):
        paths[0].write_bytes(data[:length])
        try:
            with open_slide(tmp_path / "case1") as slide:
                np.testing.assert_array_equal(slide.read(0, 0, *SIZE), whole)
        except SlideError:
            refused += 1
    assert refused >= 20


def test_names_and_order_of_files_do_not_matter(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "case1", picture(*SIZE))
    digest = slide_digest(f"{tmp_path}/case1")
    for number, path in enumerate(reversed(paths)):
        path.rename(path.with_name(f"IM{number:04}"))
    assert slide_digest(f"{tmp_path}/case1") == digest
    assert ids(tmp_path) == ["case1"]


def test_a_night_takes_a_series_when_it_is_complete(tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    paths = write_series(inbox / "case1", picture(*SIZE), Scan(parts=2))
    watch = Watch(inbox=f"{inbox}", out=f"{tmp_path}/out", models=(), settle=0.0)
    paths[1].rename(tmp_path / "arriving")
    first = plan_night(watch, {}, "2026-01-01")
    assert first["slides"] == []
    assert "part 2 of 2" in first["left_out"]["case1"]
    (tmp_path / "arriving").rename(paths[1])
    (planned,) = plan_night(watch, {}, "2026-01-02")["slides"]
    assert (planned["file"], planned["slide"]) == ("case1", "case1")
