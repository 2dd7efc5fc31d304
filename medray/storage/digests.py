"""Digests of contents: of bytes, and of folders by the files in them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

Digests = dict[str, str]
"""Digests of files by their path below a folder."""


def content_digest(data: bytes) -> str:
    """Return the digest of bytes: 32 hex digits of BLAKE2b (RFC 7693)."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def named_digest(data: bytes) -> str:
    """Return `blake2b:` and the `content_digest` of bytes."""
    return f"blake2b:{content_digest(data)}"


def digests_below(folder: str, written: Sequence[tuple[str, Digests]]) -> Digests:
    """Return digests by path below a folder, of those by path below its OME-Zarrs."""
    return {
        f"{uri[len(folder) + 1 :]}/{name}": digest
        for uri, digests in written
        for name, digest in digests.items()
    }


def merkle_root(digests: Digests) -> str:
    """Return the Merkle root of a folder's files.

    A file is named by its digest, a folder by the BLAKE2b digest of its entries' lines
    `DIGEST NAME`, sorted by name (Merkle 1987; as Git names trees).
    """
    folders: dict[str, Digests] = {}
    lines: Digests = {}
    for path, digest in digests.items():
        first, slash, rest = path.partition("/")
        if slash:
            folders.setdefault(first, {})[rest] = digest
        else:
            lines[first] = digest
    lines |= {name: merkle_root(inner) for name, inner in folders.items()}
    text = "".join(f"{digest} {name}\n" for name, digest in sorted(lines.items()))
    return content_digest(text.encode())
