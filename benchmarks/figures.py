"""Write the measured figures of the pages from the newest records.

A page marks by comments, which do not show once it is rendered, what a record says:

    <!-- figures ingest-flat -->
    ... the command, date, machine and commit, and a table of each result ...
    <!-- end figures -->

    <!-- figures slide-faults 0:kinds -->
    ... one row for each key there ...
    <!-- end figures -->

    and within a line <!-- figure ingest-flat 0:ratios:here:busy .2f -->1.01<!-- end -->

    and ](confusion-NAME.svg), which is drawn (benchmarks/pictures.py).

The first word is NAME of `benchmarks/records/NAME-DATE.json`; the newest counts. A path
is keys and positions with colons between them, from the results if the first is a
number, else from the record (`date`, `machine:cpu`); the last word is a format spec.

One file, because what it finds outside of generated parts it must not find in them.

Run: python -m benchmarks.figures            (make figures: writes)
     python -m benchmarks.figures --check    (make lint: names what differs, and figures
                                              of speed or memory that are of no record)
"""

import argparse
import itertools
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.pictures import PICTURE, counts_of, draw_confusion, is_of

BLOCK = re.compile(
    r"(?P<start><!-- figures (?P<name>\S+)(?: (?P<path>[^\n]+?))? -->\n)(?P<old>.*?)"
    r"(?P<end><!-- end figures -->)",
    re.DOTALL,
)
INLINE = re.compile(
    r"(?P<start><!-- figure (?P<name>\S+) (?P<path>.+?) (?P<format>\S+) -->)"
    r"(?P<old>[^<]*)(?P<end><!-- end -->)"
)
LEFT = re.compile(r"<!-- (?:figures? .*?|end figures|end) -->")
# docs/checks.md: made by `make costs`, of the tests.
COSTS = re.compile(r"<!-- costs: .*?<!-- end of costs -->", re.DOTALL)
# What harness.Rounds adds to the facts.
OF_ROUNDS = ("baseline", "rounds", "medians", "spread", "ratios", "spread_of_ratios")

# --- what is a measured figure --------------------------------------------------------

_NUMBER = r"\d[\d.,]*(?:(?: to |-| and )\d[\d.,]*)?"
_TIME = r"(?:core-)?(?:ms|s|seconds?|min|minutes?|hours?)\b"
_MEMORY = r"[KMGT]i?B\b"
_THING = (
    r"(?:windows|slides|crops|images|patches|requests|regions|tiles|cells|batches|steps"
    r"|pixels|[MG]?[Pp]ix|[MGT]i?B)"
)
_SHORT = r"[^.;:|\n]{0,40}?"
MEASURED = re.compile(
    "|".join(
        (
            # A rate.
            rf"{_NUMBER} {_THING}(?:/s\b| (?:a|per) second\b)",
            # How many times as fast, or of what other work's time.
            r"(?:\d[\d.,]* times|twice|half) (?:as )?"
            r"(?:fast|slow|quick|long|dear|cheap)(?:er)?\b",
            r"\d[\d.,]* times the (?:time|speed|memory)\b",
            r"\b\d?\.\d+ of (?:the |a |its )?(?:bare|plain|loop|limit|rate)\b",
            # What something took; a limit ("more than", "at most") is none.
            rf"\b(?:takes|took|lasts|lasted|costs?|measured)\b"
            rf"(?!{_SHORT}\b(?:than|at most|up to|within)\b){_SHORT}\b{_NUMBER} "
            rf"(?:{_TIME}|{_MEMORY})",
            rf"\b(?:peaks?|PSS|RSS)\b{_SHORT}\b{_NUMBER} {_MEMORY}",
            # With the machine, or the day, that it was found on.
            rf"{_NUMBER} (?:{_TIME}|{_MEMORY}){_SHORT} on (?:(?:two|\d+)\b"
            rf"[^.;:|\n]{{0,20}}? cores|\d{{4}}-\d\d-\d\d)",
        )
    )
)
# A column of a table with such a unit holds figures.
UNIT = re.compile(r"(?:^|, | |\()(?:ms|s|MiB|GiB|seconds|core-s)\)?$|/s\b| a second\b")


def measured(text: str) -> Iterator[tuple[int, str]]:
    """Yield line and words of measured figures outside of generated parts.

    Of blocks of code only comments count: the rest is what a program prints.
    """
    for generated in (COSTS, BLOCK, INLINE):
        text = generated.sub(lambda part: "\n" * part[0].count("\n"), text)
    lines = text.split("\n")
    columns: list[bool] = []
    for number, line in enumerate(lines):
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip()[1:-1].split("|")]
            below = lines[number + 1] if lines[number + 1 :] else ""
            if re.match(r"\|[ -]*:?-", below):
                columns = [bool(UNIT.search(cell)) for cell in cells]
                continue
            for cell, holds in zip(cells, columns, strict=False):
                if holds and re.search(r"\d", cell):
                    yield number + 1, cell
        else:
            columns = []
    prose = re.sub(r"^```.*?^```", _comments, text, flags=re.DOTALL | re.MULTILINE)
    # A sentence goes on in the next line; a row of a table does not.
    prose = re.sub(r"(?<=[^\n|])\n(?=[^\n|#])", " ", prose)
    # It is as long as the text, so its lines are the text's.
    for found in MEASURED.finditer(prose):
        yield text.count("\n", 0, found.start()) + 1, found[0]


def _comments(block: re.Match[str]) -> str:
    lines = [line.partition(" #") for line in block[0].split("\n")]
    return "\n".join(" " * len(code + mark) + said for code, mark, said in lines)


# --- what a record says ---------------------------------------------------------------


def read_newest(records: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """Read the newest record of a name.

    Raises:
        ValueError: There is none, or it is not one of harness.py.
    """
    dated = rf"{re.escape(name)}-\d{{4}}-\d\d-\d\d\.json"
    files = sorted(p for p in records.glob("*.json") if re.fullmatch(dated, p.name))
    if not files:
        raise ValueError(f"no record {records.name}/{name}-DATE.json")
    record: dict[str, Any] = json.loads(files[-1].read_text())
    if missing := {"benchmark", "date", "machine", "versions", "results"} - {*record}:
        raise ValueError(f"{files[-1].name} without {', '.join(sorted(missing))}")
    return files[-1], record


def node_of(record: Mapping[str, Any], path: str) -> Any:
    """Return what a record has at a path; ValueError: nothing."""
    parts = path.split(":")
    node: Any = record["results"] if parts[0].isdigit() else record
    for part in parts:
        try:
            node = node[int(part)] if isinstance(node, list) else node[part]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            there = list(node) if isinstance(node, Mapping) else f"{node!r:.60}"
            raise ValueError(f"no {part!r} of {path!r} in {there}") from error
    return node


def value_of(record: Mapping[str, Any], path: str, spec: str) -> str:
    """Return a value of a record in a format.

    Raises:
        ValueError: There is no such value, or it cannot be shown so.
    """
    node = node_of(record, path)
    if not isinstance(node, int | float | str):
        raise ValueError(f"{path!r} is not one value: {node!r:.60}")
    return format(node, spec)


def describe(record: Mapping[str, Any], path: str | None) -> str:
    """Return a record as Markdown: what was run where, and a table of each result.

    Args:
        record: What harness.py wrote.
        path: Of a mapping: a row for each of its values. None: the results.
    """
    machine, versions = record["machine"], record["versions"]
    where = [record["date"][:10], machine["cpu"], f"{machine['cores']} cores"]
    where += [*machine["gpus"], f"commit {versions['medray']}"]
    rounds = {
        len(values)
        for result in record["results"]
        for figures in result.get("rounds", {}).values()
        for values in figures.values()
    }
    if rounds:
        where.append(f"medians [quartiles] of {max(rounds)} rounds by turns")
    told = [f"`{_command(record)}`: {', '.join(where)}."]
    if path:
        named = node_of(record, path)
        if not isinstance(named, Mapping) or not all(
            isinstance(row, Mapping) for row in named.values()
        ):
            raise ValueError(f"{path!r} has no rows: {named!r:.60}")
        told.append(_rows([{"": name} | row for name, row in named.items()]))
        return "\n\n".join(told)
    for keys, rows in itertools.groupby(record["results"], key=tuple):
        if "medians" not in keys:
            told.append(_rows(list(rows)))
            continue
        for summary in rows:
            facts = {k: v for k, v in summary.items() if k not in OF_ROUNDS}
            if facts:
                told.append("; ".join(f"{k}: {v}" for k, v in facts.items()))
            told.append(harness.table(summary))
    return "\n\n".join(told)


def _command(record: Mapping[str, Any]) -> str:
    words = ["python", "-m", *record["benchmark"].split()]
    for name, value in record.get("arguments", {}).items():
        if value in (None, "", [], False):
            continue
        words.append(f"--{name}")
        if value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    return shlex.join(words)


def _rows(rows: list[Mapping[str, Any]]) -> str:
    """Return rows as a table, without what is no number or text: the record has it."""
    keys = [k for k, v in rows[0].items() if isinstance(v, int | float | str)]
    lines = [
        keys,
        ["---"] * len(keys),
        *([_cell(row[k]) for k in keys] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- pages ----------------------------------------------------------------------------


def fill(text: str, records: Path) -> tuple[str, list[tuple[int, str]]]:
    """Return a page with its figures written, and what is wrong: line, words."""
    wrong: list[tuple[int, str]] = []

    def by(show: Callable[[re.Match[str], dict[str, Any]], str]) -> Any:
        def replaced(part: re.Match[str]) -> str:
            line = part.string.count("\n", 0, part.start()) + 1
            try:
                file, record = read_newest(records, part["name"])
                new = show(part, record)
            except ValueError as error:
                do = "take it with --record, or mend the comment"
                wrong.append((line, f"found {part['start'].strip()}: {error}; {do}"))
                return part[0]
            if new != part["old"]:
                old, expected = _first_change(part["old"], new)
                told = f"found {old!r}, expected {expected!r} of {file.name}"
                wrong.append((line, f"{told}; do: make figures"))
            return part["start"] + new + part["end"]

        return replaced

    blocks = BLOCK.sub(
        by(lambda part, record: f"\n{describe(record, part['path'])}\n\n"), text
    )
    whole = INLINE.sub(
        by(lambda part, record: value_of(record, part["path"], part["format"])), blocks
    )
    return whole, wrong


def _first_change(old: str, new: str) -> tuple[str, str]:
    pairs = itertools.zip_longest(old.split("\n"), new.split("\n"), fillvalue="")
    return next((a, b) for a, b in pairs if a != b)


def draw_pictures(
    page: Path, text: str, records: Path, check: bool
) -> list[tuple[int, str]]:
    """Draw a page's confusion matrices, or only compare; return what is wrong."""
    wrong = []
    for mark in PICTURE.finditer(text):
        line, file = text.count("\n", 0, mark.start()) + 1, page.parent / mark["file"]
        try:
            newest, record = read_newest(records, mark["name"])
            counts = counts_of(record)
        except ValueError as error:
            wrong.append((line, f"found {mark['file']}: {error}"))
            continue
        if file.exists() and is_of(file.read_text(), counts):
            continue
        if check:
            told = f"found {file.name}, expected the counts of {newest.name}"
            wrong.append((line, f"{told}; do: make figures"))
        else:
            file.write_text(draw_confusion(counts))
    return wrong


def pages(root: Path) -> list[Path]:
    """Return the pages whose marks are filled."""
    some = (root / "docs").glob("*.md"), (root / "benchmarks").glob("*.md")
    return [root / "README.md", *sorted(itertools.chain(*some))]


def main(root: Path = harness.ROOT, words: list[str] | None = None) -> int:
    """Write the figures of the pages, or compare them; return the exit code."""
    parser = argparse.ArgumentParser(description="Figures of pages from records.")
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(words).check
    told = []
    for page in pages(root):
        text = page.read_text()
        new, wrong = fill(text, root / "benchmarks" / "records")
        if not check:
            if new != text:
                page.write_text(new)
            new, wrong = fill(new, root / "benchmarks" / "records")
        for first in re.finditer(r"^ *<!-- figure ", new, re.MULTILINE):
            told_of = "found a figure that starts a line, which ends the paragraph"
            line = new.count("\n", 0, first.start()) + 1
            wrong.append((line, f"{told_of}; do: put a word before it"))
        wrong += draw_pictures(page, new, root / "benchmarks" / "records", check)
        left = INLINE.sub("", BLOCK.sub("", new))
        if found := LEFT.search(left):
            line = text.count("\n", 0, text.find(found[0])) + 1
            wrong.append((line, f"found {found[0]} alone, expected a start and an end"))
        # Scores, no speed; made of other records.
        if check and page != root / "docs" / "results.md":
            expected = "expected a figure of a record; do: mark it, or take it out"
            wrong += [
                (line, f"found {it!r}, {expected}") for line, it in measured(text)
            ]
        place = page.relative_to(root)
        told += [f"{place}:{line}: {said}" for line, said in sorted(wrong)]
    print("\n".join(told), file=sys.stderr, end="\n" if told else "")
    return 1 if told else 0


if __name__ == "__main__":
    sys.exit(main())
