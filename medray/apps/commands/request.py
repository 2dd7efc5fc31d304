"""A parsed command line: which command, and its arguments."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter

from medray.apps.commands.help import Page, page, shown_default
from medray.apps.commands.parser import Given, call, signature_of
from medray.apps.commands.table import COMMANDS


@dataclasses.dataclass(frozen=True)
class Request:
    """What a command line asks for.

    Attributes:
        command: One of `COMMANDS`.
        given: Values by parameter of what the command calls; no defaults.
        json: Print the result as JSON.
        verbose: Say more.
        partial_ok: Exit with 0, not 3, if some slides failed.
    """

    command: str
    given: Given
    json: bool = False
    verbose: bool = False
    partial_ok: bool = False

    def run(self, announce: Callable[[Any], None]) -> Any:
        """Call the command's function, and return its result.

        Args:
            announce: Prints what is there before the command ends.
        """
        command = COMMANDS[self.command]
        given = dict(self.given)
        if "announce" in command.changes:
            given["announce"] = announce
        if command.run is not None:
            return command.run(given)
        (function,) = command.functions
        return call(function, given)


_Verbose = Annotated[bool, Parameter(alias="-v")]


def _every_command(*, json: bool = False, verbose: _Verbose = False) -> None:
    """Define the options of every command.

    Args:
        json: Print the result as JSON.
        verbose: Say more.
    """


def _of_slides(*, partial_ok: bool = False) -> None:
    """Define the option of commands over slides that schedulers start.

    Args:
        partial_ok: Exit with 0, not 3, if some slides failed.
    """


def _tried_before(*, dry_run: bool = False) -> None:
    """Define the option of commands that take hours.

    Args:
        dry_run: Only report what would be done and what it would take; nothing is
            written.
    """


def parse(argv: Sequence[str] | None = None) -> Request:
    """Return what a command line asks for; print and exit where it asks for help.

    Raises:
        SystemExit: 0 after help or the version; 2 for a wrong command line, with what
            is wrong with it on stderr.
    """
    words = [*(sys.argv[1:] if argv is None else argv)]
    name = next((word for word in words if not word.startswith("-")), "")
    app = _build_app(name)
    try:
        function, bound, _ = app.parse_args(
            words or ["--help"], print_error=False, exit_on_error=False
        )
    except CycloptsError as error:
        error.verbose = False
        place = f"medray {name}" if name in COMMANDS else "medray"
        with contextlib.suppress(OSError):  # stderr is closed
            print(f"{place}: {error}\nHelp: {place} --help", file=sys.stderr)
        raise SystemExit(2) from None
    # rich ends a process whose reader has gone; that is no failure.
    with contextlib.suppress(SystemExit):
        if getattr(function, "__func__", None) is App.help_print:
            function(*bound.args, console=page())
        elif isinstance(found := function(*bound.args, **bound.kwargs), Request):
            return found
    raise SystemExit(0 if words else 2)


_ABOUT = """Pathology slides on Ray: ingest, train, infer, evaluate.

RAY_ADDRESS=HOST:6379 medray ... runs it on that cluster. The same command again goes on
where one was stopped. Exit codes: 0, 3 (some slides failed), 2 (wrong request), 1."""


def _build_app(name: str) -> App:
    """Build the parser of all commands; only one has its options."""
    app = App(
        name="medray",
        help=_ABOUT,
        version=lambda: f"medray {importlib.metadata.version('medray')}",
        default_parameter=Parameter(
            allow_repeating=True,  # the last one counts, as scripts expect it
            negative=(),
            show_default=shown_default,
        ),
        help_format="plaintext",
        help_formatter=Page(),
    )
    for number, (command, what) in enumerate(COMMANDS.items()):
        sub = App(name=command, help=what.text, version_flags=(), sort_key=number)
        app.command(sub)
        if command == name:
            sub.default(_request_of(name))
    return app


def _request_of(name: str) -> Callable[..., Request]:
    """Return the function from a command's parameters to the request."""
    command = COMMANDS[name]
    shared: list[Callable[..., Any]] = [_every_command]
    if command.partial_ok:
        shared.append(_of_slides)
    if command.dry_run:
        shared.append(_tried_before)
    signature = signature_of(command, shared)

    def request(*args: Any, **options: Any) -> Request:
        given = signature.bind_partial(*args, **options).arguments
        own = {"json", "verbose", "partial_ok"} & given.keys()
        return Request(name, given, **{key: given.pop(key) for key in own})

    request.__signature__ = signature  # type: ignore[attr-defined]
    request.__annotations__ = {
        p.name: p.annotation for p in signature.parameters.values()
    }
    return request
