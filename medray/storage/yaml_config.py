"""YAML files as frozen dataclasses: strict when read, complete when written."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

import yaml

from medray.errors import ConfigError
from medray.storage import files
from medray.storage.typed_settings import from_dict, names_now, renamed

"""What YAML should hold, by pydantic's types of error."""

"""What YAML should hold, by Python's types."""


def to_dict(settings: Any) -> dict[str, Any]:
    """Turn a dataclass into plain dictionaries, lists and values."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(settings))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def write_settings(uri: str, settings: Any) -> None:
    """Write a dataclass as YAML, atomically."""
    text = yaml.safe_dump(to_dict(settings), sort_keys=False, allow_unicode=True)
    files.write_bytes(uri, text.encode())


class Decisive(typing.Protocol):
    """Settings of which some decide what is made."""

    def decisive(self) -> dict[str, Any]:
        """Return those, as plain values."""


def keep_settings(uri: str, settings: Decisive) -> None:
    """Write a folder's settings, or check that those it has make the same.

    Raises:
        ConfigError: They make something else.
    """
    if not files.exists(uri):
        write_settings(uri, settings)
        return
    before = from_dict(type(settings), read_yaml(uri), uri)
    if before.decisive() == settings.decisive():
        return
    old, new = flat(before.decisive()), flat(settings.decisive())
    changed = ", ".join(
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    )
    raise ConfigError(
        f"{uri.rpartition('/')[0]}: holds a run with other settings ({changed}); "
        f"choose another --out, or delete this run"
    )


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings in one level, by their names with dots between them."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def read_folder_settings[S](
    kind: type[S], folder: str, name: str, expected: tuple[str, str]
) -> S:
    """Read the settings of a folder.

    Args:
        kind: Their dataclass.
        folder: Path or address.
        name: Of the YAML file in it.
        expected: What the folder should be, and the command that writes one.

    Raises:
        ConfigError: There is no such file, or it holds something else.
    """
    uri = files.join(folder, name)
    if not files.exists(uri):
        what, writer = expected
        raise ConfigError(
            f"{folder}: expected {what} with a {name}; `{writer}` writes one"
        )
    return from_dict(kind, read_yaml(uri), uri)


def read_yaml(uri: str) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; nothing in it is executed.

    Raises:
        ConfigError: The file is absent, no YAML, or holds something else.
    """
    try:
        text = files.read_bytes(uri)
    except FileNotFoundError as error:
        raise ConfigError(f"{uri}: there is no such file") from error
    value = _parse(text, uri)
    if not isinstance(value, dict):
        raise ConfigError(
            f"{uri}: expected a mapping of keys to values, found {type(value).__name__}"
        )
    return value


def _parse(text: str | bytes, source: str) -> Any:
    """Return the value of a YAML text; nothing in it is executed.

    Raises:
        ConfigError: It is no YAML, holds a date that is none, or nests too deeply.
    """
    try:
        return yaml.safe_load(text)
    except RecursionError as error:
        raise ConfigError(
            f"{source}: expected YAML, found one that nests too deeply"
        ) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: of dates and of UTF-8
        problem = " ".join(str(error).split())
        raise ConfigError(f"{source}: expected YAML, found {problem}") from error


def read_settings[T](cls: type[T], uri: str, overrides: typing.Sequence[str] = ()) -> T:
    """Read a YAML file into dataclass `cls`, with `key=value` overrides.

    Args:
        cls: A dataclass, possibly of dataclasses.
        uri: The YAML file.
        overrides: Such as `optimizer.lr=1e-4`.

    Raises:
        ConfigError: An unknown key (with the nearest known one) or a wrong value.
    """
    values = renamed(cls, read_yaml(uri), uri)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"{override}: expected key=value, such as batch=8")
        keys = names_now(cls, key.split("."))
        _set(values, keys, _parse(text, override), override)
    return from_dict(cls, values, uri)


def _set(values: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    *parents, last = keys
    for key in parents:
        if values.get(key) is None:
            values[key] = {}
        inner = values[key]
        if not isinstance(inner, dict):
            raise ConfigError(f"{override}: {key!r} holds a value, not further keys")
        values = inner
    values[last] = value
