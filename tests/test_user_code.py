"""Loading of what the user named, for networks and data alike."""

import os
import sys
from pathlib import Path

import pytest

from modelopt_cli.errors import ArchitectureError, DataError
from modelopt_cli.user_code import load_callable, user_code


def test_a_file_that_was_changed_is_loaded_again(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("def make(): return 1\n")
    first = load_callable(str(file), "make", DataError)
    assert load_callable(str(file), "make", ArchitectureError) is first
    file.write_text("def make(): return 22\n")
    assert load_callable(str(file), "make", DataError)() == 22


def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "own.py").write_text(f"def make(): return {number}\n")
    makers = [load_callable(str(tmp_path / n / "own.py"), "make", DataError) for n in ("1", "2")]
    assert [make() for make in makers] == [1, 2]


def test_a_neighbour_comes_before_what_is_installed(tmp_path: Path) -> None:
    (tmp_path / "iniconfig.py").write_text("here = True\n")
    (tmp_path / "own.py").write_text("import iniconfig\ndef make(): return iniconfig.here\n")
    before = sys.modules.pop("iniconfig", None)
    try:
        assert load_callable(str(tmp_path / "own.py"), "make", DataError)()
        assert sys.path[-1] == str(tmp_path)
    finally:
        sys.modules.pop("iniconfig", None)
        if before is not None:
            sys.modules["iniconfig"] = before


def test_a_file_that_fails_leaves_no_module(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("raise OSError(7)\n")
    before = set(sys.modules)
    with pytest.raises(DataError, match=r"own\.py: importing it failed \(OSError: 7 at own\.py:1\)"):
        load_callable(str(tmp_path / "own.py"), "make", DataError)
    assert set(sys.modules) == before


@pytest.mark.parametrize("error", [ArchitectureError, DataError])
def test_failures_name_the_users_own_line(tmp_path: Path, error: type[DataError]) -> None:
    (tmp_path / "own.py").write_text("import json\n\ndef make(): json.loads('{')\n")
    make = load_callable(str(tmp_path / "own.py"), "make", error)
    with pytest.raises(error, match=r"sample 3: cannot be read \(JSONDecodeError: .* at own\.py:3\)"):  # noqa: SIM117
        with user_code("cannot be read", "sample 3", error):
            make()


def test_output_does_not_reach_stdout(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.py").write_text("print('loading')\ndef make(): pass\n")
    load_callable(os.fspath(tmp_path / "own.py"), "make", DataError)
    assert capfd.readouterr().out == ""
