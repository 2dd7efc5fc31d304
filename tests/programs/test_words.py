"""The words of docstrings, comments and pages: plain English, see docs/glossary.md.

Docstrings and comments of medray/, benchmarks/, cluster/ and jobs/; the prose of
README.md, CONTRIBUTING.md and docs/*.md, without code and generated links. No sentence
of README.md, the tutorial and the help of commands is longer than 35 words.
"""

import ast
import io
import re
import tokenize
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from documents import ROOT

from medray.apps.commands.parser import signature_of
from medray.apps.commands.table import COMMANDS

FIRST = {
    "Give": "Return",
    "Gives": "Return",
    "Tell": "Return whether",
    "Tells": "Return whether",
    "Say": "Return, Log, Print",
    "Says": "Return, Log, Print",
}
WORDS = {
    r"anew": "again",
    r"likewise": "what it is, again",
    r"beside": "next to, besides, in addition to, compared with",
    r"told": "reported, given, asked",
    r"nobody": "no user, no process; not known, not given",
    r"mend(s|ed)?": "repair, correct",
    r"strangers": "untrusted",
    r"(row|line|file|mask|column) an? (slide|image|patch|region|class|epoch|point|node)": (
        "one row per slide"
    ),
}
CODE = [
    path
    for folder in ("medray", "benchmarks", "cluster", "jobs", "tests")
    for path in sorted((ROOT / folder).rglob("*.py*"))
    if path.suffix in (".py", ".pyi")
]
MOST_WORDS = 35
SHORT = [ROOT / "README.md", *(ROOT / f"docs/{n}.md" for n in ("tutorial", "python"))]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]


def docstrings(text: str) -> Iterator[tuple[int, str]]:
    """Yield each docstring with its first line's number, those of attributes too."""
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(said))):
                yield node.lineno, said


def comments(text: str) -> Iterator[tuple[int, str]]:
    """Yield each comment with its line's number."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """Yield a page without its blocks of code; lines keep their numbers."""
    blocks = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
    yield 1, blocks.sub(lambda block: "\n" * block[0].count("\n"), text)


def prose(text: str) -> str:
    """Blank what is no prose: `code`, addresses of links, names of attributes."""
    blank = re.compile(r"`[^`]*`|\]\([^)]*\)|^ *\w+: ", re.MULTILINE)
    return blank.sub(lambda code: re.sub(r"[^\n]", "_", code[0]) + " ", text)


def wrong_words(path: Path) -> list[str]:
    """Return the forbidden words of a file, each with its line and what to write."""
    text, found = path.read_text(), []
    parts = [*paragraphs(text)]
    if path.suffix != ".md":
        parts = [*docstrings(text), *comments(text)]
        for line, said in docstrings(text):
            first = re.match(r"\s*(\w*)", said)
            if first and (better := FIRST.get(first[1])):
                found.append(f"{path}:{line}: docstring begins with {first[1]!r}")
                found[-1] += f"; write: {better}"
    for start, said in parts:
        cleaned = prose(said)
        for word, better in WORDS.items():
            for hit in re.finditer(rf"\b{word}\b", cleaned, re.IGNORECASE):
                line = start + cleaned.count("\n", 0, hit.start())
                found.append(f"{path}:{line}: {hit[0]!r}; write: {better}")
    return sorted(found)


def long_sentences(text: str) -> list[str]:
    """Return the sentences of a page with too many words, each with their number.

    A cell of a table, an item of a list and a heading are sentences of their own; what
    stands in `code` is one word.
    """
    ((_, text),) = paragraphs(re.sub(r"<!--.*?-->", "", text))
    text = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "code", text))
    parts = re.split(r"\n\s*\n|\n(?=\s*(?:[-*] |\d+\. |#|\|))|\|", text)
    sentences = [
        sentence
        for part in parts
        for sentence in re.split(r"(?<=[.!?])[*)\"']*\s", part)
    ]
    counted = ((len(re.findall(r"\S*\w\S*", said)), said) for said in sentences)
    return [
        f"{count} words: {' '.join(said.split())}"
        for count, said in counted
        if count > MOST_WORDS
    ]


def test_words_are_plain_english() -> None:
    found = [
        said.removeprefix(f"{ROOT}/")
        for path in (*CODE, *PAGES)
        for said in wrong_words(path)
    ]
    assert found == [], "\n".join(found)


def test_sentences_are_short() -> None:
    found = [said for page in SHORT for said in long_sentences(page.read_text())]
    for command in COMMANDS.values():
        for option in signature_of(command, ()).parameters.values():
            _, how = typing.get_args(option.annotation)
            found += long_sentences(f"{how.help}.")
        found += long_sentences(command.text)
    assert found == [], "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "word " * 36 + ".",
        "- It is.\n- " + "word " * 36,
        "It is. " + "word, " * 17 + "`one two`: [" + "word " * 18 + "](page.md).",
    ],
)
def test_a_long_sentence_is_named(text: str) -> None:
    (found,) = long_sentences(text)
    assert found.startswith("36 words: ")


def test_what_is_no_long_sentence() -> None:
    half = "word " * 20
    assert long_sentences(f"| {half} | {half} |\n| {half} |\n\n{half}\n\n{half}") == []
    assert long_sentences(f"- {half}\n- {half}. {half}\n```sh\n{half * 2}\n```") == []


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.py", '"""Give it."""\n', "1: docstring begins with 'Give'; write: Return"),
        ("a.py", 'x = 1\n"""Made\nanew."""\n', "3: 'anew'; write: again"),
        ("a.py", "\nx = 1  # told so\n", "2: 'told'; write: reported, given, asked"),
        ("a.md", "A\n```\nanew\n```\nA line a slide.", "5: 'line a slide'; write: one"),
    ],
)
def test_a_forbidden_word_is_named(
    tmp_path: Path, name: str, text: str, expected: str
) -> None:
    path = tmp_path / name
    path.write_text(text)
    (found,) = wrong_words(path)
    assert found.startswith(f"{path}:{expected}")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.py", 'told = "told anew"\n'),
        ("a.py", '"""Values.\n\nAttributes:\n    beside: `beside`, `told`.\n"""\n'),
        ("a.md", "`medray evaluate --beside` and [a page](page.md#told)."),
    ],
)
def test_code_is_no_prose(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert wrong_words(path) == []
