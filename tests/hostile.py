"""Files that were made to do harm, from a seed; and a process that is fed with them.

Run as a program it reads paths from stdin and answers each with a line of JSON: what
came of it, in the way of a run's planning and reading.
"""

import io
import json
import random
import re
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import tifffile

NASTY = (0, 1, 2, 3, 7, 255, 65535, 2**31 - 1, 2**31, 2**32 - 1)
Mutant = tuple[str, bytes]


# --- TIFF -----------------------------------------------------------------------------


def tiff_seeds() -> list[bytes]:
    """Small slides of many layouts."""
    rng = np.random.default_rng(0)
    smooth = np.add.outer(np.arange(300), np.arange(260))[..., None] // 3
    pixels = (smooth + rng.integers(0, 60, (300, 260, 3))).clip(0, 255).astype(np.uint8)
    layouts: list[dict] = [
        {"tile": (64, 64), "compression": "jpeg"},
        {"tile": (64, 64), "compression": "deflate", "predictor": True},
        {"tile": (128, 128), "compression": "lzw"},
        {"rowsperstrip": 16, "compression": "zstd"},
        {"rowsperstrip": 300},
        {"tile": (64, 64), "compression": "jpeg2000"},
        {"tile": (64, 64), "planarconfig": "separate"},
    ]
    seeds = []
    for bigtiff, byteorder in ((False, "<"), (True, "<"), (False, ">")):
        for layout in layouts:
            data, options = pixels, dict(layout)
            if options.get("planarconfig"):
                data = np.ascontiguousarray(pixels.transpose(2, 0, 1))
            buffer = io.BytesIO()
            with tifffile.TiffWriter(
                buffer, bigtiff=bigtiff, byteorder=byteorder
            ) as tiff:
                common = {"photometric": "rgb", "metadata": None, **options}
                pyramid = "planarconfig" not in options
                tiff.write(
                    data,
                    resolution=(2e4, 2e4),
                    resolutionunit="CENTIMETER",
                    subifds=1 if pyramid else 0,
                    **common,
                )
                if pyramid:
                    tiff.write(pixels[::2, ::2], subfiletype=1, **common)
            seeds.append(buffer.getvalue())
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer,
        rng.integers(0, 256, (90, 80)).astype(np.uint8),
        photometric="palette",
        colormap=rng.integers(0, 65536, (3, 256)).astype(np.uint16),
    )
    seeds.append(buffer.getvalue())
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, ome=True, metadata={"axes": "YXS"})
    seeds.append(buffer.getvalue())
    return seeds


def _entries(data: bytes) -> Iterator[tuple[int, int, int, str]]:
    """Yield (offset, tag, size of the value field, byte order) of a TIFF's entries."""
    order = "<" if data[:2] == b"II" else ">"
    big = struct.unpack_from(f"{order}H", data, 2)[0] == 43
    at = struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, 8 if big else 4)[0]
    todo, seen = [at], set()
    while todo:
        at = todo.pop()
        if at in seen or not 0 < at < len(data) - 8:
            continue
        seen.add(at)
        count = struct.unpack_from(f"{order}{'Q' if big else 'H'}", data, at)[0]
        first, step = at + (8 if big else 2), 20 if big else 12
        for index in range(count):
            place = first + index * step
            tag = struct.unpack_from(f"{order}H", data, place)[0]
            yield place, tag, 8 if big else 4, order
            if tag == 330:
                value = place + (12 if big else 8)
                todo.append(
                    struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, value)[0]
                )
        end = first + count * step
        yield end, 0, 8 if big else 4, order  # where the next directory is
        todo.append(struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, end)[0])


def mutate_tiff(seed: bytes, rng: random.Random) -> bytes:
    data = bytearray(seed)
    entries = list(_entries(seed))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        kind = rng.choice(("value", "value", "count", "type", "tag", "next", "bytes"))
        place, tag, size, order = rng.choice(entries)
        code = f"{order}{'Q' if size == 8 else 'I'}"
        nasty = rng.choice((*NASTY, len(data) - 1, len(data), place, 8, 16))
        if kind == "next" or tag == 0:
            ends = [entry for entry in entries if entry[1] == 0]
            place = rng.choice(ends)[0]
            target = rng.choice((8, 16, place, len(data) - 4, 2**31, entries[0][0] - 2))
            struct.pack_into(code, data, place, target % 2 ** (8 * size))
        elif kind == "value":
            struct.pack_into(code, data, place + 4 + size, nasty)
        elif kind == "count":
            struct.pack_into(code, data, place + 4, nasty)
        elif kind == "type":
            struct.pack_into(f"{order}H", data, place + 2, rng.randrange(20))
        elif kind == "tag":
            tags = (256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 322, 323, 324)
            tags += (325, 330, 338, 339, 347, 320, 270, 254)
            struct.pack_into(f"{order}H", data, place, rng.choice(tags))
        else:
            for _ in range(rng.choice((1, 8, 64))):
                data[rng.randrange(len(data))] = rng.randrange(256)
    if rng.random() < 0.15:
        del data[rng.randrange(len(data)) :]
    return bytes(data)


def tiffs(count: int, rng: random.Random) -> Iterator[Mutant]:
    seeds = tiff_seeds()
    for index in range(count):
        yield f"{index:04d}.tif", mutate_tiff(rng.choice(seeds), rng)
    # Bombs: small files that declare or decode to very much.
    for index, side in enumerate((2**15, 2**19, 2**20, 2**21, 2**31 - 1)):
        buffer = io.BytesIO()
        tifffile.imwrite(
            buffer,
            np.zeros((256, 256, 3), np.uint8),
            photometric="rgb",
            tile=(256, 256),
            compression="deflate",
            metadata=None,
        )
        data = bytearray(buffer.getvalue())
        for place, tag, size, order in _entries(bytes(data)):
            if tag in (256, 257) or (index % 2 and tag in (322, 323)):
                code = f"{order}{'Q' if size == 8 else 'I'}"
                struct.pack_into(f"{order}H", data, place + 2, 4)
                struct.pack_into(code, data, place + 4 + size, side)
        yield f"bomb{index}.tif", bytes(data)


# --- annotations ----------------------------------------------------------------------

SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="300" height="260" '
    'viewBox="0 0 300 260"><g id="tumour" transform="translate(3,4) scale(1.5)">'
    '<path d="M10,10 C 40,5 60,80 20,90 Z"/><polygon points="100,100 150,100 120,160"/>'
    '<rect x="5" y="6" width="20" height="10"/><circle cx="80" cy="70" r="12"/>'
    '<use href="#tumour"/></g></svg>'
)
GEOJSON = {
    "type": "FeatureCollection",
    "features": [
        {
            "type": "Feature",
            "geometry": {
                "type": "Polygon",
                "coordinates": [[[10, 10], [90, 20], [50, 80], [10, 10]]],
            },
            "properties": {"classification": {"name": "tumour"}},
        },
        {
            "type": "Feature",
            "geometry": {
                "type": "MultiPolygon",
                "coordinates": [[[[100, 100], [150, 100], [120, 150], [100, 100]]]],
            },
            "properties": {"classification": {"name": "tumour"}},
        },
    ],
}
ASAP = (
    '<?xml version="1.0"?><ASAP_Annotations><Annotations><Annotation Name="a" '
    'Type="Polygon" PartOfGroup="tumour" Color="#F4FA58"><Coordinates>'
    '<Coordinate Order="0" X="10" Y="10"/><Coordinate Order="1" X="90.5" Y="20"/>'
    '<Coordinate Order="2" X="50" Y="80"/></Coordinates></Annotation></Annotations>'
    "</ASAP_Annotations>"
)


def _bad_text(text: str, rng: random.Random) -> str:
    kinds = ("number", "number", "number", "token", "cut", "double", "noise")
    kind = rng.choice(kinds)
    if len(text) < 20:
        return text + "<" * rng.randrange(9)
    if kind == "number" and any(c.isdigit() for c in text):
        spots = [i for i, c in enumerate(text) if c.isdigit()]
        at = rng.choice(spots)
        end = at + 1
        while end < len(text) and (text[end].isdigit() or text[end] == "."):
            end += 1
        values = ("NaN", "Infinity", "-1e308", "1e999", "9" * 400, "-0", "", "null")
        return text[:at] + rng.choice(values) + text[end:]
    if kind == "token":
        old = rng.choice(("tumour", "Polygon", "path", "points", "coordinates", "M10"))
        values = ("", "\x00", "<script>", "../../x", "A" * 5000, "\u202e", "&amp;")
        return text.replace(old, rng.choice(values), 1)
    if kind == "cut":
        return text[: rng.randrange(len(text))]
    if kind == "double":
        at = rng.randrange(len(text))
        return text[:at] + text[at:] * 2
    letters = list(text)
    for _ in range(rng.choice((1, 5, 40))):
        letters[rng.randrange(len(letters))] = chr(rng.randrange(1, 0x250))
    return "".join(letters)


def annotations(count: int, rng: random.Random) -> Iterator[Mutant]:
    seeds = ((".svg", SVG), (".geojson", json.dumps(GEOJSON)), (".xml", ASAP))
    for index in range(count):
        suffix, text = rng.choice(seeds)
        for _ in range(rng.choice((1, 1, 2, 3))):
            text = _bad_text(text, rng)
        yield f"{index:04d}{suffix}", text.encode("utf-8", "replace")
    lol = '<!ENTITY a "aaaaaaaaaa">'
    for level in range(10):
        lol += (
            f'<!ENTITY {"b" * (level + 1)} "{("&" + ("b" * level or "a") + ";") * 10}">'
        )
    entity = f"<!DOCTYPE svg [{lol}]><svg>&bbbbbbbbbb;</svg>"
    outside = '<!DOCTYPE s [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>'
    yield "entities.svg", entity.encode()
    yield "outside.svg", outside.encode()
    for name, depth in (("deep", 2000), ("deeper", 200_000)):
        yield (
            f"{name}.svg",
            (
                SVG[: SVG.index("<g")] + "<g>" * depth + "</g>" * depth + "</svg>"
            ).encode(),
        )
        yield f"{name}.geojson", ("[" * depth + "]" * depth).encode()
        nested = '{"type":"GeometryCollection","geometries":[' * depth
        yield (
            f"{name}_collection.geojson",
            ('{"type":"Feature","geometry":' + nested + "]}" * depth + "}").encode(),
        )
    bow = [[0, 0], [250, 250], [250, 0], [0, 250], [0, 0]]
    turns = 2.4 * np.arange(99)
    star = (125 + 99 * np.stack([np.cos(turns), np.sin(turns)], 1)).tolist()
    many = np.random.default_rng(0).random((1_000_000, 2)) * 250
    circle = np.linspace(0, 2 * np.pi, 1_000_000)
    round_ = np.stack([125 + 99 * np.cos(circle), 125 + 99 * np.sin(circle)], 1)
    for name, ring in (
        ("bow", bow),
        ("star", [*star, star[0]]),
        ("tangle", [*many[:5000].tolist(), many[0].tolist()]),
        ("millions", [*round_.tolist(), round_[0].tolist()]),
    ):
        geometry = {"type": "Polygon", "coordinates": [ring]}
        properties = {"classification": {"name": "tumour"}}
        feature = {"type": "Feature", "geometry": geometry, "properties": properties}
        yield f"{name}.geojson", json.dumps(feature).encode()


# --- models, settings, zarr -----------------------------------------------------------


def safetensors(count: int, rng: random.Random) -> Iterator[Mutant]:
    """Yield weights files whose headers lie."""
    header = {"conv.weight": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}
    for index in range(count):
        kind = rng.choice(
            ("length", "shape", "offsets", "dtype", "json", "cut", "pickle")
        )
        value = json.loads(json.dumps(header))
        entry = value["conv.weight"]
        if kind == "shape":
            entry["shape"] = [rng.choice(NASTY), rng.choice(NASTY)]
        elif kind == "offsets":
            entry["data_offsets"] = [rng.choice(NASTY), rng.choice(NASTY)]
        elif kind == "dtype":
            entry["dtype"] = rng.choice(("F8", "", "object", None, 7))
        text = json.dumps(value).encode()
        if kind == "json":
            text = text[: rng.randrange(len(text))]
        length = rng.choice((*NASTY, 2**63)) if kind == "length" else len(text)
        data = struct.pack("<Q", length) + text + bytes(64)
        if kind == "cut":
            data = data[: rng.randrange(len(data))]
        if kind == "pickle":
            data = b"\x80\x04\x95" + rng.randbytes(60)
        yield f"{index:04d}.safetensors", data


def yamls(count: int, rng: random.Random) -> Iterator[Mutant]:
    """Yield recipes with tags, aliases and values of the wrong kind."""
    text = "window: {size: 512, stride: 384}\ndata: {crop: 256}\nbatch: 8\nseed: 0\n"
    tags = (
        "!!python/object/apply:os.system ['touch pwned']",
        "!!python/name:os.system",
        "!!python/object/new:subprocess.Popen [['touch', 'pwned']]",
        "!include /etc/passwd",
        "!!binary aaaa",
    )
    for index in range(count):
        if index < len(tags):
            yield f"{index:04d}.yaml", f"batch: {tags[index]}\n".encode()
        elif index == len(tags):
            lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
            for i in range(1, 12):
                lines.append(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]")
            yield "laughs.yaml", "\n".join(lines).encode()
        else:
            yield f"{index:04d}.yaml", _bad_text(text, rng).encode("utf-8", "replace")


def zarrs(
    count: int, rng: random.Random, seed: dict[str, bytes]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield OME-Zarr slides whose metadata lie, as files by name."""
    for index in range(count):
        store = dict(seed)
        name = rng.choice([n for n in store if n.endswith("zarr.json")])
        text = store[name].decode()
        kind = rng.choice(("number", "text", "remove", "shard", "shape"))
        if kind == "remove":
            del store[rng.choice(list(store))]
        elif kind == "shard":
            shard = rng.choice([n for n in store if "/c/" in n])
            data = bytearray(store[shard])
            for _ in range(rng.choice((1, 20))):
                data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
            store[shard] = bytes(data[: rng.choice((len(data), len(data) // 2))])
        elif kind == "shape":
            for old in ("300", "260", "512", "2048"):
                text = text.replace(old, str(rng.choice((*NASTY, -1, 2**40))), 1)
            store[name] = text.encode()
        else:
            store[name] = _bad_text(text, rng).encode("utf-8", "replace")
        yield f"{index:04d}.ome.zarr", store


# --- the process that is fed ----------------------------------------------------------


def _probes(out: str) -> dict[str, Callable[[str], str]]:
    from medray.annotations.rasterize import rasterise
    from medray.annotations.reading import read_annotation
    from medray.classes import Classes
    from medray.execution.stage import plan_slide, read_region
    from medray.execution.tasks import (
        Failure,
        NotPlanned,
        Plan,
        SlideInput,
        SlideTask,
    )
    from medray.geometry import Windows
    from medray.inference.infer_run import stage_of
    from medray.inference.run import Options, RunSettings
    from medray.slides.discovery import find_slides
    from medray.slides.fingerprint import fingerprint_of
    from medray.slides.limits import bound_memory
    from medray.training.recipe import read_recipe

    bound_memory()
    settings = RunSettings(
        models=("m",),
        model_digest="d",
        classes=Classes(),
        windows=Windows(128, 96),
        model_mpp=0.5,
        options=Options(region=512),
    )
    stage = stage_of(settings, out)

    def slide(path: str) -> str:
        (found,) = find_slides([path])
        source = SlideInput(replace(found, mpp=0.5), "", fingerprint_of(found.uri))
        plan = plan_slide(stage, SlideTask(source))
        if isinstance(plan, NotPlanned):
            return plan.failure.why
        assert isinstance(plan, Plan)
        for task in (*plan.todo[:2], *plan.todo[-2:]):
            if isinstance(read := read_region(stage, task), Failure):
                return read.why
        return ""

    def annotation(path: str) -> str:
        areas = read_annotation(path, height=260, width=300, classes=Classes())
        place = {"y": 0, "x": 0, "height": 260, "width": 300}
        rasterise(areas, Classes(), **place)
        return ""

    def model(path: str) -> str:
        from medray.models.folder import load_model  # torch, which takes its time

        load_model(path)
        return ""

    def recipe(path: str) -> str:
        read_recipe(path, [])
        return ""

    return {"slide": slide, "annotation": annotation, "model": model, "recipe": recipe}


def _peak_mib() -> int:
    """Return this program's own peak: ru_maxrss begins with its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) >> 10


def main() -> None:
    from medray.errors import MedrayError

    probes = _probes(sys.argv[1])
    for line in sys.stdin:
        kind, path = line.rstrip("\n").split(" ", 1)
        if kind == "model":  # torch takes its time to load, which is no file's fault
            import medray.models.folder
            import medray.models.segmenters  # noqa: F401
        start, told = time.perf_counter(), "row"
        try:
            why = probes[kind](path)
            told = "row" if why else "success"
        except (MedrayError, MemoryError) as error:
            why = f"{type(error).__name__}: {error}"
        except Exception as error:
            told, why = "escaped", f"{type(error).__name__}: {error}"
        seconds = time.perf_counter() - start
        result = {"told": told, "why": why, "seconds": seconds, "peak_mib": _peak_mib()}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    sys.stdin.reconfigure(errors="surrogateescape")
    Path(sys.argv[1]).mkdir(exist_ok=True)
    main()
