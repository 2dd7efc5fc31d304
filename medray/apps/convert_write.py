"""One slide's copy, written in the format of a viewer."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tifffile

from medray.classes import Classes
from medray.errors import MedrayError, SlideError
from medray.geometry import plan_regions
from medray.slides import Slide, Working, open_slide, read_working, slide_digest
from medray.storage import files, group_attributes, ngff, ngff_v04, ome_zarr
from medray.types import UInt8

FORMATS: dict[str, str] = {
    "ome-zarr": ".ome.zarr",
    "ome-zarr-0.4": ".ome.zarr",
    "ome-tiff": ".ome.tif",
    "tiff": ".tif",
}
"""What each format's files end in."""

MASK = "mask"
"""Name of a run's mask among the label images of an image."""


@dataclass(frozen=True)
class Layer:
    """A label image.

    Attributes:
        name: Among those of its image.
        uri: Its OME-Zarr.
        classes: Names and colours of its values.
    """

    name: str
    uri: str
    classes: Classes


@dataclass(frozen=True)
class Copy:
    """What a slide's copy is made of.

    Attributes:
        slide: Its id.
        digest: Of the slide that the labels belong to.
        image: The file or OME-Zarr with its pixels; "" to leave them out.
        working: How the image is read, so that it lies under the labels.
        layers: Its label images, the first of which stands alone without an image.
        scene: Which of several slides in the image's file, if the user chose.
        plane: Which of several focal planes, if the user chose.
    """

    slide: str
    digest: str
    image: str
    working: Working
    layers: tuple[Layer, ...]
    scene: int | None = None
    plane: int | None = None

    @property
    def made_of(self) -> str:
        """Return a digest of the contents: equal digests, equal copies."""
        roots = [group_attributes.read_root(layer.uri) or "" for layer in self.layers]
        return "+".join([self.digest, *roots])


def target_uri(slide: str, to: str, out: str) -> str:
    """Return where the copy of a slide lies."""
    return files.join(out, f"{slide}{FORMATS[to]}")


def write_copy(copy: Copy, to: str, out: str) -> None:
    """Write one copy; nothing of it is left where that fails.

    Raises:
        MedrayError: The mask or the image cannot be read, or the copy not be written.
    """
    target = target_uri(copy.slide, to, out)
    try:
        if to in ("ome-tiff", "tiff"):
            _write_tiff(copy, target, ome=to == "ome-tiff")
        elif to == "ome-zarr":
            _write_05(copy, target)
        else:
            _write_04(copy, target)
    except Exception as error:  # whatever it is, it costs this copy
        with contextlib.suppress(MedrayError):
            files.remove(target)  # half of a copy, or one of what was before
        raise MedrayError(f"{error}") from error
    for name in files.list_files(target):
        files.sync(files.join(target, name))


class _Image:
    """A slide at its working level, (3, y, x) uint8, read in parts."""

    def __init__(self, slide: Slide, working: Working) -> None:
        self._slide, self._working = slide, working
        self.shape: tuple[int, ...] = (3, working.height, working.width)

    def __getitem__(self, selection: Any) -> UInt8:
        rows, columns = selection[-2:]
        size = (rows.stop - rows.start, columns.stop - columns.start)
        # What is unreadable is white here as it was for the model.
        pixels, _, _ = read_working(
            self._slide, self._working, rows.start, columns.start, *size
        )
        return pixels.transpose(2, 0, 1)


def _image_of(copy: Copy) -> _Image:
    """Open a copy's image, if it is what the mask was made of.

    Raises:
        SlideError: It is another now, or is not there.
    """
    slide, _, _ = copy.digest.partition("+")  # after it that of an annotation
    own = copy.image.endswith(".ome.zarr")  # a dataset's, made of the slide
    if not own and slide_digest(copy.image) != slide:
        raise SlideError(
            f"{copy.image}: is not the file that the mask was made of; put that back, "
            f"or run `medray infer` again"
        )
    return _Image(
        open_slide(copy.image, scene=copy.scene, plane=copy.plane), copy.working
    )


def _write_05(copy: Copy, target: str) -> None:
    image, working = _image_of(copy), copy.working
    size = (working.height, working.width)
    about: Any = {"mpp": working.mpp, "attributes": _provenance(copy)}
    files.remove(target)
    ome_zarr.create_image(target, *size, name=copy.slide, **about)
    _fill_05(target, image)
    ome_zarr.list_labels(target, [layer.name for layer in copy.layers])
    for layer in copy.layers:
        uri = files.join(target, "labels", layer.name)
        ome_zarr.create_labels(
            uri,
            *size,
            name=layer.name,
            classes=layer.classes,
            source="../../",
            **about,
        )
        _fill_05(uri, ome_zarr.open_level(layer.uri))


def _fill_05(uri: str, pixels: ngff_v04.Readable) -> None:
    for region in plan_regions(pixels.shape[-2], pixels.shape[-1], ome_zarr.REGION):
        ome_zarr.write_region(uri, region, pixels[..., *region.slices()])
    ome_zarr.build_pyramid(uri)


def _write_04(copy: Copy, target: str) -> None:
    mpp, about = copy.working.mpp, _provenance(copy)
    levels = len(ome_zarr.level_shapes(copy.working.height, copy.working.width))
    if not copy.image:
        (layer,) = copy.layers
        ome = ngff.labels_metadata(
            levels, mpp=mpp, name=copy.slide, classes=layer.classes
        )
        ngff_v04.write(target, ome_zarr.open_level(layer.uri), ome, about)
        return
    ome = ngff.image_metadata(levels, mpp=mpp, name=copy.slide)
    ngff_v04.write(target, _image_of(copy), ome, about)
    if copy.layers:
        ngff_v04.list_labels(target, [layer.name for layer in copy.layers])
    for layer in copy.layers:
        ome = ngff.labels_metadata(
            levels, mpp=mpp, name=layer.name, classes=layer.classes, source="../../"
        )
        uri = files.join(target, "labels", layer.name)
        ngff_v04.write(uri, ome_zarr.open_level(layer.uri), ome, about)


def _provenance(copy: Copy) -> dict[str, Any]:
    """Return the provenance attributes of the copied mask."""
    found = [group_attributes.read_attributes(layer.uri) for layer in copy.layers]
    return {"kind": "copy", "of": found[0] if found else copy.slide}


def _write_tiff(copy: Copy, target: str, *, ome: bool) -> None:
    """Write a mask as a pyramid of tiled, deflated label values.

    Levels are SubIFDs of the first (OME-TIFF, "sub-resolutions"), or pages marked as
    reduced (TIFF 6.0, NewSubfileType): Bio-Formats looks for the former, ASAP and
    OpenSlide for the latter.
    """
    if not copy.layers:
        raise SlideError(f"{copy.slide}: has no annotation that could be written")
    layer, mpp = copy.layers[0], copy.working.mpp
    shapes = ome_zarr.level_shapes(copy.working.height, copy.working.width)
    names = {str(value): name for value, name in enumerate(layer.classes.names)}
    folder, name = os.path.split(target)
    partial = files.join(folder, f"{files.PARTIAL}{name}")
    about: dict[str, Any] = {"metadata": None}
    if ome:
        about["metadata"] = {"axes": "YX", "Name": copy.slide, "MapAnnotation": names}
        if mpp:
            about["metadata"] |= {
                f"PhysicalSize{axis}{what}": value
                for axis in "XY"
                for what, value in (("", mpp), ("Unit", "µm"))
            }
        about["subifds"] = len(shapes) - 1
    else:
        about["description"] = ", ".join(f"{v} {name}" for v, name in names.items())
    try:
        with tifffile.TiffWriter(partial, ome=ome) as tiff:
            for level, shape in enumerate(shapes):
                per_cm = None if mpp is None else 1e4 / (mpp * 2**level)
                tiff.write(
                    _tiles(ome_zarr.open_level(layer.uri, level)),
                    shape=shape,
                    dtype="uint8",
                    tile=(ome_zarr.PATCH, ome_zarr.PATCH),
                    compression="adobe_deflate",
                    photometric="minisblack",
                    resolution=None if per_cm is None else (per_cm, per_cm),
                    resolutionunit=None if per_cm is None else "centimeter",
                    subfiletype=int(level > 0),
                    maxworkers=1,
                    **(about if level == 0 else {"metadata": None}),
                )
        files.sync(partial)
        os.replace(partial, target)
    finally:
        files.remove(partial)


def _tiles(labels: ome_zarr.Pixels) -> Iterator[UInt8]:
    """Yield the tiles of a level, row by row, each whole."""
    side = ome_zarr.PATCH
    for part in plan_regions(labels.shape[0], labels.shape[1], side):
        tile = labels[part.slices()]
        missing = [(0, side - length) for length in tile.shape]
        yield np.pad(tile, missing)
