"""The help texts, and the page made from them."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from modelopt_cli.cli.main import COMMANDS, build

ROOT = Path(__file__).parents[2]


def parameters():
    group = build()
    for name, command in group.commands.items():
        for parameter in command.params:
            yield pytest.param(parameter, id=f"{name} {parameter.name}")


@pytest.mark.parametrize("parameter", list(parameters()))
def test_every_option_has_help_that_is_a_sentence(parameter):
    assert parameter.help
    assert parameter.help[0].isupper() or ":" in parameter.help
    assert parameter.help.endswith((".", "]"))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_one_line_that_fits_the_list(name, modelopt):
    line = next(line for line in modelopt("--help").out.splitlines() if line.strip().startswith(f"{name} "))
    assert line.endswith(".")
    assert not line.endswith("...")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_can_be_quiet_verbose_debugged_and_machine_read(name, modelopt):
    text = modelopt(name, "--help").out
    assert all(option in text for option in ("-q, --quiet", "-v, --verbose", "--debug", "--json"))


def test_what_does_not_exist_yet_is_not_listed(modelopt):
    text = modelopt("--help").out
    assert not [word for word in ("search", "export") if f" {word} " in text]


@pytest.mark.slow
def test_the_page_is_fresh(environ):
    check = subprocess.run(
        [sys.executable, ROOT / "tools" / "docs.py", "--check"],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (check.returncode, check.stderr) == (0, "")


def test_the_table_of_exit_codes_is_that_of_the_errors():
    from modelopt_cli import errors

    page = (ROOT / "docs" / "cli.md").read_text()
    codes = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type)}
    assert all(f"\n| {code} | " in page for code in {0, *codes})


def test_a_new_row_is_in_its_table(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import tables

    from modelopt_cli.methods.quantize.observers import OBSERVERS

    page = ROOT / "docs" / "quantize.md"
    assert tables.filled_pages(page.parent)[page] == page.read_text()
    monkeypatch.setitem(OBSERVERS, "none", dataclasses.replace(OBSERVERS["mse"], help="nothing at all"))
    assert "| `none` | nothing at all | Banner" in tables.filled_pages(page.parent)[page]


def test_every_table_is_on_one_page(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import tables

    pages = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    assert sorted(re.findall(r"<!-- table: ([a-z_-]+) -->", pages)) == sorted(tables.TABLES)
