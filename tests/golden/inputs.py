"""The fixed inputs of the golden digests; each folder is made once, when it is needed."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from medray.datasets.synthetic import generate, write_slide, write_svg
from medray.datasets.synthetic_cells import generate_cells
from medray.datasets.synthetic_scene import Scene, draw_scene
from medray.datasets.synthetic_tissue import bezier

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"


class Work:
    """The folder that everything is made in."""

    folder = Path()


def made(make: Callable[[Path], Any]) -> Callable[[], Path]:
    """Make a folder named like the function when it is first asked for."""

    @functools.cache
    def get() -> Path:
        folder = Work.folder / make.__name__
        folder.mkdir(parents=True)
        make(folder)
        return folder

    return get


@made
def slides(folder: Path) -> None:
    """Six slides that differ in what readers, planning and resampling look at."""
    kinds: dict[str, tuple[int, int, dict[str, Any]]] = {
        "s0": (768, 640, {"layout": "pyramid"}),
        "s1": (640, 512, {"compression": "deflate", "mpp": 0.4}),  # is resampled
        "s2": (600, 600, {"layout": "strips", "compression": "lzw"}),
        "s3": (700, 620, {"compression": "deflate"}),  # has a damaged tile
        "s4": (100, 90, {"compression": "deflate"}),  # is smaller than a window
    }
    for seed, (name, (height, width, how)) in enumerate(kinds.items(), 50):
        scene = draw_scene(seed, height=height, width=width, tumour=name != "s4")
        if name == "s2":  # half of it is glass
            wide = ((0, 0), (0, 700))
            scene = replace(
                scene,
                pixels=np.pad(scene.pixels, (*wide, (0, 0)), constant_values=244),
                mask=np.pad(scene.mask, wide),
            )
        write_slide(folder / "slides", name, scene, **how)
        write_svg(folder / "svg", name, scene)
    # Its file says no microns per pixel; the tables do.
    Image.fromarray(draw_scene(60, height=400, width=500).pixels).save(
        folder / "slides" / "s5.png"
    )
    (folder / "mpp.csv").write_text("slide,mpp\ns5,0.5\n")
    (folder / "finer.csv").write_text("slide,mpp\ns5,0.25\n")
    damaged = folder / "slides" / "s3.tif"
    with tifffile.TiffFile(damaged) as tiff:
        offset = tiff.pages.first.dataoffsets[3]
    data = bytearray(damaged.read_bytes())
    data[offset : offset + 100] = bytes(100)
    damaged.write_bytes(data)
    (folder / "within").mkdir()
    for name in ("s0", "s1"):
        shutil.copy(folder / "svg" / f"{name}.svg", folder / "within")
    rows = "".join(f"s{n},{'AB'[n % 2]},p{n // 2}\n" for n in range(6))
    (folder / "cohorts.csv").write_text(f"slide,scanner,patient\n{rows}")


@made
def annotated(folder: Path) -> None:
    """Five slides, the outlines of each in another format."""
    out = folder / "annotations"
    out.mkdir()
    for number in range(5):
        name = f"a{number}"
        scene = draw_scene(number + 70, height=600, width=520)
        write_slide(folder / "slides", name, scene)
        if number == 0:
            write_svg(out, name, scene)
        elif number == 1:
            (out / f"{name}.geojson").write_text(_geojson(scene))
        elif number == 2:
            (out / f"{name}.xml").write_text(_asap(scene))
        elif number == 3:
            (out / f"{name}.xml").write_text(_imagescope(scene))
        else:
            Image.fromarray(scene.mask).save(out / f"{name}.png")
    rows = "".join(f"a{n},p{n // 2}\n" for n in range(5))
    (folder / "groups.csv").write_text(f"slide,group\n{rows}")


def _rings(scene: Scene) -> list[list[list[float]]]:
    """Return the knots of a scene's outlines, as x and y."""
    return [bezier(knots)[:, 2, ::-1].round(2).tolist() for knots in scene.outlines]


def _geojson(scene: Scene) -> str:
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [[*ring, ring[0]]]},
            "properties": {"classification": {"name": "tumour"}},
        }
        for ring in _rings(scene)
    ]
    return json.dumps({"type": "FeatureCollection", "features": features})


def _asap(scene: Scene) -> str:
    areas = ""
    for ring in _rings(scene):
        points = "".join(
            f'<Coordinate Order="{n}" X="{x}" Y="{y}"/>'
            for n, (x, y) in enumerate(ring)
        )
        areas += (
            f'<Annotation PartOfGroup="tumour" Type="Polygon"><Coordinates>{points}'
            f"</Coordinates></Annotation>"
        )
    return f"<ASAP_Annotations><Annotations>{areas}</Annotations></ASAP_Annotations>"


def _imagescope(scene: Scene) -> str:
    regions = ""
    for ring in _rings(scene):
        points = "".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in ring)
        regions += f'<Region Type="0"><Vertices>{points}</Vertices></Region>'
    return (
        f'<Annotations><Annotation Name="tumour"><Regions>{regions}</Regions>'
        f"</Annotation></Annotations>"
    )


@made
def known(folder: Path) -> None:
    """Four slides to learn from, the last of them without annotation."""
    generate(folder, slides=4, seed=50, height=768, width=640)
    (folder / "annotations" / "slide_003.svg").unlink()


@made
def many(folder: Path) -> None:
    """Twelve small slides, their labels and patients."""
    generate(folder, slides=12, seed=200, height=400, width=400)
    rows = "".join(
        f"slide_{n:03d}.tif,{('normal', 'tumour')[n % 2]},p{n:02d}\n" for n in range(12)
    )
    (folder / "labels.csv").write_text(f"slide,label,patient\n{rows}")


@made
def images(folder: Path) -> None:
    """Discs of two colours in class folders, of 12 patients, in several formats."""
    rng = np.random.default_rng(0)
    for name, colour in {"healthy": (220, 160, 190), "sick": (190, 140, 185)}.items():
        (folder / "classes" / name).mkdir(parents=True)
        for number in range(24):
            side = 40 + 5 * (number % 4)
            pixels = np.full((side, side, 3), 250)
            y, x = np.indices((side, side)) * 2 - side
            pixels[y**2 + x**2 < side**2 * 6 // 10] = colour
            pixels = (pixels + rng.integers(-20, 6, pixels.shape)).astype(np.uint8)
            suffix = ("png", "bmp", "jpg")[number % 3]
            Image.fromarray(pixels).save(
                folder / "classes" / name / f"P{number // 2}_cell_{number}.{suffix}"
            )


@made
def cells(folder: Path) -> None:
    """Cells with contours, in SIPaKMeD's layout."""
    generate_cells(folder / "classes", clusters=4, each=2)


@made
def fields(folder: Path) -> None:
    """Some of the real fields, with outlines where there are some, else masks."""
    for at in ("images", "annotations"):
        (folder / at).mkdir()
    for name, outlines, count in [
        *(("bcss", "svg", 1), ("ocdc", "svg", 2), ("glomeruli_pas", "svg", 1)),
        *(("camelyon", "masks", 2), ("ebhi_seg", "masks", 2)),
    ]:
        place = SHARED / "he_seg" / name
        for path in sorted((place / outlines).iterdir())[:count]:
            image = next((place / "images").glob(f"{path.stem}.*"))
            shutil.copy(image, folder / "images" / f"{name}-{image.name}")
            shutil.copy(path, folder / "annotations" / f"{name}-{path.name}")
    for image in sorted((SHARED / "nuclei_he" / "images").iterdir())[:3]:
        shutil.copy(image, folder / "images")
        shutil.copy(
            SHARED / "nuclei_he" / "instances" / image.name, folder / "annotations"
        )


@made
def malaria(folder: Path) -> None:
    """Some of the real cells in class folders."""
    for place in sorted((SHARED / "malaria_rgb").iterdir()):
        (folder / "classes" / place.name).mkdir(parents=True)
        for path in sorted(place.iterdir())[::12]:
            shutil.copy(path, folder / "classes" / place.name)
