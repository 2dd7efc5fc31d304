"""Command lines generated from functions, and the arguments that they pass.

What a function takes by position is an argument, what it takes by name an option. A
parameter that is a dataclass becomes the options of its fields. A sequence takes
several words, a tuple values between commas. Help is the first sentence of each
description; `groups.py` says where in the page it stands.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

from cyclopts import Parameter, Token

from medray.apps.commands.groups import GROUPS
from medray.apps.commands.signature import descriptions, read_function
from medray.errors import ConfigError

Given = dict[str, Any]
"""The values that a command line gives, by parameter; no defaults."""

POSITIONAL = inspect.Parameter.POSITIONAL_ONLY
ANYWHERE = inspect.Parameter.VAR_POSITIONAL
BY_NAME = inspect.Parameter.KEYWORD_ONLY


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """How an option differs from the parameter that it is generated from.

    Attributes:
        name: Of the option, such as `--class`.
        kind: POSITIONAL, ANYWHERE (words before and after the options) or BY_NAME.
        type: Of its value.
        parameter: What else cyclopts needs to know.
    """

    name: str | None = None
    kind: Any = None
    type: Any = None
    parameter: Parameter = dataclasses.field(default_factory=Parameter)


LEFT_OUT = None
"""Instead of a Change: a parameter that only Python has."""


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of `medray`.

    Attributes:
        text: What it does, for `medray --help`.
        functions: What it calls, `module:function`; their parameters are its options.
        changes: Of options, by parameter.
        run: Chooses the function and calls it with what is given; None: the only one.
        partial_ok: Whether --partial-ok is an option.
        dry_run: What `run` calls with --dry-run instead; their results are like those
            of `functions`. None: there is no such option.
    """

    text: str
    functions: tuple[str, ...]
    changes: Mapping[str, Change | None] = dataclasses.field(default_factory=dict)
    run: Callable[[Given], Any] | None = None
    partial_ok: bool = False
    dry_run: tuple[str, ...] = ()


def call(place: str, given: Given) -> Any:
    """Call a function with the arguments of a command line.

    Raises:
        ConfigError: An option is given that this function does not have.
    """
    module, _, name = place.partition(":")
    function = getattr(importlib.import_module(module), name)
    rest, values = dict(given), {}
    types_ = typing.get_type_hints(function)
    for parameter in inspect.signature(function).parameters:
        value = _taken(parameter, types_[parameter], rest)
        if value is not None:
            values[parameter] = value
    if rest:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(rest))
        raise ConfigError(f"{options}: does not go with what else is given")
    return function(**values)


def _taken(name: str, hint: Any, rest: Given) -> Any:
    """Take the arguments for a parameter, or for the fields of a dataclass.

    None is nothing: what has a default keeps it.
    """
    cls = _dataclass_of(hint)
    if cls is None:
        return rest.pop(name, None)
    hints = typing.get_type_hints(cls)
    values = {key: _taken(key, hint, rest) for key, hint in hints.items()}
    values = {key: value for key, value in values.items() if value is not None}
    return cls(**values) if values else None


def signature_of(command: Command, shared: Sequence[Callable[..., Any]]) -> Any:
    """Return the signature that a command line must fill, for cyclopts."""
    found: dict[str, inspect.Parameter] = {}
    left_out = [name for name, change in command.changes.items() if change is None]
    functions = [read_function(place, left_out) for place in command.functions]
    functions += shared
    for number, function in enumerate(functions):
        for parameter in _options(function):
            if number and parameter.default is _EMPTY:  # what only others need
                kind, how = typing.get_args(parameter.annotation)
                parameter = parameter.replace(
                    default=None, annotation=Annotated[kind | None, how]
                )
            found.setdefault(parameter.name, parameter)
    for name, change in command.changes.items():
        if change is not None:
            found[name] = _changed(found[name], change)
    ordered = sorted(found.values(), key=lambda p: (p.kind, p.default is not _EMPTY))
    return inspect.Signature(ordered)


_EMPTY = inspect.Parameter.empty


def _options(documented: Any) -> Iterable[inspect.Parameter]:
    """Yield the parameters of a function, those of dataclasses field by field."""
    helps = descriptions(documented)
    hints = typing.get_type_hints(documented, include_extras=True)
    for parameter in inspect.signature(documented).parameters.values():
        name, hint = parameter.name, hints[parameter.name]
        if cls := _dataclass_of(hint):
            yield from _options(cls)
            continue
        by_name = parameter.kind is BY_NAME or dataclasses.is_dataclass(documented)
        kind, words = _words_of(hint)
        how = Parameter.combine(Parameter(help=helps[name], group=GROUPS[name]), words)
        yield parameter.replace(
            kind=BY_NAME if by_name else POSITIONAL, annotation=Annotated[kind, how]
        )


def _words_of(hint: Any) -> tuple[Any, Parameter]:
    """Return the type that the words of an option have, and how they are read."""
    for member in typing.get_args(hint) if _is_union(hint) else (hint,):
        origin = typing.get_origin(member)
        if origin is tuple:
            return hint, COMMAS
        if isinstance(origin, type) and issubclass(origin, Sequence):
            return list[str], Parameter(consume_multiple=True)
        if member is int:
            return hint, Parameter(converter=_whole)
    return hint, Parameter()


def _changed(parameter: inspect.Parameter, change: Change) -> inspect.Parameter:
    kind = change.kind or parameter.kind
    type_, how = typing.get_args(parameter.annotation)
    more = Parameter(name=change.name) if change.name else Parameter()
    return parameter.replace(
        kind=kind,
        annotation=Annotated[
            change.type or type_, Parameter.combine(how, more, change.parameter)
        ],
        default=_EMPTY if kind is ANYWHERE else parameter.default,
    )


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _dataclass_of(annotation: Any) -> type[Any] | None:
    """Return the dataclass that a type is, also as an optional one."""
    members = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    found = (m for m in members if isinstance(m, type) and dataclasses.is_dataclass(m))
    return next(found, None)


def _split(type_: Any, tokens: Sequence[Token]) -> Any:
    """Convert values between commas."""
    from cyclopts import convert

    (token,) = tokens
    parts = [part.strip() for part in token.value.split(",")]
    return convert(type_, [token.evolve(value=part) for part in parts])


def _whole(_: Any, tokens: Sequence[Token]) -> int:
    """Convert a whole number; cyclopts rounds others."""
    try:
        return int(tokens[0].value)
    except ValueError as error:
        raise ValueError(f"expected a whole number, found {tokens[0].value}") from error


COMMAS = Parameter(converter=_split, n_tokens=1, metavar="A,B")
