"""Slide quality control: each measure on slides without and with its fault; limits."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage

from medray.apps.nightly.drift import stain_distance
from medray.datasets.synthetic_faults import FAULTS, blur
from medray.datasets.synthetic_scene import draw_scene
from medray.errors import ConfigError
from medray.slides.artefacts import _opened
from medray.slides.base import Mpp
from medray.slides.image import ArraySlide
from medray.slides.quality import (
    Quality,
    _choose_fields,
    field_focus,
    measure_quality,
)
from medray.slides.quality_limits import (
    Limit,
    QualityLimits,
    judge,
    read_limits,
)


@pytest.fixture(scope="module")
def pixels() -> npt.NDArray[np.uint8]:
    return draw_scene(11, height=1536, width=1536, artefacts=False).pixels


def measured(pixels: npt.NDArray[np.uint8], mpp: float | None = 0.5) -> Quality:
    slide = ArraySlide(pixels)
    slide.resolution = Mpp(mpp, mpp, "test") if mpp else None
    return measure_quality(slide)


@pytest.mark.parametrize(
    ("fault", "value"),
    [
        ("blur 3 um", "focus"),
        ("blur 2 um in part", "blurred_share"),
        ("blue pen", "pen_share"),
        ("green pen", "pen_share"),
        ("red pen", "pen_share"),
        ("black pen", "pen_share"),
        ("folds", "fold_share"),
        ("bubbles", "bubble_share"),
        ("little tissue", "tissue_mm2"),
    ],
)
def test_a_fault_is_flagged_by_its_value_and_a_clean_slide_by_none(
    pixels: npt.NDArray[np.uint8], fault: str, value: str
) -> None:
    limits = QualityLimits()
    assert judge(vars(measured(pixels)), limits).flagged == ""
    bad = FAULTS[fault][1](pixels, np.random.default_rng(3))
    found = measured(bad)
    assert f"{value} " in judge(vars(found), limits).flagged
    assert found == measured(bad)  # nothing of it is left to chance


def test_focus_falls_with_blur_and_does_not_follow_the_stain(
    pixels: npt.NDArray[np.uint8],
) -> None:
    rng = np.random.default_rng(0)
    focus = [field_focus(pixels)]
    focus += [field_focus(blur(pixels, rng, um, 1)) for um in (0.5, 1, 1.5, 3)]
    assert focus == sorted(focus, reverse=True)
    assert focus[0] > 0.85
    assert focus[-1] < 0.2
    for times in (0.6, 1.6):
        stained = np.clip(245 * (np.maximum(pixels, 1) / 245) ** times, 0, 255)
        assert field_focus(stained.astype(np.uint8)) == pytest.approx(
            focus[0], rel=0.25
        )
    assert field_focus(np.full((512, 512, 3), 200, np.uint8)) is None


def test_focus_is_that_of_the_optics_not_of_the_scan(
    pixels: npt.NDArray[np.uint8],
) -> None:
    """A slide scanned at twice the pixels has the same focus."""
    half = pixels[:768, :768]
    wide = ndimage.zoom(half.astype(np.float32), (2, 2, 1), order=1)
    fine = np.clip(wide, 0, 255).astype(np.uint8)
    coarse = measured(half).focus
    assert coarse is not None
    assert measured(fine, 0.25).focus == pytest.approx(coarse, rel=0.2)


def test_tissue_is_an_area_where_the_resolution_is_known() -> None:
    rgb = np.full((2000, 2000, 3), 243, np.uint8)
    rgb[500:1500, 500:1500] = (200, 110, 170)
    known, unknown = measured(rgb, 0.5), measured(rgb, None)
    assert known.tissue_share == unknown.tissue_share == pytest.approx(0.25, rel=0.05)
    assert known.tissue_mm2 == pytest.approx(0.25, rel=0.05)
    assert unknown.tissue_mm2 is None
    nothing = measured(np.full((900, 900, 3), 243, np.uint8))
    assert nothing.tissue_mm2 == 0
    assert nothing.focus is nothing.blurred_share is None
    assert judge(vars(nothing), QualityLimits()).flagged.startswith("tissue_share 0 is")


def test_few_fields_are_read_however_large_the_slide(
    pixels: npt.NDArray[np.uint8],
) -> None:
    read = []

    class Counting(ArraySlide):
        def read(self, y: int, x: int, height: int, width: int, level: int = 0):
            read.append(height * width)
            return super().read(y, x, height, width, level)

    slide = Counting(np.tile(pixels, (4, 4, 1)))
    slide.resolution = Mpp(0.5, 0.5, "test")
    assert measure_quality(slide).fields == 32
    assert sum(read) <= slide.levels[0].height * slide.levels[0].width + 32 * 512**2
    many = _choose_fields(np.ones((1000, 700), bool), 10)
    assert len(many) == len({*many}) == 32
    assert {y > 500 for y, _ in many} == {x > 350 for _, x in many} == {False, True}


@pytest.mark.parametrize("side", [3, 4, 7, 8])
def test_opening_by_rows_and_columns_is_opening_by_the_square(side: int) -> None:
    noise = np.random.default_rng(side).standard_normal((120, 90))
    found = ndimage.gaussian_filter(noise, 3) > 0
    wide = np.pad(found, side, mode="edge")
    square = ndimage.binary_opening(wide, np.ones((side, side)))
    np.testing.assert_array_equal(
        _opened(found, side, 1.0), square[side:-side, side:-side]
    )


def test_what_is_worse_than_a_limit_is_said_with_value_and_limit() -> None:
    limits = QualityLimits(
        focus=Limit(flag=0.5, quarantine=0.3), pen_share=Limit(flag=0.1)
    )
    blurred = {"focus": 0.2, "pen_share": 0.25, "tissue_share": None}
    verdict = judge(blurred, limits)
    assert verdict.quarantined == "focus 0.2 is below 0.3"
    assert verdict.flagged == "pen_share 0.25 is above 0.1"
    assert judge({"focus": 0.4}, limits).flagged == "focus 0.4 is below 0.5"
    assert judge({"focus": 0.5, "pen_share": 0.1}, limits).flagged == ""
    assert judge({"focus": float("nan")}, limits).quarantined == ""


def test_limits_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "qc.yaml"
    file.write_text("focus: {quarantine: 0.3}\npen_share: {flag: null}\n")
    limits = read_limits(str(file))
    assert limits.focus == Limit(flag=0.6, quarantine=0.3)
    assert limits.pen_share == Limit()
    assert limits.fold_share == read_limits("default").fold_share != Limit()
    for text, said in (
        ("focuss: {flag: 1}", "unknown key focuss; did you mean focus"),
        ("focus: {flags: 1}", "unknown key focus.flags; did you mean focus.flag"),
        ("focus: {flag: sharp}", "focus.flag: expected a number"),
        ("focus: 0.3", "focus: expected a mapping"),
        ("focus: {flag: -1}", "focus.flag: expected a number of 0 or more, found -1"),
        ("focus: {quarantine: 0.7}", "expected at most focus.flag, 0.6, found 0.7"),
        ("pen_share: {quarantine: 0}", "expected at least pen_share.flag, 0.01"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=said) as error:
            read_limits(str(file))
        assert str(file) in str(error.value)


def test_the_distance_of_a_stain_is_in_spreads_of_the_training_slides() -> None:
    training = [{"eosin_mean": 0.4 + 0.01 * (i % 5), "share_x": 1.0} for i in range(25)]
    spread = 1.4826 * 0.01
    far = {"eosin_mean": 0.42 + 3 * spread, "eosin_sd": 9.0}
    assert stain_distance(far, training) == pytest.approx(3)
    assert stain_distance(far, training[:19]) is None
    assert stain_distance({}, training) is None
