"""The digest of a file's content, and its fingerprint: a quick check for changes."""

from __future__ import annotations

import hashlib

from medray.errors import MedrayError, SlideError
from medray.slides.members import slide_members
from medray.storage import files

_MIB = 1 << 20
_WHOLE, _LEAST = 64 * _MIB, 2 * _MIB


def slide_digest(uri: str) -> str:
    """Return the digest of a slide's content.

    Up to 64 MiB all of it counts; of a larger file its size, its first and last MiB and
    62 MiB spread evenly between them: enough to distinguish scans at a constant cost.
    The files of a slide of several share the 64 MiB, but each counts with 2 MiB or
    more; what they are called does not count. An OME-Zarr is named by its zarr.json and
    the names and sizes of its files.

    Returns:
        `blake2b:` and 32 hex digits.

    Raises:
        SlideError: It, or one of its files, is not there.
        StoreError: It cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        if uri.endswith(".zarr"):
            digest.update(files.read_bytes(files.join(uri, "zarr.json")))
            for name, size in files.list_files(uri).items():
                digest.update(f"/{name} {size}\n".encode())
        else:
            members = slide_members(uri)
            whole = max(_LEAST, _WHOLE // len(members))
            for member in members:
                starts, lengths = zip(*_parts(member.size, whole), strict=True)
                for data in files.read_ranges(member.uri, starts, lengths):
                    digest.update(data)
                digest.update(str(member.size).encode())
    except FileNotFoundError as error:
        raise SlideError(f"{uri}: cannot be read ({error})") from error
    return f"blake2b:{digest.hexdigest()}"


def scan_digest(digest: str) -> str:
    """Return the part of a slide's digest that names its bytes.

    A stage adds what the user says of the slide, and the digest of its annotation.
    """
    return digest.partition("+")[0]


def _parts(size: int, whole: int) -> list[tuple[int, int]]:
    """Return (start, length) of the parts of a file that count, up to `whole` bytes."""
    if size <= whole:
        return [(0, size)]
    last = whole // _MIB - 1
    step = (size - _MIB) // last
    return [(i * step, _MIB) for i in range(last)] + [(size - _MIB, _MIB)]


def slide_fingerprint(uri: str) -> str:
    """Return size and time of a slide: equal fingerprints mean that it was not touched.

    Of a slide of several files their sizes together, their number, and a digest of
    their names, sizes and times.

    Raises:
        FileNotFoundError: There is no such file.
        SlideError: One of its files is missing.
        StoreError: It cannot be looked at.
    """
    if uri.endswith(".zarr"):
        return files.fingerprint(files.join(uri, "zarr.json"))
    members = slide_members(uri)
    if len(members) == 1:
        return members[0].fingerprint
    digest = hashlib.blake2b(digest_size=8)
    for member in members:
        name = member.uri.rpartition("/")[2]
        digest.update(
            f"/{name} {member.fingerprint}\n".encode(errors="surrogateescape")
        )
    size = sum(member.size for member in members)
    return f"{size} {len(members)} files {digest.hexdigest()}"


def fingerprint_of(uri: str, annotation: str = "") -> str:
    """Return the fingerprint of a slide and of its annotation, if it has one.

    Returns:
        Empty when one cannot be looked at: opening it will report what is wrong.
    """
    try:
        fingerprint = slide_fingerprint(uri)
        return (
            f"{fingerprint} {slide_fingerprint(annotation)}"
            if annotation
            else fingerprint
        )
    except (MedrayError, OSError):
        return ""


def check_unchanged(uri: str, annotation: str, fingerprint: str) -> None:
    """Raise an error if a slide is no longer the file that was planned.

    Args:
        uri: Address of the slide.
        annotation: Address of its annotation; "": it has none.
        fingerprint: What `fingerprint_of` gave for both then.

    Raises:
        SlideError: It was replaced or written to.
    """
    now = fingerprint_of(uri, annotation)
    if fingerprint and now != fingerprint:
        raise SlideError(
            f"{uri}: it, or its annotation, changed while it was read (size and "
            f"time were {fingerprint}, are {now or 'not to be had'}); run "
            f"again when "
            f"it is complete"
        )
