"""Export: the format follows the suffix; an existing file is kept."""

import json
from pathlib import Path

import pytest

from modelopt_cli.errors import OutputError, UsageError
from modelopt_cli.measure import Evaluation
from modelopt_cli.report import check_export, csv_text, export, markdown_text, to_json


def test_the_suffix_chooses_the_format(evaluation: Evaluation, tmp_path: Path) -> None:
    for name in ("a.json", "a.md", "A.CSV"):
        export(evaluation, tmp_path / name)
    assert json.loads((tmp_path / "a.json").read_text()) == to_json(evaluation)
    assert (tmp_path / "a.md").read_text() == markdown_text(evaluation)
    assert (tmp_path / "A.CSV").read_text() == csv_text(evaluation)


@pytest.mark.parametrize("name", ["a.txt", "a", "json"])
def test_other_suffixes_are_refused_with_the_list(evaluation: Evaluation, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"\.json, \.md, \.csv"):
        check_export(tmp_path / name)
    with pytest.raises(UsageError):
        export(evaluation, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_replaced_only_with_force(evaluation: Evaluation, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(OutputError, match="exists"):
        export(evaluation, path)
    assert path.read_text() == "old"
    export(evaluation, path, force=True)
    assert json.loads(path.read_text())["schema_version"] == 1
