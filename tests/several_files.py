"""Small slides of several files: 3DHISTECH MRXS and Hamamatsu VMS.

Both formats as OpenSlide documents them (openslide.org/formats).
"""

from __future__ import annotations

import struct
from pathlib import Path

import imagecodecs
import numpy as np
import numpy.typing as npt
from PIL import Image

from medray.geometry import Rectangle

UInt8 = npt.NDArray[np.uint8]
TILE = 128
_SLIDE_ID = "0123456789abcdef0123456789abcdef"


def write_mrxs(
    path: Path,
    pixels: UInt8,
    files: int = 3,
    mpp: float = 0.5,
    scanned: Rectangle | None = None,
) -> None:
    """Write a slide of two levels, whose sides are multiples of 256 pixels.

    The tiles lie in turn in the data files.

    Args:
        path: The MRXS.
        pixels: (height, width, 3), of the whole canvas.
        files: How many data files.
        mpp: Of level 0.
        scanned: Multiples of 256 pixels; tiles elsewhere are left out, so OpenSlide
            states it as the bounds. None: all is there.
    """
    scanned = scanned or Rectangle(0, 0, *pixels.shape[:2])
    folder = path.with_suffix("")
    folder.mkdir(parents=True)
    path.write_bytes(imagecodecs.jpeg8_encode(pixels[::8, ::8].copy()))
    rows, columns = (side // TILE for side in pixels.shape[:2])
    data = [bytearray(b"header of a data file") for _ in range(files)]
    levels: list[list[tuple[int, int, int, int]]] = []
    for level in range(2):
        step = 2**level
        entries = []
        for row in range(0, rows, step):
            for column in range(0, columns, step):
                y, x = row * TILE, column * TILE
                if not (
                    scanned.y <= y < scanned.bottom and scanned.x <= x < scanned.right
                ):
                    continue
                tile = pixels[y : y + TILE * step : step, x : x + TILE * step : step]
                code = imagecodecs.jpeg8_encode(
                    np.ascontiguousarray(tile), level=95, subsampling="444"
                )
                number = (row + column + level) % files
                place = len(data[number])
                entries.append((row * columns + column, place, len(code), number))
                data[number] += code
        levels.append(entries)
    for number, content in enumerate(data):
        (folder / f"Data{number:04}.dat").write_bytes(content)
    (folder / "Index.dat").write_bytes(_index(levels))
    ini = _ini(rows, columns, files, mpp)
    (folder / "Slidedat.ini").write_text(ini, encoding="utf-8-sig")


def _index(levels: list[list[tuple[int, int, int, int]]]) -> bytes:
    """Point to a record of each level, which points to a page of its tiles."""
    head = b"01.02" + _SLIDE_ID.encode()
    root = len(head) + 8
    at = root + 4 * len(levels)
    records, pointers = b"", []
    for entries in levels:
        pointers.append(at + len(records))
        records += struct.pack("<2i", 0, pointers[-1] + 8)
        records += struct.pack("<2i", len(entries), 0)
        records += b"".join(struct.pack("<4i", *entry) for entry in entries)
    others = at + len(records)
    head += struct.pack("<2i", root, others)
    return head + struct.pack(f"<{len(levels)}i", *pointers) + records + bytes(4)


def _ini(rows: int, columns: int, files: int, mpp: float) -> str:
    lines = ["[GENERAL]", "SLIDE_VERSION = 01.02", f"SLIDE_ID = {_SLIDE_ID}"]
    lines += [f"IMAGENUMBER_X = {columns}", f"IMAGENUMBER_Y = {rows}"]
    lines += ["OBJECTIVE_MAGNIFICATION = 20", "CameraImageDivisionsPerSide = 1"]
    lines += ["[HIERARCHICAL]", "HIER_COUNT = 1", "NONHIER_COUNT = 0"]
    lines += ["INDEXFILE = Index.dat", "HIER_0_NAME = Slide zoom level"]
    lines += ["HIER_0_COUNT = 2"]
    lines += [f"HIER_0_VAL_{i}_SECTION = LEVEL_{i}" for i in range(2)]
    lines += ["[DATAFILE]", f"FILE_COUNT = {files}"]
    lines += [f"FILE_{i} = Data{i:04}.dat" for i in range(files)]
    for level in range(2):
        lines += [f"[LEVEL_{level}]", "OVERLAP_X = 0", "OVERLAP_Y = 0"]
        lines += [
            f"MICROMETER_PER_PIXEL_{axis} = {mpp * 2**level}" for axis in ("X", "Y")
        ]
        lines += ["IMAGE_FORMAT = JPEG", "IMAGE_FILL_COLOR_BGR = 16777215"]
        lines += [f"DIGITIZER_WIDTH = {TILE}", f"DIGITIZER_HEIGHT = {TILE}"]
        lines += [f"IMAGE_CONCAT_FACTOR = {min(level, 1)}"]
    return "\r\n".join(lines) + "\r\n"


def write_vms(path: Path, pixels: UInt8) -> None:
    """Write a slide of one JPEG with a map and a macro; its sides 64's multiples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = path.stem
    width = pixels.shape[1]
    # A restart after each row of 8 x 8 blocks makes it a tile of its own.
    Image.fromarray(pixels).save(
        path.with_name(f"{stem}-image.jpg"),
        quality=95,
        subsampling=0,
        restart_marker_blocks=width // 8,
    )
    for name in ("map", "macro"):
        Image.fromarray(pixels[::4, ::4].copy()).save(
            path.with_name(f"{stem}-{name}.jpg"),
            quality=95,
            subsampling=0,
            restart_marker_blocks=width // 32,
        )
    lines = ["[Virtual Microscope Specimen]", "NoLayers=1"]
    lines += ["NoJpegColumns=1", "NoJpegRows=1", f"ImageFile={stem}-image.jpg"]
    lines += [f"MapFile={stem}-map.jpg", f"MacroImage={stem}-macro.jpg"]
    lines += [f"OptimisationFile={stem}.opt", "SourceLens=20"]
    nm = 500
    lines += [f"PhysicalWidth={width * nm}", f"PhysicalHeight={len(pixels) * nm}"]
    path.write_text("\r\n".join(lines) + "\r\n")
