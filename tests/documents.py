"""The pages of the documentation, and the blocks of code in them."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("benchmarks/*.md"),
        *ROOT.glob("benchmarks/*/*.md"),
    ]
)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks_of(page: Path, language: str) -> Iterator[str]:
    """Yield a page's blocks of code in a language."""
    for found in BLOCK.finditer(page.read_text()):
        if found[1] == language:
            yield found[2]


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """Yield the blocks of all pages, each with its page."""
    for page in PAGES:
        for text in blocks_of(page, language):
            yield str(page.relative_to(ROOT)), text


def steps(page: str, *containing: str) -> list[list[list[str]]]:
    """Return a page's shell blocks that contain one of some words, as commands."""
    return [
        [
            words
            for line in text.replace("\\\n", " ").splitlines()
            if (words := shlex.split(line, comments=True))
        ]
        for text in blocks_of(ROOT / page, "sh")
        if any(words in text for words in containing or [""])
    ]


def lines_of(page: str, *containing: str) -> list[list[str]]:
    """Return the commands of these blocks."""
    return [line for block in steps(page, *containing) for line in block]


def commands() -> Iterator[tuple[str, str]]:
    """Yield every line of a shell block, and of a recipe's comments, with its file."""
    for page, text in blocks("sh"):
        for line in text.replace("\\\n", " ").splitlines():
            yield page, line
    for recipe in sorted((ROOT / "medray/training/recipes").rglob("*.yaml")):
        for line in recipe.read_text().splitlines():
            if line.startswith("#   medray "):
                yield str(recipe.relative_to(ROOT)), line.removeprefix("#")


def of_medray() -> Iterator[tuple[str, list[str]]]:
    """Yield what comes after `medray`, of commands and of jobs."""
    for page, line in commands():
        words = shlex.split(line, comments=True)
        for i, word in enumerate(words):
            job = re.fullmatch(r"jobs/(\w+)\.py", word)
            is_option = i > 0 and words[i - 1] == "-n"  # a namespace
            if word.split("/")[-1] == "medray" and not is_option:
                yield page, words[i + 1 :]
            elif job:
                yield page, [job[1], *words[i + 1 :]]
