"""The command `medray`: parse, call one function, print, exit.

Exit codes: 0 success, 3 some slides failed (0 with --partial-ok), 2 wrong request, 1
failure; 130 or 143 when Ctrl-C or SIGTERM stopped it. A result with a `code` says its
own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from medray.apps import Request
from medray.apps import parse as parse
from medray.errors import ConfigError, MedrayError, StoppedError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    request = parse(argv)
    _set_up_logging(request.verbose)
    stdout = sys.stdout

    def announce(result: Any) -> None:
        values, words = _both(request.command, result)
        text = json.dumps(values, sort_keys=True) if request.json else words
        print(text, file=stdout, flush=True)

    name = f"medray {request.command}"
    try:
        # Ray prints what happens to its nodes; stdout is for the result.
        with contextlib.redirect_stdout(sys.stderr):
            result = request.run(announce)
    except StoppedError as error:
        return _say(
            request, 128 + error.signal, {"error": f"{error}"}, f"{name}: {error}"
        )
    except KeyboardInterrupt:
        said = "stopped by SIGINT; run the same command again to go on"
        return _say(request, 130, {"error": said}, f"{name}: {said}")
    except ConfigError as error:
        return _say(request, 2, {"error": f"{error}"}, f"{name}: {error}")
    except MedrayError as error:
        return _say(request, 1, {"error": f"{error}"}, f"{name}: {error}")
    some_failed = 0 if request.partial_ok else 3
    failed = getattr(result, "failed", {})
    code = getattr(result, "code", some_failed if failed else 0)
    return _say(request, code, *_both(request.command, result))


def script(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command as a process of its own."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names may be no Unicode
        sys.stdout.reconfigure(errors="backslashreplace")
    code = main(argv)
    # What Ray prints when it ends must not follow the result.
    sys.stdout = sys.stderr
    raise SystemExit(code)


def _both(command: str, result: Any) -> tuple[dict[str, Any], str]:
    """Return a result's values, and its text; the last line sums up for the command."""
    *lines, last = str(result).splitlines()
    return dataclasses.asdict(result), "\n".join([*lines, f"{command}: {last}"])


def _say(request: Request, code: int, values: dict[str, Any], words: str) -> int:
    """Print the result: JSON on stdout if asked, else words (errors on stderr)."""
    if request.json:
        print(json.dumps(values | {"exit_code": code}, sort_keys=True))
    else:
        print(words, file=sys.stderr if "error" in values else sys.stdout)
    return code


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
