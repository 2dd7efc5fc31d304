"""What the tests of annotations share."""

import struct
import zlib
from pathlib import Path

from shapely.geometry import Polygon

from medray.annotations.polygons import Area
from medray.annotations.reading import read_annotation
from medray.classes import Classes

ONE = Classes()


TWO = Classes(("background", "tumour", "stroma"))


def svg(tmp_path: Path, body: str, head: str = 'viewBox="0 0 1000 1000"') -> str:
    path = tmp_path / "a.svg"
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" {head} '
        f'xmlns:inkscape="http://www.inkscape.org/namespaces/inkscape">{body}</svg>'
    )
    return str(path)


def read(uri: str, classes: Classes = ONE, size: int = 1000) -> list[Area]:
    return read_annotation(uri, height=size, width=size, classes=classes)


def only(areas: list[Area]) -> Polygon:
    assert len(areas) == 1
    assert areas[0].polygon.is_valid
    return areas[0].polygon


def png(height: int, width: int, depth: int, raw: bytes) -> bytes:
    """A grey PNG, byte by byte (PNG 3, section 11)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")
