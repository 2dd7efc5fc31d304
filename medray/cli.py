"""The command `medray`: parse, call one function, print, exit.

Exit codes: 0 success, 3 some slides failed (0 with --partial-ok), 2 wrong request, 1
failure; 130 or 143 when Ctrl-C or SIGTERM stopped it. A result with a `code` says its
own.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from medray.errors import ConfigError, MedrayError, StoppedError, TerminatedError

if TYPE_CHECKING:
    from medray.apps import Request

log = logging.getLogger("medray.cli")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    # Imported here: a signal meanwhile, a third of a second, is answered in words.
    from medray.apps import explain_failure, parse

    request = parse(argv)
    _set_up_logging(request.verbose)
    if sys.getfilesystemencoding() == "ascii":
        log.warning(
            "this system's locale knows ASCII only, so names with other letters are "
            "taken as bytes; set LC_ALL=C.UTF-8 or PYTHONUTF8=1"
        )
    stdout = sys.stdout

    def announce(result: Any) -> None:
        values, words = _both(request.command, result)
        text = json.dumps(values, sort_keys=True) if request.json else words
        _print(text, stdout)

    name = f"medray {request.command}"
    try:
        # Ray prints what happens to its nodes; stdout is for the result.
        with contextlib.redirect_stdout(sys.stderr):
            result = request.run(announce)
        values, words = _both(request.command, result)
    except StoppedError as error:
        return _say(
            request, 128 + error.signal, {"error": f"{error}"}, f"{name}: {error}"
        )
    except KeyboardInterrupt as error:
        stopped = _stopped(error)
        code, said = 128 + stopped.signal, f"{stopped}"
        return _say(request, code, {"error": said}, f"{name}: {said}")
    except ConfigError as error:
        return _say(request, 2, {"error": f"{error}"}, f"{name}: {error}")
    except MedrayError as error:
        return _say(request, 1, {"error": f"{error}"}, f"{name}: {error}")
    except Exception as error:
        said = explain_failure(error, request.command, verbose=request.verbose)
        return _say(request, 1, {"error": said}, f"{name}: {said}")
    some_failed = 0 if request.partial_ok else 3
    failed = getattr(result, "failed", {})
    code = getattr(result, "code", some_failed if failed else 0)
    return _say(request, code, values, words)


def script(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command as a process of its own."""
    _prepare_streams()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = main(argv)
    except KeyboardInterrupt as error:  # before there was a command, or after it
        stopped = _stopped(error)
        code = 128 + stopped.signal
        _print(f"medray: {stopped}", sys.stderr)
    except OSError as error:  # stdout is closed before help is printed, or full
        code = _not_printed(error, sys.stdout)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    for stream in (sys.stdout, sys.stderr):  # Python would end with 120
        try:
            stream.flush()
        except OSError as error:
            code = code or _not_printed(error, stream)
    is_stopped = code in (128 + signal.SIGINT, 128 + signal.SIGTERM)
    if is_stopped and "medray.execution.cluster" in sys.modules:
        _leave_ray(code)
    # What Ray prints when it ends must not follow the result.
    sys.stdout = sys.stderr
    for number in (signal.SIGTERM, signal.SIGINT):  # ends Ray's end, too
        signal.signal(number, signal.SIG_DFL)
    if "torch" in sys.modules:
        # All is written and said, and Python would take a second to take torch apart.
        atexit._run_exitfuncs()
        os._exit(code)
    raise SystemExit(code)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise TerminatedError


def _leave_ray(code: int) -> NoReturn:
    """End this process and the Ray that it has started, or was about to start.

    Shut down under a thread that asks things of it, Ray crashes the process, or ends it
    by a code of its own.
    """
    from medray.execution import cluster

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(code))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # everything has been said
    cluster.kill_workers()
    os._exit(code)


def _stopped(error: KeyboardInterrupt) -> StoppedError:
    """Return the error for a signal that nothing else has handled."""
    is_sigterm = isinstance(error, TerminatedError)
    number = signal.SIGTERM if is_sigterm else signal.SIGINT
    return StoppedError(number, "what was finished is kept")


def _prepare_streams() -> None:
    """Open missing output streams, and let them print any name."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who called: `>&-`
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names may be no Unicode
        sys.stdout.reconfigure(errors="backslashreplace")


def _both(command: str, result: Any) -> tuple[dict[str, Any], str]:
    """Return a result's values, and its text; the last line sums up for the command."""
    *lines, last = str(result).splitlines()
    return dataclasses.asdict(result), "\n".join([*lines, f"{command}: {last}"])


def _say(request: Request, code: int, values: dict[str, Any], words: str) -> int:
    """Print the result: JSON on stdout if asked, else words (errors on stderr).

    Returns:
        The exit code; 1 if a result of 0 cannot be printed for other reasons than a
        closed stream.
    """
    if request.json:
        words = json.dumps(values | {"exit_code": code}, sort_keys=True)
    to_stderr = "error" in values and not request.json
    printed = _print(words, sys.stderr if to_stderr else sys.stdout)
    return code or printed


def _print(text: str, stream: TextIO) -> int:
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        return _not_printed(error, stream)
    return 0


def _not_printed(error: OSError, stream: TextIO) -> int:
    """Print why something is not printed, and return the exit code for that.

    What is still in the stream goes nowhere, or Python would try once more at its end.
    """
    with contextlib.suppress(OSError, ValueError):  # in a test it may be no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if isinstance(error, BrokenPipeError):
        return 0
    with contextlib.suppress(OSError):
        said = error.strerror or error
        print(f"medray: what it has to say cannot be written ({said})", file=sys.stderr)
    return 1


def _set_up_logging(verbose: bool) -> None:
    logger = logging.getLogger("medray")
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.handlers.clear()
    logger.propagate = False
    if sys.stderr.isatty():
        # Imported here: it takes as long as all else of `medray --help`.
        from rich.console import Console
        from rich.logging import RichHandler

        handler: logging.Handler = RichHandler(
            console=Console(stderr=True), show_path=False, show_time=False
        )
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)


if __name__ == "__main__":
    script()
