"""A command's exit code when some slides failed."""

import json
from pathlib import Path

import pytest

from medray import cli


@pytest.mark.usefixtures("cluster")
def test_some_failed_slides_end_with_3(
    slides: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.tif").write_text("no")
    good = str(slides / "slides" / "slide_000.tif")
    arguments = ["infer", good, str(tmp_path / "bad.tif"), "--model", str(model)]
    arguments += ["--out", str(tmp_path / "run")]
    assert cli.main(arguments) == 3
    assert capsys.readouterr().out.strip().endswith("s")
    assert cli.main([*arguments, "--json"]) == 3
    result = json.loads(capsys.readouterr().out)
    assert list(result["failed"]) == ["bad"]
    assert result["skipped"] == 1
