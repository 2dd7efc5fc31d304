"""Plain values as frozen dataclasses, with errors that name the key."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from medray.errors import ConfigError

_EXPECTED = {
    **dict.fromkeys(("bool_parsing", "bool_type"), "true or false"),
    **dict.fromkeys(("float_parsing", "float_type"), "a number"),
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "a whole number"),
    "string_type": "a text",
    "tuple_type": "a list",
    "finite_number": "a finite number",
    "too_short": "a list of {min_length} items or more",
    "too_long": "a list of at most {max_length} items",
    "dataclass_type": "a mapping of keys to values",
    "missing": "a value",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number of {ge:g} or more",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "a number up to {le:g}",
}


_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    tuple: "a list",
}


_SERVES_AS: dict[type, set[type]] = {bool: {bool}, int: {int, float}, float: {float}}
"""The types that a number or a boolean may be read as."""


def from_dict[T](cls: type[T], values: dict[str, Any], source: str) -> T:
    """Return dataclass `cls` made of plain values; `source` is named in errors.

    A dataclass whose fields had other names in older files says so in its class
    variable `RENAMED`, by the old name; what is read has the new ones.

    Raises:
        ConfigError: An unknown key (with the nearest known one) or a wrong value.
    """
    values = renamed(cls, values, source)
    _refuse_unknown_keys(cls, values, source, "")
    values = _checked(cls, values, source, "")
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        problem = _as_text(error.errors(include_url=False), values)
        raise ConfigError(f"{source}: {problem}") from error


def _as_text(errors: typing.Sequence[ErrorDetails], values: Any) -> str:
    """Return what is wrong on one line: each key, what it expects and what it has."""
    expected: dict[str, list[str]] = {}
    found: dict[str, str] = {}
    for error in errors:
        if error["type"] == "value_error":  # of a check of our own, which says it all
            expected[" ".join(str(error["ctx"]["error"]).split())] = []
            continue
        key = _key(error["loc"], values)
        said = error["msg"].removeprefix("Input should be ")
        if error["type"] in _EXPECTED:
            said = _EXPECTED[error["type"]].format(**error.get("ctx", {}))
        expected.setdefault(key, []).append(said)
        missing = error["type"] == "missing"
        found.setdefault(key, "none" if missing else f"{error['input']!r}"[:200])
    return "; ".join(
        f"{key}: expected {' or '.join(said)}, found {found[key]}" if said else key
        for key, said in expected.items()
    )


def _key(loc: typing.Sequence[int | str], values: Any) -> str:
    """Return a place in nested values as a key; the types of a union are left out."""
    key = ""
    for part in loc:
        if isinstance(values, dict):
            key += f".{part}"
            values = values.get(part)
        elif isinstance(values, (list, tuple)) and isinstance(part, int):
            key += f"[{part}]"
            values = values[part] if part < len(values) else None
    return key.removeprefix(".")


def _hints(cls: Any) -> dict[str, Any]:
    """Return the types of a dataclass's fields; of anything else none."""
    if not dataclasses.is_dataclass(cls):
        return {}
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def renamed(cls: Any, values: Any, source: str, prefix: str = "") -> Any:
    """Return plain values of `cls` with the names that its fields have now.

    Raises:
        ConfigError: A field has two values, by its old name and by its new one.
    """
    if not dataclasses.is_dataclass(cls) or not isinstance(values, dict):
        return values
    values = dict(values)
    for old, new in getattr(cls, "RENAMED", {}).items():
        if old not in values:
            continue
        value = values.pop(old)
        if values.setdefault(new, value) != value:
            raise ConfigError(
                f"{source}: {prefix}{old} is called {prefix}{new} now; expected one of "
                f"them, found {value!r} and {values[new]!r}"
            )
    for key, hint in _hints(cls).items():
        if key in values:
            for inner in _options(hint):
                values[key] = renamed(inner, values[key], source, f"{prefix}{key}.")
    return values


def names_now(cls: Any, keys: typing.Sequence[str]) -> list[str]:
    """Return the keys that lead to a value with the names that they have now."""
    names = []
    for key in keys:
        names.append(getattr(cls, "RENAMED", {}).get(key, key))
        inner = _options(_hints(cls).get(names[-1]))
        cls = next(filter(dataclasses.is_dataclass, inner), None)
    return names


def _options(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the one type."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _checked(hint: Any, value: Any, source: str, key: str) -> Any:
    """Return plain values of type `hint`, with a text that is a number as the number.

    pydantic must convert, because YAML reads 1e-4 as a text and a tuple as a list. What
    else it would convert is refused here.

    Raises:
        ConfigError: A number or a boolean of another type, or a list of another length.
    """
    options = _options(hint)
    if isinstance(value, dict):
        kind = next(filter(dataclasses.is_dataclass, options), None)
        hints = _hints(kind)
        return {
            name: _checked(hints.get(name), item, source, f"{key}.{name}")
            for name, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        kind = next((o for o in options if typing.get_origin(o) is tuple), None)
        return _checked_items(typing.get_args(kind), value, source, key)
    if isinstance(value, str) and float in options and str in options:
        return _number(value)
    wanted = {bool, int, float} & {*options}
    if wanted and not wanted & _SERVES_AS.get(type(value), wanted):
        kinds = [typing.get_origin(option) or option for option in options]
        expected = " or ".join(_NAMES[kind] for kind in kinds if kind in _NAMES)
        raise ConfigError(
            f"{source}: {key.removeprefix('.')}: expected {expected}, found {value!r}"
        )
    return value


def _checked_items(
    hints: tuple[Any, ...], items: typing.Sequence[Any], source: str, key: str
) -> list[Any]:
    """Return the items of a tuple with these type arguments, each checked."""
    if hints[1:] == (...,):
        hints = hints[:1] * len(items)
    elif not hints:  # no tuple is wanted, which pydantic says
        hints = (None,) * len(items)
    if len(hints) != len(items):
        raise ConfigError(
            f"{source}: {key.removeprefix('.')}: expected a list of {len(hints)} "
            f"items, found {list(items)!r}"
        )
    return [
        _checked(hint, item, source, f"{key}[{index}]")
        for index, (hint, item) in enumerate(zip(hints, items, strict=True))
    ]


def _number(text: str) -> float | str:
    """Return the finite number that a text is, or else the text."""
    try:
        number = float(text)
    except ValueError:
        return text
    return number if math.isfinite(number) else text


def _refuse_unknown_keys(
    cls: type[Any], values: dict[str, Any], source: str, prefix: str
) -> None:
    """Raise an error that names an unknown key and its nearest match."""
    hints = _hints(cls)
    for key, value in values.items():
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else "remove it"
            raise ConfigError(
                f"{source}: unknown key {prefix}{key}; {hint} "
                f"(known here: {', '.join(hints)})"
            )
        options = typing.get_args(hints[key]) or (hints[key],)
        for option in options:
            if not dataclasses.is_dataclass(option):
                continue
            inner = typing.cast(type[Any], option)
            if typing.get_origin(hints[key]) is tuple:
                _refuse_wrong_items(inner, value, source, f"{prefix}{key}")
            elif isinstance(value, dict):
                _refuse_unknown_keys(inner, value, source, f"{prefix}{key}.")


def _refuse_wrong_items(cls: type[Any], items: Any, source: str, name: str) -> None:
    """Raise an error for what is not a list of mappings with the keys of `cls`."""
    if not isinstance(items, (list, tuple)) or not all(
        item and isinstance(item, dict) for item in items
    ):
        keys = ", ".join(_hints(cls))
        raise ConfigError(
            f"{source}: {name}: expected a list, each item a mapping with some of "
            f"{keys}; found {items}"
        )
    for index, item in enumerate(items):
        _refuse_unknown_keys(cls, item, source, f"{name}[{index}].")
