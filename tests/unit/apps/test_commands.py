"""The command line says what the functions say, on a page, and explains what is wrong."""

import dataclasses
import inspect
import json
import typing
from pathlib import Path

import pytest

from medray import cli
from medray.apps import parse
from medray.apps.commands.groups import GROUPS
from medray.apps.commands.parser import (
    call,
    signature_of,
)
from medray.apps.commands.signature import (
    read_function,
)
from medray.apps.commands.table import COMMANDS

ELSEWHERE = {
    ("ingest", "folder"): "SLIDES, with --side",
    ("infer", "features"): "SLIDES, of a model of slides",
    ("evaluate", "model"): "RUN, of classifiers",
    ("evaluate", "data"): "--truth, of classifiers",
}
"""Parameters that another word of the command gives."""
TITLES = ["Input", "Model", "Output", "Where it runs", "Advanced"]
PYTHON_ONLY = {
    ("demo", "recipe"): "tests make it shorter",
    ("demo", "options"): "tests make it shorter",
    ("embed", "region"): "decides only about speed",
    ("evaluate", "slides"): "nights evaluate a part of their run",
    ("review", "reports"): "the command takes them as RUN, with --by-loss",
    ("view", "announce"): "the command line prints where it listens",
}
"""Parameters that the command line deliberately does not have."""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    page = capsys.readouterr().out.splitlines()
    assert len(page) <= 40
    assert max(map(len, page)) <= 100
    assert f"medray {command}" in page[0]
    groups = [line.removesuffix(":") for line in page[3:] if line[0] != " "]
    assert groups == [title for title in TITLES if title in groups]


def test_all_commands_fit_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    page = capsys.readouterr().out
    assert len(page.splitlines()) <= 40
    for name, command in COMMANDS.items():
        assert f"  {name} " in page
        assert command.text in page


def test_every_parameter_is_an_option_or_left_out_for_a_reason() -> None:
    left_out = set()
    for name, command in COMMANDS.items():
        options = set(signature_of(command, ()).parameters)
        for place in command.functions:
            without = [key for key, what in command.changes.items() if what is None]
            function = read_function(place, without)
            for parameter in inspect.signature(function).parameters.values():
                fields = fields_of(parameter.annotation)
                assert fields or {parameter.name} <= options, (name, parameter)
                assert fields <= options, (name, fields - options)
        left_out |= {(name, key) for key, what in command.changes.items() if not what}
    assert left_out == ELSEWHERE.keys() | PYTHON_ONLY.keys()


def fields_of(annotation: object) -> set[str]:
    """Names of the fields of a dataclass, those of dataclasses in it too."""
    names = set()
    for one in (annotation, *typing.get_args(annotation)):
        if isinstance(one, type) and dataclasses.is_dataclass(one):
            for name, hint in typing.get_type_hints(one).items():
                if not name.isupper():
                    names |= fields_of(hint) or {name}
    return names


def test_every_option_has_a_group_and_every_group_options() -> None:
    shared = {"json", "verbose", "partial_ok", "dry_run"}
    names = shared.union(*(signature_of(c, ()).parameters for c in COMMANDS.values()))
    assert names == GROUPS.keys()


def test_every_option_is_described() -> None:
    for name, command in COMMANDS.items():
        for option in signature_of(command, ()).parameters.values():
            _, how = typing.get_args(option.annotation)
            assert how.help, (name, option.name)


def test_what_is_read_is_the_function() -> None:
    """The source that is read has what importing the function gives."""
    from medray.apps.submit import submit

    read = read_function("medray.apps.submit:submit")
    assert inspect.getdoc(read) == inspect.getdoc(submit)
    named, imported = inspect.signature(read), inspect.signature(submit)
    assert [*named.parameters] == [*imported.parameters]
    for name, parameter in named.parameters.items():
        assert parameter.default == imported.parameters[name].default
        assert parameter.kind == imported.parameters[name].kind
    assert named.parameters["wait"].annotation is float


def test_only_what_is_given_is_handed_on() -> None:
    words = "infer a b --model m n --out r --stitch blend --mpp 0.5 --thresholds 0,0.7"
    request = parse([*words.split(), "--json", "-v", "--partial-ok"])
    assert request.given == {
        "slides": ["a", "b"],
        "model": ["m", "n"],
        "out": "r",
        "stitch": "blend",
        "mpp": 0.5,
        "thresholds": (0.0, 0.7),
    }
    assert (request.json, request.verbose, request.partial_ok) == (True, True, True)
    again = "infer a --model m --out r --out q --crf 1 --crf 2 --model n"
    assert parse(again.split()).given == {
        "slides": ["a"],
        "model": ["m", "n"],
        "out": "q",
        "crf": 2,
    }


def test_words_are_read_as_their_types_say() -> None:
    words = ["--classes", "a, b", "--mpp", "x.csv", "--side", "64"]
    given = parse(["ingest", "[s]*.tif", "--out", "d", *words]).given
    assert given["slides"] == ["[s]*.tif"]  # not JSON
    assert given["classes"] == ("a", "b")
    assert (given["mpp"], given["side"]) == ("x.csv", 64)
    given = parse(
        ["train", "r", "a=1", "--data", "d", "--out", "m", "b=[1,2]", "c.d=x"]
    ).given
    assert (given["recipe"], given["overrides"]) == ("r", ("a=1", "b=[1,2]", "c.d=x"))
    given = parse(
        [
            "tune",
            "r",
            "--data",
            "d",
            "--out",
            "m",
            "--grid",
            "a=[1]",
            "x=2",
            "--grid",
            "b=[2]",
        ]
    ).given
    assert (given["grid"], given["overrides"]) == (["a=[1]", "b=[2]"], ("x=2",))
    assert parse(["serve", "m", "--replicas", "1:4"]).given["replicas"] == (1, 4)
    given = parse(
        ["submit", "--job", "j", "--", "python", "x.py", "--inbox", "i"]
    ).given
    assert given["command"] == ["python", "x.py", "--inbox", "i"]
    assert (
        parse(["explain", "m", "a", "b", "--out", "o", "--class", "x"]).given["name"]
        == "x"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("infer a --model m --out r --stich blend", "Did you mean --stitch?"),
        ("infer a --model m --out r --stitch x", 'Choose from: "crop", "blend"'),
        ("infer a --model m --out", "--out requires an argument"),
        ("infer a --out r", "--model requires an argument"),
        ("infer", "SLIDES requires an argument"),
        ("infer a --model m --out r --crf 1.5", "expected a whole number, found 1.5"),
        ("infer a --model m --out r --timeout x", 'unable to convert "x" into float'),
        ("infer a --model m --out r --thresholds 0,x", "--thresholds"),
        ("infer a --model m --out r --vot", "Did you mean --vote?"),
        ("serve m --replicas 1:x", "expected MIN:MAX such as 1:4, found 1:x"),
        ("recipes unet", "unet"),
        ("infr a", 'Did you mean "infer"?'),
        ("--nothing", "--nothing"),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_says_why(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words.split())
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert len(printed.err.splitlines()) <= 2
    assert printed.out == ""


def test_a_wrong_request_ends_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["infer", "x", "--model", str(tmp_path), "--out", str(tmp_path / "r")]
    assert cli.main([*arguments, "--json"]) == 2
    result = json.loads(capsys.readouterr().out)
    assert result["exit_code"] == 2
    assert "model.yaml" in result["error"]
    assert cli.main([*arguments, "--timeout", "0"]) == 2
    assert (
        cli.main(["evaluate", "r", "--truth", "t", "--out", "o", "--cohorts", "c"]) == 2
    )
    assert cli.main(["ingest", "s", "--out", "d", "--patients", "x"]) == 2
    assert "--patients goes with --side" in capsys.readouterr().err


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("medray ")


def test_what_does_not_belong_to_the_chosen_function_is_refused() -> None:
    from medray.errors import ConfigError

    with pytest.raises(ConfigError, match="--tta: "):
        call("medray.inference:verify", {"out": "r", "tta": "all"})


def test_a_function_keeps_the_defaults_of_what_is_not_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its own, and those of the dataclasses that it takes."""
    from medray import inference
    from medray.inference import Options
    from medray.models import Prediction

    def infer(slides: list[str], *, out: str = "o", options: Options | None = None):
        return slides, out, options

    monkeypatch.setitem(infer.__annotations__, "options", Options | None)
    monkeypatch.setattr(inference, "infer", infer)
    place = "medray.inference:infer"
    assert call(place, {"slides": ["a"]}) == (["a"], "o", None)
    changed = Options(prediction=Prediction(stitch="blend"), coarse=2)
    given = {"slides": ["a"], "stitch": "blend", "coarse": 2}
    assert call(place, given) == (["a"], "o", changed)
