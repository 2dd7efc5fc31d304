"""The Python of the docs, run as it stands."""

import os
from pathlib import Path

import pyarrow as pa
import pytest
from documents import blocks

from medray.apps.nightly.catalog import COLUMNS
from medray.storage import files


@pytest.mark.timeout(400)
@pytest.mark.usefixtures("trained_here")
def test_python_runs_as_it_stands(
    cluster: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkdir("nights")
    files.write_table("nights/catalog.parquet", pa.Table.from_pylist([], COLUMNS))
    spaces: dict[str, dict[str, object]] = {}
    for page, text in blocks("python"):
        exec(compile(text, page, "exec"), spaces.setdefault(page, {}))
    assert "docs/python.md" in spaces
    printed = capsys.readouterr().out
    assert "2 {}" in printed
    assert str(tmp_path / "report" / "report.html") in printed
