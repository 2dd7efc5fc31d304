"""What a run gives, in the programs and libraries that people open it with.

Every output of one slide is opened by every tool that is at hand, and its pixels are
compared with the mask; the table says with which version, or why not.

    python -m benchmarks.viewers.outputs --run RUN --out OUT [--ngff DIR]
        [--bioformats JAR] [--vizarr DIST]

RUN is any run whose slides are still there. --ngff has the schemas of the specification
by version (DIR/0.5/image.schema, as `git archive 0.5 schemas` gives them); --bioformats
is bioformats_package.jar, with which Fiji, OMERO and QuPath read (run by java);
--vizarr the folder that `vite build` makes of Vizarr's repository (looked at in
Chromium by playwright). `make test-slow` installs the others, Viv where there is npm;
napari draws in Debian's Xvfb. Writes OUT/viewers.md and the pictures of napari and
Vizarr.
"""

import functools
import importlib.metadata
import json
import re
import shutil
import subprocess
import tempfile
import urllib.parse
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import harness
from benchmarks.viewers.shown import (
    VIV,
    Show,
    chromium,
    differing,
    napari,
    neuroglancer,
    picture_of_napari,
    served,
    viv,
)
from medray import open_mask
from medray.apps.convert import convert
from medray.inference.outlines import write_outlines
from medray.inference.run import mask_uri, read_run
from medray.storage import files

OUTPUTS = {
    "mask": "mask, OME-Zarr 0.5",
    "ome-zarr": "with image, 0.5",
    "ome-zarr-0.4": "mask, 0.4",
    "ome-zarr-0.4-image": "with image, 0.4",
    "ome-tiff": "OME-TIFF",
    "tiff": "TIFF",
    "geojson": "GeoJSON",
}


def make_outputs(run: str, out: Path) -> tuple[dict[str, str], Any]:
    """Write every output of a run; give those of its first slide, and its mask."""
    rows = files.read_table(f"{run}/slides.parquet").to_pylist()
    row = next(row for row in rows if row["status"] == "done")
    slide, mask = row["slide"], mask_uri(run, row["slide"])
    places = {"mask": mask}
    for name in [*OUTPUTS][1:-1]:
        to, image = (
            name.removesuffix("-image"),
            name in ("ome-zarr", "ome-zarr-0.4-image"),
        )
        folder = str(out / name)
        assert not convert(run, to=to, out=folder, with_image=image).failed  # type: ignore[arg-type]
        ending = {"ome-tiff": ".ome.tif", "tiff": ".tif"}.get(name, ".ome.zarr")
        places[name] = f"{folder}/{slide}{ending}"
    places["geojson"] = str(out / f"{slide}.geojson")
    classes = read_run(run).classes
    write_outlines(mask, places["geojson"], classes, downsample=row["downsample"])
    return places, (np.asarray(open_mask(mask)), row, classes)


# --- libraries ------------------------------------------------------------------------


def same(found: Any, mask: Any) -> None:
    found = np.asarray(found)
    if found.shape != mask.shape or not (found == mask).all():
        raise ValueError(f"other pixels: {found.shape} beside {mask.shape}")


def inner(name: str) -> str:
    return "labels/mask" if name in ("ome-zarr", "ome-zarr-0.4-image") else ""


def by_zarr(name: str, place: str, mask: Any) -> None:
    import zarr

    group: Any = zarr.open_group(place, path=inner(name), mode="r")
    same(group["0"][:], mask)


def by_dask(name: str, place: str, mask: Any) -> None:
    import dask.array as da

    same(da.from_zarr(place, component=f"{inner(name)}/0".strip("/")).compute(), mask)


def by_models(name: str, place: str, mask: Any) -> None:
    import ome_zarr_models
    import zarr

    group: Any = zarr.open_group(place, mode="r")
    opened: Any = ome_zarr_models.open_ome_zarr(group)
    wanted = "Image" if inner(name) else "ImageLabel"
    if type(opened).__name__ != wanted or (inner(name) and opened.labels is None):
        raise ValueError(f"taken for {type(opened).__name__}")


def by_ome_zarr(name: str, place: str, mask: Any) -> None:
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader

    for node in Reader(parse_url(place))():
        named = node.metadata.get("name") == "mask" or not inner(name)
        if "color" in node.metadata and named:
            same(node.data[0], mask)
            return
    raise ValueError("no labels seen")


def by_spatialdata(name: str, place: str, mask: Any) -> None:
    """Put a mask into a SpatialData, write that, and read it again."""
    import dask.array as da
    import spatialdata
    from spatialdata.models import Labels2DModel

    level = da.from_zarr(place, component=f"{inner(name)}/0".strip("/"))
    labels = Labels2DModel.parse(level, dims=("y", "x"))
    with tempfile.TemporaryDirectory() as folder:
        spatialdata.SpatialData(labels={"mask": labels}).write(f"{folder}/all.zarr")
        same(spatialdata.read_zarr(f"{folder}/all.zarr").labels["mask"], mask)


def by_tifffile(name: str, place: str, mask: Any) -> None:
    import tifffile

    with tifffile.TiffFile(place) as tiff:
        if len(tiff.series[0].levels) < 2 and max(mask.shape) > 512:
            raise ValueError("no pyramid seen")
        same(tiff.series[0].asarray(), mask)


def by_openslide(name: str, place: str, mask: Any) -> None:
    import openslide

    slide = openslide.OpenSlide(place)
    pixels = slide.read_region((0, 0), 0, slide.dimensions)
    same(np.asarray(pixels)[..., 0], mask)
    if slide.level_count < 2 and max(mask.shape) > 512:
        raise ValueError("pixels are right, but no pyramid is seen")


def by_rasterio(
    name: str, place: str, mask: Any, *, downsample: float, classes: Any
) -> None:
    """Draw GeoJSON again, at the mask's resolution."""
    import shapely
    from rasterio import features

    shapes = [
        (
            shapely.transform(
                shapely.geometry.shape(one["geometry"]), lambda xy: xy / downsample
            ),
            classes.names.index(one["properties"]["classification"]["name"]),
        )
        for one in json.loads(Path(place).read_text())["features"]
    ]
    same(features.rasterize(shapes, mask.shape, dtype="uint8"), mask)


def run_bioformats(jar: str, tool: str, *args: str) -> str:
    command = ["java", "-cp", jar, f"loci.formats.tools.{tool}", *args]
    told = subprocess.run(command, capture_output=True, text=True)
    if told.returncode:
        raise ValueError(told.stderr or told.stdout)
    return told.stdout


def by_bioformats(name: str, place: str, mask: Any, *, jar: str) -> None:
    import tifffile

    told = run_bioformats(jar, "ImageInfo", "-no-upgrade", "-nopix", "-noflat", place)
    levels = re.search(r"Resolutions = (\d+)", told)
    with tempfile.TemporaryDirectory() as folder:
        copy = f"{folder}/copy.tif"
        run_bioformats(
            jar, "ImageConverter", "-no-upgrade", "-series", "0", place, copy
        )
        same(tifffile.imread(copy), mask)
    if levels is None and max(mask.shape) > 512:
        raise ValueError("pixels are right, but no pyramid is seen")


def by_schemas(name: str, place: str, mask: Any, *, folder: str) -> None:
    """Validate the image and its labels by the strict schemas of the specification."""
    import zarr
    from jsonschema import Draft202012Validator
    from referencing import Registry, Resource
    from referencing.jsonschema import DRAFT202012

    version = "0.4" if name.startswith("ome-zarr-0.4") else "0.5"
    texts = [p.read_text() for p in Path(folder, version).glob("*.schema")]
    schemas = {schema["$id"]: schema for schema in map(json.loads, texts)}
    registry = Registry().with_resources(
        (uri, Resource.from_contents(schema, default_specification=DRAFT202012))
        for uri, schema in schemas.items()
    )
    for path in {"", inner(name)}:
        attributes = zarr.open_group(place, path=path, mode="r").attrs.asdict()
        kinds = ["image"]
        if "image-label" in {**attributes, **attributes.get("ome", {})}:  # type: ignore[dict-item]
            kinds.append("label")
        for kind in kinds:
            end = f"{version}/schemas/strict_{kind}.schema"
            (schema,) = (one for uri, one in schemas.items() if uri.endswith(end))
            Draft202012Validator(schema, registry=registry).validate(attributes)


ZARRS = ("mask", "ome-zarr", "ome-zarr-0.4", "ome-zarr-0.4-image")
TIFFS = ("ome-tiff", "tiff")
LIBRARIES: list[tuple[str, str, Callable[..., None], tuple[str, ...]]] = [
    ("ome-zarr-models", "validates", by_models, ZARRS),
    ("zarr", "reads", by_zarr, ZARRS),
    ("dask", "reads", by_dask, ZARRS),
    ("ome-zarr", "reads", by_ome_zarr, ZARRS),
    ("spatialdata", "takes", by_spatialdata, ZARRS),
    ("tifffile", "reads", by_tifffile, TIFFS),
    ("openslide-python", "reads", by_openslide, TIFFS),
    ("rasterio", "draws again", by_rasterio, ("geojson",)),
]


def tried(check: Callable[..., None], *args: Any) -> str:
    try:
        check(*args)
    except Exception as error:  # whatever a tool raises is what its users see
        said = " ".join(f"{error}".split())[:120]
        return f"no: {type(error).__name__}: {said}".replace("|", "/")
    return "yes"


# --- napari, neuroglancer and viv -----------------------------------------------------


def look_with(
    viewer: AbstractContextManager[Show],
    places: dict[str, str],
    mpp: float,
    takes: tuple[str, ...] = ZARRS,
) -> dict[str, str]:
    """Compare the first levels with what the screen shows, pixel by pixel."""
    with viewer as show:

        def check(name: str) -> None:
            place = Path(places[name]) / inner(name)
            for level in range(1 if name in TIFFS else 3):
                mask = np.asarray(open_mask(places["mask"], level))
                middle = mask.shape[0] // 2, mask.shape[1] // 2
                unit = 1.0 if name in TIFFS else mpp
                found = show(place, mpp=unit, factor=2**level, middle=middle)
                if count := differing(found, mask, middle):
                    raise ValueError(f"level {level}: {count} other pixels")

        return {name: tried(check, name) for name in takes}


# --- vizarr ---------------------------------------------------------------------------


def look_with_vizarr(
    dist: str, places: dict[str, str], mask: Any, out: Path, *, unit: float
) -> dict[str, str]:
    """Open each OME-Zarr in Vizarr; its view is in micrometres, `unit` a pixel."""
    package = json.loads((Path(dist).parent / "package.json").read_text())
    found = {"version": package["version"]}
    with served(Path(dist)) as page_address, chromium() as browser:
        for name in ZARRS:
            place = Path(places[name])
            with served(place.parent) as address:
                page = browser.new_page(viewport={"width": 1000, "height": 750})
                said: list[str] = []
                page.on("console", lambda m, said=said: said.append(m.text))
                page.on("pageerror", lambda e, said=said: said.append(str(e)))
                source = f"{address}/{place.name}"
                height, width = (length * unit for length in mask.shape)
                zoom = np.floor(np.log2(min(750 / height, 1000 / width)))
                view = json.dumps({"zoom": zoom, "target": [width / 2, height / 2]})
                query = urllib.parse.urlencode({"source": source, "viewState": view})
                page.goto(f"{page_address}/index.html?{query}")
                page.wait_for_load_state("networkidle")
                page.wait_for_timeout(6000)
                if inner(name):  # labels of an image are shown on request
                    page.screenshot(path=out / f"vizarr-{name}-image.png")
                    box = page.get_by_text("mask", exact=True).bounding_box()
                    assert box is not None
                    page.mouse.click(box["x"] + 8, box["y"] + box["height"] / 2 + 21)
                    page.wait_for_timeout(4000)
                picture = out / f"vizarr-{name}.png"
                page.screenshot(path=picture)
                what = "image yes; labels " if inner(name) else ""
                errors = [one for one in said if "rror" in one and "404" not in one]
                words = "; ".join(errors).replace("\0", "").replace("|", "/").split()
                why = " ".join(words)[:150]
                shown = seen(picture, mask, unit * 2**zoom)
                found[name] = what + (shown or f"no: {why or 'nothing is seen'}")
                page.close()
    return found


_PLAIN = 32  # of 255, that a person sees without searching


def seen(picture: Path, mask: Any, scale: float) -> str:
    """Return, in words, how well a mask stands out where it should.

    Where the colours of mask and background differ plainly: of the share of its pixels
    on one side of a threshold of one colour channel, and of the share of the others,
    the difference (Youden's J).

    Args:
        picture: With the middle of the slide in its middle.
        mask: (height, width) label values.
        scale: Pixels of the picture a pixel of the mask.
    """
    shown = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    size = [round(length * scale) for length in mask.shape]
    small = np.asarray(
        Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST)
    )
    top, left = (
        (page - own) // 2 for page, own in zip(shown.shape, size, strict=False)
    )
    part = shown[top : top + size[0], left : left + size[1]]
    best = 0.0
    for channel in range(3):
        inside, outside = part[small > 0][:, channel], part[small == 0][:, channel]
        if abs(inside.mean() - outside.mean()) < _PLAIN:
            continue
        middle = (inside.mean() + outside.mean()) / 2
        apart = (inside > middle).mean() - (outside > middle).mean()
        best = max(best, abs(float(apart)))
    return f"yes, J {best:.2f}" if best > 0.5 else ""


# --- table ----------------------------------------------------------------------------


def main(
    run: str,
    out: Path,
    ngff: str | None = None,
    bioformats: str | None = None,
    vizarr: str | None = None,
) -> None:
    """Open every output of a run in other programs and libraries; compare the pixels.

    Args:
        run: Folder of `medray infer`.
        out: Folder for viewers.md and pictures.
        ngff: Folder of the schemas of OME-NGFF by version.
        bioformats: The file bioformats_package.jar.
        vizarr: The folder that `vite build` makes of Vizarr.
    """
    run, out = files.absolute(run), out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    places, (mask, row, classes) = make_outputs(run, out)
    mpp = row["mpp"] or 1.0
    lines = [
        f"| | {' | '.join(OUTPUTS.values())} |",
        f"| --- |{' --- |' * len(OUTPUTS)}",
    ]

    def add(title: str, cells: dict[str, str]) -> None:
        lines.append(f"| {title} | {' | '.join(cells.get(n, '') for n in OUTPUTS)} |")
        print(lines[-1], flush=True)

    if ngff:
        check = functools.partial(by_schemas, folder=ngff)
        cells = {name: tried(check, name, places[name], mask) for name in ZARRS}
        add("schemas of the specification, strict", cells)
    for package, does, check, takes in LIBRARIES:
        if check is by_rasterio:
            check = functools.partial(
                by_rasterio, downsample=row["downsample"], classes=classes
            )
        version = importlib.metadata.version(package)
        cells = {name: tried(check, name, places[name], mask) for name in takes}
        add(f"{package} {version} {does}", cells)
    if bioformats:
        version = run_bioformats(bioformats, "ImageInfo", "-version").split()[1]
        check = functools.partial(by_bioformats, jar=bioformats)
        cells = {name: tried(check, name, places[name], mask) for name in TIFFS}
        add(f"Bio-Formats {version} reads", cells)
    version = importlib.metadata.version("neuroglancer")
    cells = look_with(neuroglancer(), places, mpp)
    add(f"Neuroglancer {version} shows", cells)
    if (VIV / "page.js").exists():
        package = VIV.parent / "node_modules/@hms-dbmi/viv/package.json"
        version = json.loads(package.read_text())["version"]
        add(f"Viv {version} shows", look_with(viv(), places, mpp))
    if shutil.which("Xvfb"):
        version = importlib.metadata.version("napari")
        cells = look_with(napari(), places, mpp, ZARRS + TIFFS)
        add(f"napari {version} shows", cells)
        picture_of_napari(Path(places["ome-zarr"]), out / "napari.png")
    if vizarr:
        cells = look_with_vizarr(vizarr, places, mask, out, unit=mpp)
        add(f"Vizarr {cells['version']} shows", cells)
    (out / "viewers.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    harness.run(main)
