"""Functions as their source states them: parameters, types and docstrings.

The command line is generated from the functions that it calls. Importing them would
import PyTorch and Ray, seconds for a `--help`; so a function is read from its file, and
only the modules are imported that define the types of its parameters.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any


def read_function(place: str, left_out: Collection[str] = ()) -> Callable[..., Any]:
    """Return a function with the parameters and docstring of another, but no body.

    Args:
        place: `module:function`; of a room one that its `__init__.pyi` names.
        left_out: Parameters that it shall not have, nor their types be imported.
    """
    module, _, name = place.partition(":")
    statements = _statements(module)
    if name not in statements:  # given by a room
        home = statements_of(_source(module).with_suffix(".pyi"))[name]
        module = f"{module}.{getattr(home, 'module', '')}"
        statements = _statements(module)
    function = statements[name]
    assert isinstance(function, ast.FunctionDef), place
    function.body, function.returns = function.body[:1], None
    _leave_out(function.args, left_out)
    space: dict[str, Any] = {}
    for node in ast.walk(function.args):
        if isinstance(node, ast.Name):
            _define(node.id, statements, space)
    _execute(function, space)
    return space[name]  # type: ignore[no-any-return]


def _leave_out(args: ast.arguments, names: Collection[str]) -> None:
    """Remove parameters."""
    defaults = dict(zip(args.kwonlyargs, args.kw_defaults, strict=True))
    args.args = [arg for arg in args.args if arg.arg not in names]
    args.kwonlyargs = [arg for arg in args.kwonlyargs if arg.arg not in names]
    args.kw_defaults = [defaults[arg] for arg in args.kwonlyargs]


def descriptions(documented: Any) -> dict[str, str]:
    """Return the first sentence of what a docstring says of each parameter or field."""
    from docstring_parser import parse

    params = parse(documented.__doc__ or "").params
    return {p.arg_name: first_sentence(p.description or "") for p in params}


def first_sentence(text: str) -> str:
    """Return a text up to its first full stop, on one line."""
    return re.split(r"\.(?=\s|$)", " ".join(text.split()), maxsplit=1)[0]


def _source(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None, module
    assert spec.origin is not None, module
    return Path(spec.origin)


def _statements(module: str) -> dict[str, ast.stmt]:
    return statements_of(_source(module))


def statements_of(path: Path) -> dict[str, ast.stmt]:
    """Return what defines or imports each name of a file's top level."""
    found: dict[str, ast.stmt] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: node for alias in node.names}
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = node
    return found


def _define(name: str, statements: dict[str, ast.stmt], space: dict[str, Any]) -> None:
    """Define a name that types or defaults use, as its module does."""
    statement = statements.get(name)
    if isinstance(statement, ast.ImportFrom):
        space[name] = getattr(importlib.import_module(str(statement.module)), name)
    elif isinstance(statement, ast.Assign) and name not in space:
        for node in ast.walk(statement.value):
            if isinstance(node, ast.Name):
                _define(node.id, statements, space)
        _execute(statement, space)


def _execute(statement: ast.stmt, space: dict[str, Any]) -> None:
    code = ast.Module([statement], [])
    exec(compile(code, "signature", "exec", dont_inherit=True), space)
