import hashlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from scipy import ndimage

from medray.annotations.rasterize import rasterise
from medray.annotations.reading import read_annotation
from medray.classes import Classes
from medray.datasets.synthetic import generate, write_slide
from medray.datasets.synthetic_scene import draw_scene
from medray.slides.opening import open_slide


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    digests = []
    for name in ("a", "b"):
        generate(tmp_path / name, slides=2, seed=4, height=300, width=400)
        files = sorted(p for p in (tmp_path / name).rglob("*") if p.is_file())
        digests.append([hashlib.blake2b(p.read_bytes()).hexdigest() for p in files])
    assert digests[0] == digests[1]
    assert len(digests[0]) == 5


def test_outlines_and_mask_agree(tmp_path: Path) -> None:
    generate(tmp_path, slides=6, seed=20, height=700, width=900)
    for index in range(6):
        scene = draw_scene(20 + index, height=700, width=900, tumour=index != 5)
        path = tmp_path / "annotations" / f"slide_{index:03d}.svg"
        areas = read_annotation(str(path), height=700, width=900, classes=Classes())
        labels = rasterise(areas, Classes(), y=0, x=0, height=700, width=900)
        assert (labels != scene.mask).sum() <= 0.002 * scene.mask.size
        assert scene.mask.any() == (index != 5)


def test_nests_are_many_and_small() -> None:
    scenes = [
        draw_scene(seed, height=1024, width=1024, lesions="small") for seed in range(3)
    ]
    sizes = np.concatenate(
        [np.bincount(ndimage.label(scene.mask)[0].ravel())[1:] for scene in scenes]
    )
    assert len(sizes) >= 9
    assert 0 < (sizes < 32 * 32).sum() < len(sizes)
    for scene in scenes:
        assert 0 < scene.mask.mean() < 0.05


@pytest.mark.parametrize("layout", ["tiles", "strips", "pyramid"])
def test_slides_open_with_their_resolution(tmp_path: Path, layout: str) -> None:
    scene = draw_scene(1, height=600, width=700)
    path = write_slide(tmp_path, "x", scene, mpp=0.25, layout=layout)  # type: ignore[arg-type]
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx(0.25)
        assert len(slide.levels) == (3 if layout == "pyramid" else 1)
    assert tifffile.imread(path).shape == (600, 700, 3)


def best_band(values: np.ndarray, truth: np.ndarray) -> float:
    """The best F1 of any lower and upper threshold, chosen with the truth at hand."""
    edges = np.quantile(values, np.linspace(0, 1, 60))
    bins = np.digitize(values, edges)
    hits = np.concatenate([[0], np.bincount(bins, truth, 62).cumsum()])
    size = np.concatenate([[0], np.bincount(bins, minlength=62).cumsum()])
    tp, marked = hits[None] - hits[:, None], size[None] - size[:, None]
    with np.errstate(invalid="ignore"):
        f1 = np.where(marked > 0, 2 * tp / (marked + truth.sum()), 0)
    return float(f1.max())


def test_no_threshold_on_colour_finds_the_tumour() -> None:
    scenes = [
        draw_scene(seed, height=1024, width=1024, tumour=seed % 6 != 5)
        for seed in (1, 2, 5)
    ]
    truth = np.concatenate([scene.mask[::2, ::2].ravel() for scene in scenes])
    to_stain = np.linalg.pinv([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105]])[:, 0]
    features = {
        "red": lambda rgb: rgb[..., 0],
        "green": lambda rgb: rgb[..., 1],
        "blue": lambda rgb: rgb[..., 2],
        "saturation": lambda rgb: rgb.max(-1) - rgb.min(-1),
        "haematoxylin": lambda rgb: -np.log((rgb + np.float32(1)) / 245) @ to_stain,
    }
    for name, feature in features.items():
        for blur in (0, 4, 16):
            values = np.concatenate(
                [
                    ndimage.gaussian_filter(
                        feature(scene.pixels).astype(np.float32), blur
                    )[::2, ::2].ravel()
                    for scene in scenes
                ]
            )
            assert best_band(values, truth) < 0.6, (name, blur)
