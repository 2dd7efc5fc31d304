"""Which images or slides a model has seen: a list in its folder. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from medray.storage import files


def write_seen(folder: str, seen: Mapping[str, str]) -> None:
    """Write the list of the images or slides that a model was trained or validated on.

    Args:
        folder: Of the model, or of a run of it.
        seen: By digest "train", if the weights have learned from it (also those that
            the training started with), or "val", if it only chose the epoch.
    """
    text = "".join(f"{digest} {how}\n" for digest, how in sorted(seen.items()))
    files.write_bytes(files.join(folder, "seen.txt"), text.encode())


def read_seen(folder: str) -> dict[str, str]:
    """Read what `write_seen` wrote; {} if there is no such file.

    Where an older medray wrote no more than the digests, they count as "train".
    """
    uri = files.join(folder, "seen.txt")
    if not files.exists(uri):
        return {}
    lines = files.read_bytes(uri).decode().splitlines()
    parts = (line.partition(" ") for line in lines if line)
    return {digest: how or "train" for digest, _, how in parts}


def with_seen(seen: Mapping[str, str], more: Mapping[str, str]) -> dict[str, str]:
    """Return what two have seen; "train" in one overrides "val" in the other."""
    learned = {digest for digest, how in [*seen.items(), *more.items()] if how != "val"}
    return dict.fromkeys((*seen, *more), "val") | dict.fromkeys(
        sorted(learned), "train"
    )


def seen_by(folders: Sequence[str]) -> dict[str, str] | None:
    """Return what all of some models together have seen.

    Args:
        folders: Of models, or of runs.

    Returns:
        As `write_seen` takes it; None if one of the folders has no such list.
    """
    seen: dict[str, str] = {}
    for folder in folders:
        if not files.exists(files.join(folder, "seen.txt")):
            return None
        seen = with_seen(seen, read_seen(folder))
    return seen
