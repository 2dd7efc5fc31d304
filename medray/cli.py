"""The command `medray`: parse, call one function, print, exit.

Exit codes: 0 success, 3 some slides failed (0 with --partial-ok), 2 wrong request, 1
failure; 130 or 143 when Ctrl-C or SIGTERM stopped it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import io
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from medray.apps import COMMANDS
from medray.errors import ConfigError, MedrayError, StoppedError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = parse(argv)
    _set_up_logging(args.verbose)
    stdout = sys.stdout

    def announce(result: Any) -> None:
        values, words = _both(args.command, result)
        text = json.dumps(values, sort_keys=True) if args.json else words
        print(text, file=stdout, flush=True)

    args.announce = announce
    try:
        # Ray prints what happens to its nodes; stdout is for the result.
        with contextlib.redirect_stdout(sys.stderr):
            result = COMMANDS[args.command].run(args)
    except StoppedError as error:
        said = f"medray {args.command}: {error}"
        return _say(args, 128 + error.signal, {"error": f"{error}"}, said)
    except KeyboardInterrupt:
        said = "stopped by SIGINT; run the same command again to go on"
        return _say(args, 130, {"error": said}, f"medray {args.command}: {said}")
    except ConfigError as error:
        return _say(args, 2, {"error": f"{error}"}, f"medray {args.command}: {error}")
    except MedrayError as error:
        return _say(args, 1, {"error": f"{error}"}, f"medray {args.command}: {error}")
    some_failed = 0 if getattr(args, "partial_ok", False) else 3
    failed = getattr(result, "failed", {})
    code = getattr(result, "code", some_failed if failed else 0)
    return _say(args, code, *_both(args.command, result))


def script(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command as a process of its own."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names may be no Unicode
        sys.stdout.reconfigure(errors="backslashreplace")
    code = main(argv)
    # What Ray prints when it ends must not follow the result.
    sys.stdout = sys.stderr
    raise SystemExit(code)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; changed keys of a recipe may also follow the options.

    argparse would only take them beside the recipe itself.
    """
    parser = _build_parser()
    args, rest = parser.parse_known_args(argv)
    if "overrides" in args and not any(word.startswith("-") for word in rest):
        args.overrides = [*args.overrides, *rest]
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="medray",
        description="Pathology slides on Ray: ingest, train, infer, evaluate.",
        allow_abbrev=False,
    )
    version = importlib.metadata.version("medray")
    parser.add_argument("--version", action="version", version=f"medray {version}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        text = command.text
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        sub.add_argument("-v", "--verbose", action="store_true", help="say more")
        command.add(sub)
    return parser


def _both(command: str, result: Any) -> tuple[dict[str, Any], str]:
    """Return a result's values, and its text; the last line sums up for the command."""
    *lines, last = str(result).splitlines()
    return dataclasses.asdict(result), "\n".join([*lines, f"{command}: {last}"])


def _say(
    args: argparse.Namespace, code: int, values: dict[str, Any], words: str
) -> int:
    """Print the result: JSON on stdout if asked, else words (errors on stderr)."""
    if args.json:
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
