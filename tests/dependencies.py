"""The files that a test depends on, read from source: nothing is imported for it.

Modules of medray depend on what they import, directly or not (`grimp`). Everything that
imports `medray.cli` would so depend on all of medray; therefore tests, helpers, fixtures,
benchmarks, jobs, `medray.cli` and its commands are followed by their top-level
definitions: a test depends on what its own function, its fixtures and the functions that
these use name. Of the commands it depends on those that it gives as arguments.

Files are named by strings: `ROOT / "k8s" / name`, "docs/view.md". A page's commands
count as given by the test that names the page.
"""

import ast
import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
CLI, ENTRY = "medray.cli", "main"
COMMANDS = "medray.apps.commands"
TABLE = f"{COMMANDS}.table", "COMMANDS"  # what each command calls, by name
EVERY_TIME, AS_SCRIPT = "", "__main__"  # statements of a module that define nothing
HELPERS = ("tests", "benchmarks", "jobs")
TOGETHER = ("k8s",)  # folders whose files refer to one another

Target = tuple[str, str | None]  # a module, and what is used of it (None: unknown)


@dataclass
class Definition:
    """What one top-level definition of a file refers to."""

    targets: set[Target] = field(default_factory=set)
    names: set[str] = field(default_factory=set)  # of the same file, or fixtures
    texts: set[str] = field(default_factory=set)
    arguments: set[str] = field(default_factory=set)  # of these, in lists and calls
    pages: set[tuple[str, ...]] = field(default_factory=set)  # calls that name a page
    automatic: bool = False  # a fixture that is used without being named


def dependencies(path: Path, name: str) -> frozenset[str]:
    """Return the files that one test depends on, from the root; folders end in "/"."""
    reached = _Reached()
    reached.follow([(path, name)])
    if reached.cli:
        commands = _commands()
        given = commands.keys() & reached.words
        for word in given or commands:
            for module, function in commands[word]:
                reached.follow(reached.use(module, function))
    return frozenset(reached.files)


def touches(changed: str, files: Iterable[str]) -> bool:
    """Return whether a changed file is one of these, or in one of these folders."""
    return any(
        changed.startswith(file) if file.endswith("/") else changed == file
        for file in files
    )


class _Reached:
    """What is reached from definitions."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.words: set[str] = set()
        self.cli = False
        self.seen: set[tuple[Path, str]] = set()

    def follow(self, start: Iterable[tuple[Path, str]]) -> None:
        waiting = [*start]
        while waiting:
            path, name = step = waiting.pop()
            if step in self.seen:
                continue
            self.seen.add(step)
            self.files.add(_relative(path))
            found = read_definitions(path)
            in_cli = path in _cli_paths()
            waiting.append((path, EVERY_TIME))
            definition = found.get(name, Definition())
            for used in definition.names:
                waiting += [(p, used) for p in _places(path, used)]
            if not in_cli:
                self.words |= definition.arguments
                for page, *containing in definition.pages:
                    self.words |= _commands_of(page, tuple(containing))
            for text in definition.texts:
                waiting += self.read(text)
            for target in definition.targets:
                waiting += self.use(*target)

    def use(self, module: str, name: str | None) -> Iterator[tuple[Path, str]]:
        """Note what is used of a module; give what is to be followed in it."""
        if module == "medray" and name is not None:
            room = read_bindings(_path_of("medray")).get(name, ("medray", None))[0]
            if f"medray.{name}" in _modules():
                module, name = f"medray.{name}", None
            else:
                module = room
        if name is not None and name in _homes(module):
            module, name = _homes(module)[name], None
        elif name is not None and (
            f"{module}.{name}" in _modules()
            or (module in HELPERS and _helper(f"{module}.{name}"))
        ):
            module, name = f"{module}.{name}", None
        if module == CLI:
            self.cli = True
            known = name in read_definitions(_path_of(CLI))
            yield _path_of(CLI), str(name) if known else ENTRY
        elif _path_of(module) in _cli_paths():
            path = _path_of(module)
            if module == TABLE[0]:  # which of them, the test says
                self.files.add(_relative(path))
            elif name in read_definitions(path):
                yield path, str(name)
            else:
                yield from whole(path)
        elif module in _modules():
            self.files |= _files_below(module)
        elif (path := _helper(module)) is not None:
            known = name in read_definitions(path)
            yield from [(path, str(name))] if known else whole(path)

    def read(self, text: str) -> Iterator[tuple[Path, str]]:
        """Note the modules and files that a string names."""
        for module, name in re.findall(r"^(medray[\w.]*):(\w+)$", text):
            yield from self.use(module, name)
            return
        for module, names in re.findall(r"from (medray[\w.]*) import ([\w, ]+)", text):
            for name in names.replace(" ", "").split(","):
                yield from self.use(module, name)
        for dotted in re.findall(r"\bmedray(?:\.\w+)+", text):
            while dotted not in _modules():
                dotted = dotted.rpartition(".")[0]
            if dotted != "medray":
                yield from self.use(dotted, None)
        for dotted in re.findall(r"\bbenchmarks(?:\.\w+)+", text):
            yield from self.use(dotted, None)
        if text == "medray/":  # BIN / "medray"
            yield from self.use(CLI, None)
        for path in _named(text):
            module = _relative(path).removesuffix(".py").replace("/", ".")
            if module in _modules():
                yield from self.use(module, None)
            elif path.suffix == ".py":
                yield from whole(path)
            else:
                self.files.add(_relative(path) + "/" * path.is_dir())


def whole(path: Path) -> Iterator[tuple[Path, str]]:
    """Yield each definition of a file."""
    yield from ((path, name) for name in read_definitions(path))


@functools.cache
def read_definitions(path: Path) -> dict[str, Definition]:
    """Read a file's top-level definitions by name."""
    found: dict[str, Definition] = {EVERY_TIME: Definition()}
    bindings = read_bindings(path)
    for statement in ast.parse(path.read_text()).body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            continue
        names = [EVERY_TIME]
        if isinstance(statement, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            names = [statement.name]
        elif isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = getattr(statement, "targets", None) or [statement.target]  # type: ignore[union-attr]
            stored = [n for t in targets for n in ast.walk(t)]
            names = [n.id for n in stored if isinstance(n, ast.Name)]
            if "pytestmark" in names:
                names = [EVERY_TIME]
        elif isinstance(statement, ast.If) and "__name__" in ast.dump(statement.test):
            names = [AS_SCRIPT]
        for name in names:
            definition = found.setdefault(name, Definition())
            _Reader(definition, dict(bindings)).visit(statement)
            if definition.automatic:
                found[EVERY_TIME].names.add(name)
    return found


@functools.cache
def read_bindings(path: Path) -> dict[str, Target]:
    """Read what names of a file its imports at top level give, for type checks too."""
    found: dict[str, Target] = {}
    body = ast.parse(path.read_text()).body
    nested = [s for s in body if isinstance(s, ast.If | ast.Try)]
    for statement in body + [inner for s in nested for inner in s.body]:
        found |= _bound(statement)
    return found


def _bound(statement: ast.stmt) -> dict[str, Target]:
    if isinstance(statement, ast.ImportFrom):
        module = str(statement.module)
        return {a.asname or a.name: (module, a.name) for a in statement.names}
    if isinstance(statement, ast.Import):
        return {
            a.asname or a.name.partition(".")[0]: (a.name, None)
            for a in statement.names
        }
    return {}


class _Reader(ast.NodeVisitor):
    """Collects into a definition what a statement refers to."""

    def __init__(self, found: Definition, bindings: dict[str, Target]) -> None:
        self.found, self.bindings = found, bindings

    def visit_Import(self, node: ast.Import) -> None:
        self.bindings |= _bound(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self.bindings |= _bound(node)

    def visit_Name(self, node: ast.Name) -> None:
        self.found.names.add(node.id)
        if node.id in self.bindings:
            self.found.targets.add(self.bindings[node.id])

    def visit_Attribute(self, node: ast.Attribute) -> None:
        module, name = None, None
        if isinstance(node.value, ast.Name):
            module, name = self.bindings.get(node.value.id, (None, None))
        if module is None:
            self.visit(node.value)
        elif name is None:
            self.found.targets.add((module, node.attr))
        else:  # of a name that was imported from a module; or a module of a package
            whole_name = f"{module}.{name}"
            known = whole_name in _modules()
            self.found.targets.add((whole_name, node.attr) if known else (module, name))

    def visit_arg(self, node: ast.arg) -> None:
        self.found.names.add(node.arg)  # perhaps a fixture
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # a docstring
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        values = [v.value for v in node.args if isinstance(v, ast.Constant)]
        if isinstance(node.func, ast.Attribute) and node.func.attr == "usefixtures":
            self.found.names.update(map(str, values))
            return
        automatic = [k for k in node.keywords if k.arg == "autouse"]
        self.found.automatic |= bool(automatic)
        if values and str(values[0]).endswith(".md"):
            self.found.pages.add(tuple(map(str, values)))
        self._arguments(node.args)
        self.generic_visit(node)

    def visit_List(self, node: ast.List) -> None:
        self._arguments(node.elts)
        self.generic_visit(node)

    def visit_Tuple(self, node: ast.Tuple) -> None:
        self._arguments(node.elts)
        self.generic_visit(node)

    def _arguments(self, values: list[ast.expr]) -> None:
        given = [v.value for v in values if isinstance(v, ast.Constant)]
        self.found.arguments.update(v for v in given if isinstance(v, str))

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self.found.texts.add(node.value)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        parts = [v.value if isinstance(v, ast.Constant) else "*" for v in node.values]
        self.found.texts.add("".join(map(str, parts)))
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        """Read `ROOT / "k8s" / name` as a name of the folder k8s/."""
        parts: list[ast.expr] = []
        left: ast.expr = node
        while isinstance(left, ast.BinOp) and isinstance(left.op, ast.Div):
            parts.insert(0, left.right)
            left = left.left
        if not parts:
            return self.generic_visit(node)
        path = ""
        for part in parts:
            if not isinstance(part, ast.Constant):
                break
            path += f"{part.value}/"
        self.found.texts.add(path)
        for part in [left, *parts]:
            self.visit(part)
        return None


@functools.cache
def _named(text: str) -> tuple[Path, ...]:
    """Return the files and folders of the repository that a string names."""
    text = text.rstrip("/") + "/" * ("/" not in text.rstrip("/") and text[-1:] == "/")
    if re.fullmatch(r"[\w-]+\.py/?", text):
        path = _helper(text.rstrip("/").removesuffix(".py"))
        return (path,) if path else ()
    if re.fullmatch(r"[\w.-]+\.(md|toml|txt|yaml)|[\w.-]+/[\w./*-]*", text) is None:
        return ()
    if ".." in text or text.startswith(("./", "/", "medray/", "*")):
        return ()
    top = text.split("/")[0]
    if top in TOGETHER:
        text = top
    return tuple(sorted(ROOT.glob(text.rstrip("/"))))


@functools.cache
def _commands_of(page: str, containing: tuple[str, ...]) -> frozenset[str]:
    """Return the commands in a page's shell blocks with one of some words, or in all."""
    path = ROOT / page
    text = path.read_text() if path.is_file() else ""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    chosen = [b for b in blocks if any(word in b for word in containing)] or blocks
    found = re.findall(r"\bmedray (\w+)|\bjobs/(\w+)\.py", "\n".join(chosen))
    return frozenset(word for pair in found for word in pair if word)


@functools.cache
def _places(path: Path, name: str) -> tuple[Path, ...]:
    """Return the files that may define a name: this one, else fixtures of conftest.py."""
    if name in read_definitions(path):
        return (path,)
    return tuple(c for c in _conftests(path.parent) if name in read_definitions(c))


@functools.cache
def _conftests(folder: Path) -> tuple[Path, ...]:
    folders = [f for f in (folder, *folder.parents) if f.is_relative_to(ROOT / "tests")]
    return tuple(f / "conftest.py" for f in folders if (f / "conftest.py").is_file())


@functools.cache
def _helper(module: str) -> Path | None:
    """Return the file of a module next to the tests, of benchmarks or of jobs."""
    if module.startswith(HELPERS) and "." in module:
        path = ROOT / (module.replace(".", "/") + ".py")
        return path if path.is_file() else None
    found = (p for h in HELPERS for p in sorted((ROOT / h).rglob(f"{module}.py")))
    return next(found, None)


@functools.cache
def _graph() -> grimp.ImportGraph:
    """Return who imports whom, names that a room gives on counted as its modules'."""
    graph = grimp.build_graph("medray", cache_dir=None)
    for module in sorted(graph.modules):
        for node in ast.walk(ast.parse(_path_of(module).read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in graph.modules:
                homes = _homes(node.module)
                for name in node.names:
                    if name.name in homes and homes[name.name] != module:
                        graph.add_import(importer=module, imported=homes[name.name])
    return graph


@functools.cache
def _homes(package: str) -> dict[str, str]:
    """Return the module of each name that a room gives on by its `__init__.pyi`."""
    stub = _path_of(package).with_suffix(".pyi")
    if not package.startswith("medray.") or not stub.is_file():
        return {}
    return {
        name.name: f"{package}.{node.module or name.name}"
        for node in ast.parse(stub.read_text()).body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }


@functools.cache
def _modules() -> frozenset[str]:
    return frozenset(_graph().modules)


@functools.cache
def _cli_paths() -> frozenset[Path]:
    """Return the files of `medray.cli` and of its commands."""
    return frozenset({_path_of(CLI), *_path_of(COMMANDS).parent.glob("*.py")})


@functools.cache
def _commands() -> dict[str, list[tuple[str, str]]]:
    """Return the functions that each command calls, or chooses from."""
    module, name = TABLE
    for statement in ast.parse(_path_of(module).read_text()).body:
        if (
            isinstance(statement, ast.AnnAssign)
            and ast.unparse(statement.target) == name
        ):
            assert isinstance(statement.value, ast.Dict)
            return {
                ast.literal_eval(key): re.findall(
                    r"'(medray[\w.]*):(\w+)'", ast.unparse(command)
                )
                for key, command in zip(
                    statement.value.keys, statement.value.values, strict=True
                )
                if key is not None
            }
    raise ValueError(f"{module}: no dictionary {name}")


@functools.cache
def _path_of(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@functools.cache
def _files_below(module: str) -> frozenset[str]:
    """Return the files of a module, of all it imports, and of the packages around."""
    found = set()
    for name in {module, *_graph().find_upstream_modules(module)}:
        parts = name.split(".")
        around = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
        paths = [_path_of(part) for part in around]
        stubs = [path.with_suffix(".pyi") for path in paths]
        found.update(map(_relative, [*paths, *(s for s in stubs if s.is_file())]))
        found.update(_data().get(name, ()))
    return frozenset(found)


@functools.cache
def _data() -> dict[str, set[str]]:
    """Return the files of medray that are no modules, by the modules that name them.

    A file that none names (a template that others extend) belongs to those that name a
    file next to it. The name of a folder counts in modules of its room only.
    """
    sources = {m: _path_of(m).read_text() for m in _modules()}
    files = [p for p in (ROOT / "medray").rglob("*.*") if p.parent != ROOT / "medray"]
    files = [p for p in files if p.suffix not in (".py", ".pyc", ".pyi")]

    def naming(path: Path) -> set[str]:
        room = "medray/" + path.relative_to(ROOT / "medray").parts[0]
        return {
            module
            for module, source in sources.items()
            if f'"{path.name}"' in source
            or (
                f'"{path.parent.name}"' in source
                and _relative(_path_of(module)).startswith(f"{room}/")
            )
        }

    found: dict[str, set[str]] = {}
    for path in files:
        beside = (p for p in files if p.parent == path.parent)
        for module in naming(path) or {m for p in beside for m in naming(p)}:
            found.setdefault(module, set()).add(_relative(path))
    return found


@functools.cache
def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()
