"""The examples of docs/python.md run as they stand, and the package exports what it says."""

import doctest
from pathlib import Path

import pytest
import torch

import modelopt_cli as mo

PAGE = Path(__file__).parents[1] / "docs" / "python.md"


def test_the_examples_of_the_guide(tmp_path, monkeypatch):
    """In an empty folder: the page makes the files that it speaks of."""
    monkeypatch.chdir(tmp_path)
    outcome = doctest.testfile(
        str(PAGE), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE, encoding="utf-8"
    )
    assert outcome.attempted > 30
    assert outcome.failed == 0


def test_every_exported_name_is_there_and_listed():
    for name in mo.__all__:
        assert getattr(mo, name) is not None
    assert sorted(mo.__all__) == mo.__all__
    assert {name for name in dir(mo) if not name.startswith("__")} == set(mo.__all__) - {"__version__"}
    text = PAGE.read_text()
    verbs = {"distill", "evaluate", "load", "load_network", "load_state_dict", "prune", "quantize", "run"}
    verbs |= {"save", "share", "train"}
    assert verbs <= set(mo.__all__)
    assert [name for name in sorted(verbs) if f"mo.{name}" not in text] == []


def test_errors_come_from_the_root():
    from modelopt_cli import errors

    names = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert names <= set(mo.__all__)


def test_a_result_is_shown_in_one_short_line():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    result = mo.quantize(network, scheme="int8-weight", example_inputs=torch.rand(2, 4))
    size = f"{result.predicted_bytes:,}"
    assert repr(result) == f"<Result of quantize: 1 of 1 layers, {size} bytes; print() shows the table>"
