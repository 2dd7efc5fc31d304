"""Measured figures of pages: made of the newest record, and of nothing else."""

import json
from pathlib import Path

import pytest

from benchmarks import figures

PAGE = """# Fast

It reaches <!-- figure tiny 0:ratios:core ms/crop, 1.5:s .2f -->0.00<!-- end --> of it,
on <!-- figure tiny machine:cpu s -->?<!-- end -->.

<!-- figures tiny -->
<!-- end figures -->

Stops within 30 s. A request takes at most 5 s, and `--timeout` is 300 s.
"""
TABLE = """<!-- figures tiny -->

`python -m benchmarks.tiny --sides 8 16 --files`: 2026-12-01, Some CPU, 2 cores, \
commit abc, medians [quartiles] of 3 rounds by turns.

side: 8

| | | median [quartiles] | of base |
| --- | --- | --- | --- |
| base | s | 2 [1.5, 2.5] |  |
| core ms/crop, 1.5 | s | 4 [3.5, 4.5] | 2 [1.75, 2.25] |

| slides | whole | s |
| --- | --- | --- |
| 12 | yes | 1.235 |

<!-- end figures -->"""


def record(median: float = 4.0) -> dict[str, object]:
    other = "core ms/crop, 1.5"
    return {
        "benchmark": "benchmarks.tiny",
        "date": "2026-12-01T00:10:27+00:00",
        "machine": {"cpu": "Some CPU", "cores": 2, "memory_gib": 23, "gpus": []},
        "versions": {"medray": "abc"},
        "arguments": {"sides": [8, 16], "files": True, "model": None, "workers": False},
        "results": [
            {
                "side": 8,
                "baseline": "base",
                "rounds": {"base": {"s": [1, 2, 3]}, other: {"s": [3, 4, 5]}},
                "medians": {"base": {"s": 2.0}, other: {"s": median}},
                "spread": {"base": {"s": [1.5, 2.5]}, other: {"s": [3.5, 4.5]}},
                "ratios": {other: {"s": median / 2}},
                "spread_of_ratios": {other: {"s": [1.75, 2.25]}},
            },
            {"slides": 12, "whole": True, "s": 1.23456, "each": [1, 2]},
        ],
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks" / "records").mkdir(parents=True)
    (tmp_path / "README.md").write_text(PAGE)
    write(tmp_path, "2026-12-01", record())
    return tmp_path


def write(root: Path, date: str, what: object, name: str = "tiny") -> None:
    path = root / "benchmarks" / "records" / f"{name}-{date}.json"
    path.write_text(json.dumps(what))


def test_a_page_is_filled_from_the_record_once(root: Path) -> None:
    assert figures.main(root, ["--check"]) == 1
    assert (root / "README.md").read_text() == PAGE, "--check writes nothing"
    assert figures.main(root, []) == 0
    page = (root / "README.md").read_text()
    assert "1.5:s .2f -->2.00<!-- end --> of it" in page
    assert "on <!-- figure tiny machine:cpu s -->Some CPU<!-- end -->." in page
    assert TABLE in page
    assert figures.main(root, ["--check"]) == 0
    assert figures.main(root, []) == 0
    assert (root / "README.md").read_text() == page


def test_a_part_of_a_record_is_a_table(root: Path) -> None:
    page = root / "docs" / "page.md"
    page.write_text("<!-- figures tiny 0:medians -->\n<!-- end figures -->\n")
    assert figures.main(root, []) == 0
    assert (
        "|  | s |\n| --- | --- |\n| base | 2 |\n| core ms/crop, 1.5 | 4 |\n\n<!-- end"
    ) in page.read_text()


def test_the_newest_record_counts_and_no_other_name(root: Path) -> None:
    figures.main(root, [])
    write(root, "2026-11-30", record(9))
    write(root, "2027-01-01", record(9), name="tiny-other")
    assert figures.main(root, ["--check"]) == 0
    write(root, "2026-12-02", record(9))
    assert figures.main(root, ["--check"]) == 1
    figures.main(root, [])
    assert "-->4.50<!-- end -->" in (root / "README.md").read_text()


def test_a_changed_figure_is_named(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures.main(root, [])
    page = (root / "README.md").read_text()
    page = page.replace("-->2.00<!--", "-->2.20<!--").replace("2 [1.5", "1 [1.5")
    (root / "README.md").write_text(page)
    assert figures.main(root, ["--check"]) == 1
    inline, row = capsys.readouterr().err.splitlines()
    assert inline.startswith("README.md:3: found '2.20', expected '2.00' of tiny-2026")
    assert inline.endswith("do: make figures")
    assert "found '| base | s | 1 [1.5, 2.5] |  |', expected '| base | s | 2 " in row


@pytest.mark.parametrize(
    ("mark", "said"),
    [
        (
            "is <!-- figure none 0:s .2f --><!-- end -->",
            "no record records/none-DATE.json",
        ),
        (
            "is <!-- figure old 0:s .2f --><!-- end -->",
            "old-2026-12-01.json without bench",
        ),
        (
            "is <!-- figure tiny 1:whales d --><!-- end -->",
            "no 'whales' of '1:whales' in",
        ),
        ("is <!-- figure tiny 5:s d --><!-- end -->", "no '5' of '5:s' in"),
        ("is <!-- figure tiny 0:medians s --><!-- end -->", "is not one value"),
        (
            "is <!-- figure tiny machine:cpu .2f --><!-- end -->",
            "Unknown format code 'f'",
        ),
        ("<!-- figures tiny 1:s -->\n<!-- end figures -->", "'1:s' has no rows: 1.2"),
        ("<!-- figures none -->\n<!-- end figures -->", "no record"),
        ("<!-- figures tiny -->\n", "alone, expected a start and an end"),
        ("is <!-- figure tiny 1:s .2f -->1.23", "alone, expected a start and an end"),
        ("<!-- figure tiny 1:s .2f -->1.23<!-- end -->", "starts a line, which ends"),
        ("1.23<!-- end -->", "alone, expected a start and an end"),
    ],
)
def test_a_wrong_mark_is_named(
    root: Path, mark: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(root, "2026-12-01", {"certificate": {}}, name="old")
    page = root / "docs" / "page.md"
    page.write_text(f"# Page\n\n{mark}\n")
    for words in ([], ["--check"]):
        assert figures.main(root, words) == 1
        (wrong,) = [s for s in capsys.readouterr().err.splitlines() if "docs/" in s]
        assert wrong.startswith("docs/page.md:3: found ")
        assert said in wrong
    assert page.read_text() == f"# Page\n\n{mark}\n"


@pytest.mark.parametrize(
    "figure",
    [
        "It does 1,170 windows/s here.",
        "91 tiles a second came.",
        "read at 300 MB/s",
        "It is 1.5 times as fast as before.",
        "and twice as\nfast as before",
        "0.88 of the bare model",
        "1.07 times the memory",
        "A slide took 1.2\nand 0.5 s.",
        "It takes about 3 minutes.",
        "a lost node cost 30 to 65 s of node time",
        "its peak was 231 MiB",
        "4 to 10 minutes on 2 cores",
        "(3 min 41 s on 2026-11-30)",
        "```sh\nmake demo    # 4 minutes on two quiet cores\n```",
        "| what | time, s |\n| --- | --- |\n| it | 13.8 |",
        "| | crops/s |\n| --- | ---: |\n| it | **961** |",
    ],
)
def test_a_figure_without_a_record_is_named(
    root: Path, figure: str, capsys: pytest.CaptureFixture[str]
) -> None:
    figures.main(root, [])
    (root / "docs" / "page.md").write_text(f"# Page\n\n{figure}\n")
    assert figures.main(root, ["--check"]) == 1
    (wrong,) = capsys.readouterr().err.splitlines()
    assert wrong.startswith("docs/page.md:")
    assert "expected a figure of a record; do: mark it, or take it out" in wrong


@pytest.mark.parametrize(
    "other",
    [
        "Ctrl-C stops it within 30 s.",
        "that nobody takes it within 10 s is a warning",
        "a region that takes longer than 300 s is given up",
        "mirrored (`--tta flips`, 4 times the work)",
        "at most 4 GiB; idle nodes go after 5 minutes",
        "```\nspeed     2.9 crops/s by one process\n```",
        "| key | bytes |\n| --- | --- |\n| `a` | 12 |",
        "<!-- costs: made by `make costs` -->\n| a | s |\n| --- | --- |\n| b | 2 |\n"
        "<!-- end of costs -->",
    ],
)
def test_what_is_promised_or_set_is_no_figure(root: Path, other: str) -> None:
    figures.main(root, [])
    (root / "docs" / "page.md").write_text(f"# Page\n\n{other}\n")
    assert figures.main(root, ["--check"]) == 0


def test_dated_and_other_pages_are_left_alone(root: Path) -> None:
    figures.main(root, [])
    (root / "docs" / "decisions").mkdir()
    for name in ("CHANGELOG.md", "docs/decisions/0001-why.md", "docs/results.md"):
        (root / name).write_text("It took 5 s.\n")
    assert figures.main(root, ["--check"]) == 0


def test_the_pages_have_the_figures_of_the_records() -> None:
    assert figures.main(words=["--check"]) == 0


def confused(right: int) -> dict[str, object]:
    counts = {"ill": {"truth": "ill", "ill": right, "well": 3}}
    counts["well"] = {"truth": "well", "ill": 1, "well": 90}
    return record() | {"results": [{"confusion": counts}]}


def test_a_confusion_matrix_is_drawn_and_drawn_again(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(root, "2026-12-01", confused(80), name="cells")
    page, picture = root / "docs" / "page.md", root / "docs" / "confusion-cells.svg"
    page.write_text("![What cells were taken for](confusion-cells.svg)\n")
    assert figures.main(root, ["--check"]) == 1
    assert not picture.exists(), "--check writes nothing"
    assert figures.main(root, []) == 0
    drawn = picture.read_text()
    assert figures.main(root, ["--check"]) == 0
    write(root, "2026-12-02", confused(81), name="cells")
    capsys.readouterr()
    figures.main(root, ["--check"])
    assert (
        "page.md:1: found confusion-cells.svg, expected the counts of cells-2026-12-02.json"
        in capsys.readouterr().err
    )
    assert figures.main(root, []) == 0
    assert picture.read_text() != drawn


@pytest.mark.parametrize("name", ["tiny", "none"])
def test_a_confusion_matrix_of_no_record_is_named(
    root: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "docs" / "page.md").write_text(f"![It](confusion-{name}.svg)\n")
    assert figures.main(root, []) == 1
    said = {"tiny": "no confusion matrix", "none": "no record"}[name]
    assert said in capsys.readouterr().err
