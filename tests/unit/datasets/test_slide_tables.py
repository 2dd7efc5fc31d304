"""Tables of users: whatever they look like, they are read rightly or refused."""

from __future__ import annotations

import csv
import io
import logging
import re
import string
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from medray.datasets.images import ImageFile
from medray.datasets.join_tables import (
    Unknown,
    join_divisions,
    join_table,
)
from medray.datasets.names import Names, names_of_images, names_of_slides
from medray.datasets.slide_tables import (
    read_cohorts,
    read_groups,
    read_labels,
    read_mpp,
    read_splits,
)
from medray.datasets.tables import read_table
from medray.errors import ConfigError
from medray.slides import as_slides, slide_id


def slides_of(*paths: str) -> dict[str, Names]:
    """Names of slides of a folder /data/in."""
    return names_of_slides(as_slides([(f"/data/in/{path}", path) for path in paths]))


def images_of(*paths: str) -> dict[str, Names]:
    return names_of_images(
        ImageFile(
            image=path,
            uri=f"/data/cells/{path}",
            class_name="a",
            split="",
            fingerprint="",
            patient=path,
        )
        for path in paths
    )


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes a table; returns where."""

    def written(content: str | bytes, name: str = "table.csv") -> str:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    return written


type Write = Callable[..., str]
WANTED = {"case1": "A", "case2": "A", "sub__case3": "B"}
SLIDES = slides_of("case1.svs", "case2.svs", "sub/case3.ome.tiff")


def groups_in(uri: str, names: dict[str, Names] = SLIDES) -> dict[str, str]:
    return join_table(read_groups(uri), names, unknown="refuse").column("group")


# --- reading --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        "slide,group\ncase1,A\ncase2,A\nsub__case3,B\n",
        "Slide ;GROUP\r\ncase1;A\r\ncase2;A\r\nsub__case3;B\r\n",
        "group\tSLIDE\rA\tcase1\rA\tcase2\rB\tsub__case3",
        '\n\n"slide", "group"\n "case1", "A"\n\n case2 , A\n,\nsub__case3,B,,\n',
        "age,slide,group,\n61,case1,A,\n,case2,A,\n7,sub__case3,B,\n",
        ",slide,group\n0,case1,A\n1,case2,A\n2,sub__case3,B\n",
        '"slide";"note, in words";"group"\n"case1";"a;b\n""c""";"A"\ncase2;;A\n'
        "sub__case3;;B\n",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_dialects_are_read(
    write: Write, content: str, encoding: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert groups_in(write(content.encode(encoding))) == WANTED
    assert "table.csv: 3 of 3 rows matched 3 of 3 slides" in caplog.text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "line 1: expected the columns slide and group.* without slide"),
        (b"name,group\na,b\n", r"found \['name', 'group'\], without slide"),
        (b"slide|group\na|b\n", "between commas, semicolons or tabs"),
        (b"slide,group,Group\na,b,c\n", "line 1: has the column group twice"),
        (b"slide,group\n", "holds no slide"),
        (b"slide,group\ncase1,A\n\n\ncase2\n", "line 5: expected 2 cells .* found 1"),
        (b"slide,group\ncase1,A,B\n", "line 2: expected 2 cells .* found 3"),
        (b"slide,group\n,A\n", "line 2: has no slide"),
        (b'slide,group\ncase1,"A\ncase2,A\n', "after line 1; mend its quotes"),
        (b'slide,group\n"a\nb\nc",A\ncase2,A,B\n', "line 5: expected 2 cells"),
        (b"slide,group\ncase1,A\ncase2,\xe4\n", "line 3: .*UTF-8.*0xe4"),
        ("slide,group\ncase1,A\n".encode("utf-16-le"), "line 1: .*NUL"),
        (b"PK\x03\x04rest", "workbook"),
    ],
)
def test_what_is_no_such_table_is_refused(
    write: Write, content: bytes, said: str
) -> None:
    uri = write(content)
    with pytest.raises(ConfigError, match=f"(?s)^{re.escape(uri)}: .*{said}"):
        read_groups(uri)


def test_a_table_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for uri in (tmp_path / "none.csv", tmp_path, tmp_path / "a" / "b.csv"):
        with pytest.raises(ConfigError, match=f"{uri}: expected a CSV file"):
            read_splits(str(uri))


def test_a_blank_or_such_is_no_patient(write: Write) -> None:
    uri = write("slide,group\ncase1,\ncase2,NA\nsub/case3, n/a \n")
    assert set(groups_in(uri).values()) == {""}
    table = read_cohorts(write("slide,Patient,site\nx,nan,\ny,p,NA\n"))
    assert [row.values for row in table.rows] == [
        {"patient": "", "site": ""},
        {"patient": "p", "site": "NA"},
    ]


@pytest.mark.parametrize("pair", ["Ab,aB", "A b,A  b", "ﬁ,fi", "A,A\u200b"])
def test_values_that_look_alike_are_refused(write: Write, pair: str) -> None:
    first, second = pair.split(",")
    text = f"slide,{{}}\ncase1,{first}\ncase2,{first}\nsub/case3,{second}\n"
    for column, read in (
        ("group", read_groups),
        ("site", read_cohorts),
        ("label", read_labels),
    ):
        with pytest.raises(ConfigError, match=f"lines 2 and 4: {column}"):
            read(write(text.format(column)))
    # Composed or not is the same to everyone.
    rows = [f"case1,{unicodedata.normalize(form, 'é')}\n" for form in ("NFC", "NFD")]
    assert groups_in(write("slide,group\n" + "".join(rows))) == {"case1": "é"}


def test_splits_have_the_names_that_people_give(write: Write) -> None:
    uri = write("slide,split\na,Training\nb,VALID\nc,validation\nd,testing\ne,\n")
    found = [row.values["split"] for row in read_splits(uri).rows]
    assert found == ["train", "val", "val", "test", ""]
    with pytest.raises(ConfigError, match="line 3: slide b: expected a split .*'tets'"):
        read_splits(write("slide,split\na,train\nb,tets\n"))


def test_a_table_that_puts_nothing_into_splits_is_told_of(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    uri = write("slide,split\n")
    _, split_of = join_divisions(None, uri, SLIDES, unknown="refuse")
    assert split_of == dict.fromkeys(SLIDES, "")
    assert "has no rows" in caplog.text
    assert "3 of 3 slides are in no split" in caplog.text


def test_a_label_may_not_be_blank(write: Write) -> None:
    with pytest.raises(ConfigError, match="line 3: slide b: has no label"):
        read_labels(write("slide,label\na,x\nb,\n"))


def test_microns_may_have_a_decimal_comma(write: Write) -> None:
    table = read_mpp(write("slide;mpp\na;0,25\nb;0.5\n"))
    assert [float(row.values["mpp"]) for row in table.rows] == [0.25, 0.5]


def test_names_of_columns_are_kept_as_they_are_written(write: Write) -> None:
    table = read_cohorts(write("Site No.;slide;Scanner\n1;a;X\n"))
    assert table.columns == ("Site No.", "Scanner")
    assert read_table(write("slide\na\n"), []).columns == ()
    with pytest.raises(ConfigError, match="at least one other"):
        read_cohorts(write("slide\na\n"))


# --- names ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "a__Case_7",
        "a/Case 7.ome.tif",
        "a/Case 7",
        "Case 7.ome.tif",
        "Case 7",
        "case 7.OME.TIF",
        "./a/Case 7.ome.tif",
        r"a\Case 7.ome.tif",
        "/data/in/a/Case 7.ome.tif",
        "/data/in/a/Case 7",
        "in/a/Case 7.ome.tif",
        "Case 7.svs",
    ],
)
def test_a_slide_has_many_names(write: Write, name: str) -> None:
    names = slides_of("a/Case 7.ome.tif", "a/Case 70.ome.tif", "Case 8.svs")
    own = next(slide for slide in names if slide.endswith("7"))
    uri = write(f"slide,group\n{name},P\n")
    assert groups_in(uri, names) == {own: "P"}


def test_composed_and_decomposed_names_are_the_same(write: Write) -> None:
    for ours, theirs in (("NFC", "NFD"), ("NFD", "NFC")):
        path = unicodedata.normalize(ours, "Gewebe für é.svs")
        said = unicodedata.normalize(theirs, "Gewebe für é")
        names = slides_of(path)
        assert list(groups_in(write(f"slide,group\n{said},P\n"), names)) == [*names]


def test_the_closest_name_counts(write: Write) -> None:
    names = slides_of("x.svs", "a/x.svs", "X.svs", "b/y.svs", "c/y.svs")
    uri = write("slide,group\nx.svs,1\na/x,2\nX,3\nb/y,4\n")
    found = {names[one].uri[9:]: value for one, value in groups_in(uri, names).items()}
    assert found == {"x.svs": "1", "a/x.svs": "2", "X.svs": "3", "b/y.svs": "4"}
    with pytest.raises(ConfigError, match=r"line 2: y could be .*b/y.svs and .*c/y.s"):
        groups_in(write("slide,group\ny,1\n"), names)
    with pytest.raises(ConfigError, match=r"could be .*x.tif"):
        groups_in(write("slide,group\nx,1\n"), slides_of("x.svs", "x.tif"))
    with pytest.raises(ConfigError, match="could be"):
        groups_in(write("slide,group\nAB,1\n"), slides_of("Ab.svs", "aB.svs"))


def test_an_image_has_many_names(write: Write) -> None:
    names = images_of("train/pos/i1.png", "val/neg/i2.png", "val/pos/i3.png")
    for said in ("train/pos/i1.png", "pos/i1.png", "i1.png", "i1", "pos/i1", "I1.PNG"):
        uri = write(f"slide,group\n{said},P\n")
        assert groups_in(uri, names) == {"train/pos/i1.png": "P"}
    twice = images_of("pos/i1.png", "neg/i1.png")
    with pytest.raises(ConfigError, match=r"could be .*neg/i1.png and .*pos/i1.png"):
        groups_in(write("slide,group\ni1.png,P\n"), twice)


def test_cells_of_one_image_are_told_apart(write: Write) -> None:
    cells = names_of_images(
        ImageFile(
            image=f"pos/i_{number}",
            uri="/data/pos/i.bmp",
            class_name="pos",
            split="",
            fingerprint="",
            patient="",
            cut=True,
        )
        for number in ("01", "02")
    )
    assert groups_in(write("slide,group\ni_02,P\n"), cells) == {"pos/i_02": "P"}
    with pytest.raises(ConfigError, match="is no slide of the request"):
        groups_in(write("slide,group\npos/i.bmp,P\n"), cells)


# --- joining --------------------------------------------------------------------------


def test_a_row_that_names_nothing_is_refused(write: Write) -> None:
    uri = write("slide,group\ncase1,A\ncase22,A\nother,B\n")
    with pytest.raises(ConfigError) as raised:
        groups_in(uri)
    said = str(raised.value)
    assert said.startswith(f"{uri}: line 3: names case22, which is no slide")
    assert "the nearest: case2.svs" in said
    assert "2 of 3 rows are such (lines 3, 4)" in said
    assert "--ignore-unknown" in said


def test_rows_that_name_nothing_can_be_left_out_if_others_do(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    uri = write("slide,group\ncase1,A\nother,B\n")
    joined = join_table(read_groups(uri), SLIDES, unknown="ignore")
    assert joined.column("group") == {"case1": "A"}
    assert str(joined) == "table.csv: 1 of 2 rows matched 1 of 3 slides"
    assert "1 rows belong to no slide: other" in caplog.text
    assert "2 slides have no row: case2, sub__case3" in caplog.text
    none = read_groups(write("slide,group\nother,B\nmore,B\n"))
    ways: list[Unknown] = ["refuse", "ignore"]
    for way in ways:
        with pytest.raises(ConfigError, match="None of the 2 rows names one"):
            join_table(none, SLIDES, unknown=way)
    # A standing table, of which a night has nothing.
    assert join_table(none, SLIDES, unknown="warn").row_of == {}


def test_slides_of_an_earlier_request_may_be_named(write: Write) -> None:
    uri = write("slide,group\ncase1,A\nold.svs,B\n")
    joined = join_table(
        read_groups(uri), SLIDES, unknown="refuse", known=slides_of("old.svs")
    )
    assert joined.column("group") == {"case1": "A", "old": "B"}
    assert joined.without == ("case2", "sub__case3")


def test_rows_of_one_slide_must_agree(write: Write) -> None:
    assert groups_in(write("slide,group\ncase1,A\ncase1.svs,A\n")) == {"case1": "A"}
    for other in ("B", ""):
        uri = write(f"slide,group\ncase1,A\n\ncase1.svs,{other}\n")
        with pytest.raises(ConfigError, match=r"lines 2 and 4: .*case1,A and case1.s"):
            groups_in(uri)


def test_a_group_in_two_splits_is_refused(write: Write) -> None:
    groups = write("slide,group\ncase1,A\ncase2,A\nsub/case3,B\n", "g.csv")
    splits = "slide,split\ncase2,val\ncase1,train\nsub/case3,"
    with pytest.raises(ConfigError) as raised:
        join_divisions(groups, write(splits), SLIDES, unknown="refuse")
    said = str(raised.value)
    assert f"group A of {groups} is in" in said
    assert "train (case1: line 3, its group line 2)" in said
    assert "val (case2: line 2, its group line 3)" in said
    fine = write(splits.replace("val", "train"))
    assert join_divisions(groups, fine, SLIDES, unknown="refuse") == (
        WANTED,
        {"case1": "train", "case2": "train", "sub__case3": ""},
    )
    # Blank: of each its own.
    alone = write("slide,group\ncase1,\ncase2,\n", "g.csv")
    join_divisions(alone, write(splits), SLIDES, unknown="refuse")


def test_many_slides_are_joined_soon(write: Write) -> None:
    """Also if all have one file name: none is compared with all others."""
    paths = [f"p{number}/slide.svs" for number in range(20_000)]
    text = "".join(f"{path},{path[:-10]}\n" for path in paths)
    found = groups_in(write(f"slide,group\n{text}"), slides_of(*paths))
    assert found == {slide_id(path): path[:-10] for path in paths}


# --- any table ------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """A table, what it says, and whether it may be read."""

    data: bytes
    truth: dict[str, str]
    broken: bool


_LETTERS = string.ascii_letters + string.digits + " _-.éßΩ日"
_texts = st.text(_LETTERS, min_size=1, max_size=8).map(
    lambda text: unicodedata.normalize("NFC", text.strip(" ."))
)
_FOLDERS = ("", "a/", "b/", "a/deep er/")


@st.composite
def tables(draw: st.DrawFn) -> tuple[dict[str, Names], Written]:
    """Slides, and a table of them in some dialect, perhaps with a fault."""
    stems = draw(
        st.lists(
            _texts.filter(bool),
            min_size=1,
            max_size=6,
            unique_by=lambda text: unicodedata.normalize("NFKC", text).casefold(),
        )
    )
    paths = [
        draw(st.sampled_from(_FOLDERS))
        + stem
        + draw(st.sampled_from((".svs", ".ome.tif")))
        for stem in stems
    ]
    ids = [slide_id(path) for path in paths]
    assume(len({one.casefold() for one in ids}) == len(ids))
    names = slides_of(*paths)
    values = draw(
        st.lists(
            st.one_of(st.just(""), _texts),
            min_size=len(ids),
            max_size=len(ids),
        )
    )
    folded = {unicodedata.normalize("NFKC", one).casefold() for one in values}
    assume(len(folded) == len(set(values)))
    assume(not {"na", "nan", "null", "none", "-"} & folded)
    truth = dict(zip(ids, values, strict=True))

    rows = []
    for path, own, value in zip(paths, ids, values, strict=True):
        stem = path.removesuffix(".svs").removesuffix(".ome.tif")
        said = draw(
            st.sampled_from(
                (own, path, stem, f"/data/in/{path}", path.rpartition("/")[2])
            )
        )
        rows.append([_disguised(draw, said, case=True), _disguised(draw, value)])
    if draw(st.booleans()):
        rows.append(list(draw(st.sampled_from(rows))))  # twice the same
    header = [
        draw(st.sampled_from(("slide", " Slide", "SLIDE "))),
        draw(st.sampled_from(("group", "Group ", "GROUP"))),
    ]
    table = [header, *draw(st.permutations(rows))]
    extra = draw(st.integers(0, 2))
    for number in range(extra):
        place = draw(st.integers(0, len(table[0])))
        for index, row in enumerate(table):
            fill = st.sampled_from(("", "x, y", 'a "b"', "two\nlines", "1;2\t3"))
            row.insert(place, draw(fill) if index else f"column {number}")
    fault = draw(
        st.sampled_from(("",) * 4 + ("short", "long", "unknown", "differs", "column"))
    )
    index = draw(st.integers(1, len(table) - 1))
    column = next(i for i, c in enumerate(header) if c.strip().casefold() == "slide")
    if fault == "short":
        table[index] = table[index][:-1]
    elif fault == "long":
        table[index] = [*table[index], "more"]
    elif fault == "unknown":
        table[index] = list(table[index])
        table[index][column] = "qqq" + table[index][column].replace("/", "")
    elif fault == "differs":
        row = list(table[index])
        group = next(i for i, c in enumerate(header) if c.strip().casefold() == "group")
        row[group] += "zz"
        table.append(row)
    elif fault == "column":
        table[0] = [cell if i == column else f"c{i}" for i, cell in enumerate(header)]

    delimiter = draw(st.sampled_from(",;\t"))
    end = draw(st.sampled_from(("\n", "\r\n", "\r")))
    quoting = draw(st.sampled_from((csv.QUOTE_ALL, csv.QUOTE_MINIMAL)))
    if end == "\r":  # with which the writer does not quote a \n
        quoting = csv.QUOTE_ALL
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=quoting)
    for row in table:
        writer.writerow(row)
        for _ in range(draw(st.integers(0, 1))):
            text.write(draw(st.sampled_from(("", delimiter * (len(header) - 1)))) + end)
    encoding = draw(st.sampled_from(("utf-8", "utf-8-sig", "utf-16")))
    return names, Written(text.getvalue().encode(encoding), truth, bool(fault))


def _disguised(draw: st.DrawFn, text: str, *, case: bool = False) -> str:
    """Write a text as a person may, who means the same."""
    text = unicodedata.normalize(draw(st.sampled_from(("NFC", "NFD"))), text)
    if case and draw(st.booleans()):
        swapped = text.swapcase()
        # Some letters have no other case that comes back.
        text = swapped if swapped.casefold() == text.casefold() else text
    return " " * draw(st.integers(0, 1)) + text + " " * draw(st.integers(0, 2))


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tables())
def test_any_table_is_read_rightly_or_refused(
    tmp_path: Path, made: tuple[dict[str, Names], Written]
) -> None:
    names, table = made
    path = tmp_path / "any.csv"
    path.write_bytes(table.data)
    if table.broken:
        with pytest.raises(
            ConfigError, match=rf"(?s){re.escape(str(path))}.*\blines? \d"
        ):
            groups_in(str(path), names)
    else:
        assert groups_in(str(path), names) == table.truth


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60), st.booleans())
def test_any_bytes_are_a_table_or_refused(
    tmp_path: Path, data: bytes, headed: bool
) -> None:
    path = tmp_path / "bytes.csv"
    path.write_bytes(b"slide,split\n" + data if headed else data)
    for read in (read_groups, read_splits, read_cohorts, read_labels, read_mpp):
        refused = ""
        try:
            table = read(str(path))
        except ConfigError as error:
            refused = f"{error}"
        assert str(path) in refused or len(table.rows) + len(table.columns)
