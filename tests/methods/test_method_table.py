"""The table of methods, the command line, the Python API and the pages in docs/ say the same."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

import modelopt_cli
from modelopt_cli import api
from modelopt_cli.cli.groups import signature_of
from modelopt_cli.cli.main import COMMANDS, build
from modelopt_cli.methods.method_table import METHODS
from modelopt_cli.methods.prune.config import SCHEDULES, STRUCTURES, TARGETS
from modelopt_cli.settings import fields_of
from modelopt_cli.training.config import FineTuneConfig

DOCS = Path(__file__).parents[2] / "docs"
FIELDS = [
    pytest.param(method, field, id=f"{method} {field.name}")
    for method, row in METHODS.items()
    for field in dataclasses.fields(row.config)
]


def parameter(method, field):
    return next(p for p in build().commands[method].params if p.name == field.name)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_command_a_function_and_a_page(name):
    assert name in COMMANDS
    assert name in modelopt_cli.__all__
    assert getattr(modelopt_cli, name) is getattr(api, name)
    assert (DOCS / f"{name}.md").is_file()


@pytest.mark.parametrize("name", METHODS)
def test_a_config_is_frozen_and_has_defaults_throughout(name):
    config = METHODS[name].config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, dataclasses.fields(config)[0].name, None)


@pytest.mark.parametrize("name", METHODS)
def test_apply_takes_a_program_a_config_and_a_context(name):
    assert list(inspect.signature(METHODS[name].apply).parameters) == ["program", "config", "context"]


@pytest.mark.parametrize(("method", "field"), FIELDS)
def test_every_field_of_a_config_is_an_option_with_the_same_default(method, field):
    option = parameter(method, field)
    assert f"--{field.name.replace('_', '-')}" in option.opts
    declared = signature_of(build().commands[method]).fields.get(field.name)
    assert ((declared.initial if declared else option.default) or None) == (field.default or None)


@pytest.mark.parametrize(("method", "field"), FIELDS)
def test_every_field_of_a_config_is_in_the_method_s_page(method, field):
    assert f"--{field.name.replace('_', '-')}" in (DOCS / f"{method}.md").read_text()


@pytest.mark.parametrize("rows", [STRUCTURES, SCHEDULES, TARGETS], ids=lambda rows: "|".join(rows))
def test_every_choice_of_prune_without_a_generated_table_is_in_its_page(rows):
    page = (DOCS / "prune.md").read_text()
    assert [name for name in rows if not re.search(rf"`(--)?{name}\b", page)] == []


@pytest.mark.parametrize(
    ("command", "default"),
    [("quantize", None), ("prune", "plain"), ("share", "entropy"), ("distill", "plain")],
)
def test_how_a_file_is_written_is_the_same_option_of_every_method(command, default):
    option = signature_of(build().commands[command]).fields["code"]
    assert option.initial == default
    assert "--code" in (DOCS / f"{command}.md").read_text()


@pytest.mark.parametrize("field", fields_of(FineTuneConfig), ids=lambda field: field.name)
def test_every_field_of_the_training_is_an_option_and_in_its_page(field):
    of_train, of_prune = (signature_of(build().commands[command]).fields for command in ("train", "prune"))
    assert field in of_prune.values()
    assert (field.name in {each.name for each in of_train.values()}) is (
        field.name not in ("teacher", "distill_weight", "temperature")
    )
    page = (DOCS / "train.md").read_text()
    assert f"`{field.flag}`" in page or f"`{field.flag} " in page


def test_the_page_on_adding_a_method_names_only_files_that_exist():
    text = (DOCS / "adding-a-method.md").read_text()
    root = DOCS.parent
    paths = re.findall(r"`((?:modelopt_cli|tests|docs|tools)/[\w/.-]+)`", text)
    assert len(paths) > 10
    assert [path for path in paths if "NAME" not in path and not (root / path).exists()] == []
