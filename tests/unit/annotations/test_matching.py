"""Which annotation belongs to which slide."""

import logging
import unicodedata
from pathlib import Path

import pytest
from stages import commit_done

from medray.annotations.matching import match_annotations, match_names, slide_names
from medray.classes import Classes
from medray.errors import ConfigError
from medray.evaluation.truth_files import find_ground_truth
from medray.execution.commit import changed_slides
from medray.slides.discovery import SlideFile, find_slides
from medray.storage.ledger import Ledger


def place(folder: Path, *names: str) -> str:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return str(folder)


def matched(
    tmp_path: Path, slides: tuple[str, ...], annotations: tuple[str, ...]
) -> dict[str, str]:
    """Match by ingest's function, check that evaluate's agrees; names by names."""
    root = place(tmp_path / "slides", *slides)
    folder = place(tmp_path / "annotations", *annotations)
    wanted = find_slides([root])
    found = match_annotations(wanted, folder)
    # A run knows id and address of a slide, no more.
    rows = [SlideFile(file.slide, file.uri) for file in wanted]
    assert find_ground_truth(rows, folder, Classes()) == (found, "annotation")
    uris = {file.slide: file.uri for file in wanted}
    return {
        uris[slide].removeprefix(f"{root}/"): uri.removeprefix(f"{folder}/")
        for slide, uri in found.items()
    }


@pytest.mark.parametrize(
    ("slides", "annotations", "expected"),
    [
        (("u+v.tif",), ("u+v.xml",), {"u+v.tif": "u+v.xml"}),
        # names that become the same id
        (("p q.tif", "p_q.tif", "p,q.tif"), ("p q.svg", "p,q.svg", "p_q.svg"),
         {"p q.tif": "p q.svg", "p_q.tif": "p_q.svg", "p,q.tif": "p,q.svg"}),
        (("p q.tif", "p_q.tif"), ("p_q.svg",), {"p_q.tif": "p_q.svg"}),
        # named by the slide's id
        (("p q.tif",), ("p_q.svg",), {"p q.tif": "p_q.svg"}),
        (("m/n.tif",), ("m__n.svg",), {"m/n.tif": "m__n.svg"}),
        # two sites
        (("m/n.tif", "o/n.tif"), ("m/n.json", "o/n.json"),
         {"m/n.tif": "m/n.json", "o/n.tif": "o/n.json"}),
        (("m/n.tif", "o/r.tif"), ("n.json", "r.json"),
         {"m/n.tif": "n.json", "o/r.tif": "r.json"}),
        (("n.tif", "o/n.tif"), ("n.json",), {"n.tif": "n.json"}),
        (("n.tif",), ("o/n.json",), {}),
        # two formats
        (("n.tif", "n.svs"), ("n.tif.json", "n.svs.json"),
         {"n.tif": "n.tif.json", "n.svs": "n.svs.json"}),
        (("n.tif", "n.svs"), ("n.svs.json", "n.json"),
         {"n.svs": "n.svs.json", "n.tif": "n.json"}),
        (("m/n.ndpi",), ("n.ndpi.json",), {"m/n.ndpi": "n.ndpi.json"}),
        (("n.TIF",), ("n.GeoJSON",), {"n.TIF": "n.GeoJSON"}),
        (("d\N{COMBINING DIAERESIS}e.tif",), ("d\u0308e.svg",),
         {"d\u0308e.tif": "d\u0308e.svg"}),
    ],
)  # fmt: skip
def test_each_slide_has_its_own_annotation(
    tmp_path: Path,
    slides: tuple[str, ...],
    annotations: tuple[str, ...],
    expected: dict[str, str],
) -> None:
    assert matched(tmp_path, slides, annotations) == expected


def test_composed_and_decomposed_names_are_the_same(tmp_path: Path) -> None:
    name = unicodedata.normalize("NFD", "größe")
    found = matched(tmp_path, (f"{name}.tif",), ("größe.svg",))
    assert found == {f"{name}.tif": "größe.svg"}


@pytest.mark.parametrize(
    "slides", [("n.tif", "n.ndpi"), ("m/n.tif", "o/n.tif"), ("m/n.tif", "o/n.svs")]
)
def test_an_annotation_of_several_slides_is_refused(
    tmp_path: Path, slides: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as error:
        matched(tmp_path, slides, ("n.svg",))
    for name in (*(f"slides/{slide}" for slide in slides), "annotations/n.svg"):
        assert name in str(error.value)


def test_slides_of_two_folders_with_one_name_are_refused(tmp_path: Path) -> None:
    folders = [place(tmp_path / site, "n.tif") for site in ("south", "north")]
    annotations = place(tmp_path / "annotations", "n.svg")
    wanted = find_slides(folders)
    with pytest.raises(ConfigError, match=r"n\.svg: could belong to .*north.*south"):
        match_annotations(wanted, annotations)
    both = place(tmp_path / "all", "south/n.svg", "north/n.svg")
    assert match_annotations(wanted, both) == {}
    match_together = match_annotations(find_slides([str(tmp_path)]), both)
    assert {slide: uri.rsplit("/", 2)[1] for slide, uri in match_together.items()} == {
        "south__n": "south",
        "north__n": "north",
    }


def test_the_preferred_of_several_annotations_is_used_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = matched(tmp_path, ("n.svs",), ("n.png", "n.geojson", "n.xml", "z.xml"))
    assert found == {"n.svs": "n.geojson"}
    assert "n.geojson is used, not" in caplog.text
    assert all(name in caplog.text for name in ("n.png", "n.xml", "z.xml"))


def test_a_slide_is_not_its_own_annotation(tmp_path: Path) -> None:
    both = place(tmp_path, "n.tif", "o.tif", "o.svg")
    wanted = find_slides([both])
    assert match_annotations(wanted, both) == {"o": f"{both}/o.svg"}


def test_a_dataset_knows_slides_by_their_address() -> None:
    ingested = SlideFile("m__n", "/data/m/n.tif")
    labels = {"labels": slide_names(ingested)[:-2]}
    moved = SlideFile("m__n", "/copy/m/n.tif")
    direct = SlideFile("n", "/data/m/n.tif")
    other = SlideFile("o__n", "/data/o/n.tif")
    for file in (ingested, moved, direct):
        assert match_names([file, other], labels) == {file.slide: "labels"}
    assert match_names([other], labels) == {}
    assert SlideFile("gone", "/data/x.tif").path == "gone"


def test_a_slide_does_not_take_the_place_of_another(tmp_path: Path) -> None:
    for site in ("south", "north"):
        place(tmp_path / site, "n.tif")
        (tmp_path / site / "n.tif").write_text(site)

    def found(site: str) -> list[SlideFile]:
        return find_slides([str(tmp_path / site)])

    ledger = Ledger(str(tmp_path / "out"))
    (task,) = changed_slides(found("south"), ledger)
    commit_done(ledger, task.input)
    assert changed_slides(found("south"), ledger) == []
    with pytest.raises(ConfigError, match=r"north/n\.tif: .*south/n\.tif, another"):
        changed_slides(found("north"), ledger)
    # Refused before anything was done.
    assert changed_slides(found("south"), ledger) == []
    # A copy, and what was moved, is the same slide.
    (tmp_path / "north" / "n.tif").write_text("south")
    (task,) = changed_slides(found("north"), ledger)
    assert task.input.uri.endswith("north/n.tif")
    ledger.close()


def test_a_slide_is_not_done_twice_under_two_ids(tmp_path: Path) -> None:
    for site in ("south", "north"):
        place(tmp_path / site, "n.tif")
        (tmp_path / site / "n.tif").write_text(site)
    south, north = str(tmp_path / "south"), str(tmp_path / "north")
    ledger = Ledger(str(tmp_path / "out"))

    def run(*items: str) -> list[str]:
        """Do what is to do; give the ids."""
        tasks = changed_slides(find_slides(items), ledger)
        for task in tasks:
            commit_done(ledger, task.input)
        return [task.input.slide for task in tasks]

    assert run(south) == ["n"]
    for items in ([south, north], [str(tmp_path)]):
        with pytest.raises(ConfigError) as refused:
            run(*items)
        for said in (f"{south}/n.tif", "'n'", "another --out", "south"):
            assert said in f"{refused.value}"
        assert sorted(ledger.slides) == ["n"]  # before any work
    assert run(south) == []
    # What failed before under another id may be done; so may what was moved.
    (tmp_path / "other").mkdir()
    (tmp_path / "south" / "n.tif").rename(tmp_path / "other" / "m.tif")
    assert run(str(tmp_path / "other")) == ["m"]
    ledger.commit_slide(ledger.slides["m"] | {"status": "failed"})
    (tmp_path / "south").rmdir()
    assert sorted(run(str(tmp_path))) == ["north__n", "other__m"]
    ledger.close()
