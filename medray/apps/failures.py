"""The message of a command for an unexpected exception."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback

# What a machine or its owner lacks or forbids; other numbers may be medray's own fault.
_OF_THE_MACHINE = {
    errno.ENOSPC: "free some, or name a place that has it",
    errno.EDQUOT: "free some of the quota, or name another place",
    errno.EROFS: "name a place that can be written",
    errno.EACCES: "give this user permission, or name another place",
    errno.EPERM: "give this user permission, or name another place",
    errno.EMFILE: "raise the number of open files (`ulimit -n`)",
    errno.ENFILE: "this machine has too many open files; end others that have some",
    errno.ENOMEM: "give it more memory, or ask for less at a time",
    errno.EIO: "the disk or its connection fails; see what the system says (`dmesg`)",
    errno.EPIPE: "who read this has gone",
}


def explain_failure(error: Exception, command: str, *, verbose: bool = False) -> str:
    """Return a sentence on an exception that is no MedrayError.

    Of what lies outside medray it says what to do; of all else it names a file with the
    trace, which is written for it.

    Args:
        error: What was raised.
        command: That was run.
        verbose: Print the trace too.
    """
    said = _of_the_world(error)
    place = None if said else _keep_trace(error, command)
    if verbose or not (said or place):
        traceback.print_exception(error)
    if said:
        return said
    where = f"the trace is in {place}" if place else "the trace is above"
    return (
        f"unexpected: {type(error).__name__}: {_line(error)}; {where}; please report it"
    )


def _of_the_world(error: BaseException) -> str:
    """Return the message for an exception from outside medray; "" for any other."""
    # Ray wraps up what its tasks raise.
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception) and cause is not error:
        return _of_the_world(cause)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return (
            f"not enough memory ({_line(error)}); give it more, or ask for less at a "
            f"time: `medray plan` estimates what a run needs"
        )
    if isinstance(error, ImportError) and not (error.name or "").startswith("medray"):
        return (
            f"a package is missing or does not fit ({_line(error)}); install medray "
            f"with the extra that has it, and by constraints.txt; `medray doctor` "
            f"compares versions"
        )
    if isinstance(error, UnicodeEncodeError):
        return (
            f"a name or text is no Unicode ({ascii(error.object)[:100]}); rename the "
            f"file, or set PYTHONUTF8=1 if this system's names are UTF-8"
        )
    if isinstance(error, OSError) and (mend := _OF_THE_MACHINE.get(error.errno or 0)):
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}; {mend}"
    if _is_of_ray(error):
        return (
            f"Ray failed ({type(error).__name__}: {_line(error)}); see that its "
            f"processes and nodes run (`ray status`, `medray doctor`), then run the "
            f"same command again to go on"
        )
    return ""


def _is_of_ray(error: BaseException) -> bool:
    """Return whether this is an error of Ray's own, not of what it ran."""
    kinds = sys.modules.get("ray.exceptions")  # where Ray was not used it is not there
    if kinds is None:
        return False
    own: bool = isinstance(error, kinds.RayError)
    return own and not isinstance(error, kinds.RayTaskError)


def _line(error: BaseException) -> str:
    """Return an exception's message in one line of bounded length."""
    return " ".join(f"{error}".split())[:300] or "no message"


def _keep_trace(error: Exception, command: str) -> str | None:
    """Write the trace to a file of its own and return its path; None: it cannot be."""
    try:
        state = os.environ.get("XDG_STATE_HOME")
        folder = os.path.join(state, "medray") if state else tempfile.gettempdir()
        os.makedirs(folder, exist_ok=True)
        number, path = tempfile.mkstemp(".log", f"medray-{command}-", folder)
        with os.fdopen(number, "w", errors="backslashreplace") as file:
            file.write("".join(traceback.format_exception(error)))
    except OSError:
        return None
    return path
