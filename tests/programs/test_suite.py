"""What the tests promise about themselves: each can fail by what it asserts."""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

TESTS = next(path for path in Path(__file__).resolve().parents if path.name == "tests")
# Calls that are assertions: they raise by themselves where a promise is broken.
ASSERTING = {"pytest.raises", "pytest.warns", "pytest.deprecated_call", "pytest.fail"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """A file's functions, its state machines, and where the names it imports are."""

    functions: dict[str, Function] = field(default_factory=dict)  # methods: Class.name
    machines: dict[str, list[str]] = field(default_factory=dict)  # with their methods
    imported: dict[str, tuple[str, str]] = field(default_factory=dict)


Suite = dict[str, Module]  # by the names that imports have for them, test files by path


def read_suite(sources: dict[str, str]) -> Suite:
    return {name: read_module(ast.parse(text)) for name, text in sources.items()}


def read_module(tree: ast.Module) -> Module:
    module = Module()
    for node in tree.body:
        if isinstance(node, Function):
            module.functions[node.name] = node
        elif isinstance(node, ast.ClassDef):
            methods = {
                f"{node.name}.{method.name}": method
                for method in node.body
                if isinstance(method, Function)
            }
            module.functions.update(methods)
            if any(dotted(base).endswith("StateMachine") for base in node.bases):
                module.machines[node.name] = list(methods)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                module.imported[name.asname or name.name] = (name.name, "")
        elif isinstance(node, ast.ImportFrom):
            for name in node.names:
                place = (node.module or "", name.name)
                module.imported[name.asname or name.name] = place
    return module


def dotted(node: ast.AST) -> str:
    """Return `a.b.c` of such an expression, nothing of any other."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and dotted(node.value):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def collected(suite: Suite) -> Iterator[tuple[str, str]]:
    """Yield module and name of each function that pytest takes for a test."""
    for name, module in suite.items():
        if name.rpartition("/")[2].startswith("test_"):
            for function in module.functions:
                owner, _, method = function.rpartition(".")
                if method.startswith("test") and (
                    not owner or owner.startswith("Test")
                ):
                    yield name, function


def asserts(suite: Suite, module: str, function: str) -> bool:
    """Whether a function, or a helper of the tests that it calls, asserts something."""
    seen = set()

    def of_function(module: str, function: str) -> bool:
        if (module, function) in seen:
            return False
        seen.add((module, function))
        owner = function.rpartition(".")[0]

        def any_of(nodes: Iterable[ast.AST]) -> bool:
            return any(of_node(node) for node in nodes)

        def of_node(node: ast.AST) -> bool:
            # Of branches each has to assert: which one is taken is not known here.
            if isinstance(node, ast.If):
                both = any_of(node.body) and any_of(node.orelse)
                return both or of_node(node.test)
            if isinstance(node, ast.Try):
                handled = bool(node.handlers) and all(map(of_node, node.handlers))
                either = handled and any_of(node.orelse)
                return either or any_of([*node.body, *node.finalbody])
            if isinstance(node, ast.Assert) and not isinstance(node.test, ast.Constant):
                return True
            if isinstance(node, ast.Call):
                name = dotted(node.func)
                if name in ASSERTING or ".testing.assert_" in f".{name}":
                    return True
            return any(
                of_function(*place) for place in helpers(suite, module, owner, node)
            ) or any_of(ast.iter_child_nodes(node))

        return any_of(suite[module].functions[function].body)

    return of_function(module, function)


def helpers(
    suite: Suite, module: str, owner: str, node: ast.AST
) -> Iterator[tuple[str, str]]:
    """Yield module and name of the functions of the tests that a node runs."""
    if isinstance(node, ast.Call):
        name = dotted(node.func)
        if owner and name.startswith("self."):
            name = f"{owner}.{name.removeprefix('self.')}"
        home, name = resolve(suite, module, name)
        if name in suite[home].functions:
            yield home, name
    elif isinstance(node, ast.Name):  # who runs a state machine runs its rules
        home, name = resolve(suite, module, node.id)
        for method in suite[home].machines.get(name, []):
            yield home, method


def resolve(suite: Suite, module: str, name: str) -> tuple[str, str]:
    """Return where a name of a module is defined: the module, and its name there."""
    first, _, rest = name.partition(".")
    origin, attribute = suite[module].imported.get(first, ("", ""))
    if origin in suite:
        return origin, ".".join(filter(None, [attribute, rest]))
    return module, name


def silent(suite: Suite) -> list[str]:
    return [
        f"{module}.py::{function}"
        for module, function in collected(suite)
        if not asserts(suite, module, function)
    ]


def test_every_test_asserts_something() -> None:
    paths = {p.relative_to(TESTS).with_suffix(""): p for p in TESTS.rglob("*.py")}
    suite = read_suite({str(name): path.read_text() for name, path in paths.items()})
    assert ("programs/test_suite", "test_every_test_asserts_something") in collected(
        suite
    )
    assert silent(suite) == []


HELPERS = """
def check(x):
    assert x == 1
def run(x):
    return subprocess.run(x, check=True)
class Machine(RuleBasedStateMachine):
    @rule()
    def step(self):
        self.look()
    def look(self):
        assert self.x
class Idle(RuleBasedStateMachine):
    @rule()
    def step(self):
        self.x = 1
"""


@pytest.mark.parametrize(
    ("body", "counts"),
    [
        ("assert f(1) == 2", True),
        ("with pytest.raises(ValueError): f(1)", True),
        ("np.testing.assert_array_equal(f(1), 2)", True),
        ("for x in f(): assert x", True),
        ("helpers.check(f(1))", True),
        ("check(f(1))", True),
        ("wrap(1)", True),
        ("run_state_machine_as_test(Machine)", True),
        ("if f():\n        assert 1 == f()\n    else:\n        assert f()", True),
        ("try:\n        f()\n    except E:\n        assert 1 == f()", False),
        ("if f():\n        assert 1 == f()", False),
        ("run_state_machine_as_test(helpers.Idle)", False),
        ("helpers.run(['true'])", False),
        ("assert True", False),
        ("f(1)", False),
        ("again()", False),
    ],
)
def test_what_counts_as_an_assertion(body: str, counts: bool) -> None:
    text = f"""
import helpers
from helpers import Machine, check
def wrap(x):
    helpers.check(x)
def again():
    again()
def test_it():
    {body}
"""
    found = silent(read_suite({"helpers": HELPERS, "test_a": text}))
    assert found == ([] if counts else ["test_a.py::test_it"])
