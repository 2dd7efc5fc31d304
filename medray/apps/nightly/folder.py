"""Where a night's files lie below OUT."""

from __future__ import annotations

from medray.storage import files


def night_folder(out: str, night: str) -> str:
    """Return the folder of a night."""
    return files.join(out, "nights", night)


def summary_uri(out: str, night: str) -> str:
    """Return the file with which a night is committed."""
    return files.join(night_folder(out, night), "summary.json")


def is_committed(out: str, night: str) -> bool:
    """Return whether a night is committed."""
    return files.exists(summary_uri(out, night))


def last_night(out: str) -> str | None:
    """Return the last night that has begun; None if there is none."""
    for night in reversed(files.list_folder(files.join(out, "nights"))):
        if files.exists(files.join(night_folder(out, night), "night.json")):
            return night
    return None
