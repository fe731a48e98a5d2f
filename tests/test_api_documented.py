"""The examples of docs/python.md run as they stand, and the package exports what it says."""

import doctest
import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import modelopt_cli as mo

PAGE = Path(__file__).parents[1] / "docs" / "python.md"


@pytest.mark.slow
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


FUNCTIONS = [name for name in mo.__all__ if inspect.isfunction(getattr(mo, name))]
CLASSES = [name for name in mo.__all__ if inspect.isclass(getattr(mo, name))]
SECTIONS = ["Args", "Returns", "Raises", "Example"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_says_what_it_takes_returns_and_raises(name):
    function = getattr(mo, name)
    text = inspect.getdoc(function)
    found = re.findall(r"^(Args|Returns|Raises|Example):$", text, re.MULTILINE)
    assert found == SECTIONS
    assert re.match(r"[A-Z][^\n]*\.\n\n", text), "a first line that is a sentence"
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"^    {parameter}: \S", text, re.MULTILINE), parameter
    raised = re.findall(r"^    ([\w, ]+): ", text.split("Raises:\n")[1].split("\n\n")[0], re.MULTILINE)
    for kind in ", ".join(raised).split(", "):
        assert issubclass(getattr(mo, kind), mo.ModeloptError)


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_says_what_it_is(name):
    kind = getattr(mo, name)
    text = inspect.getdoc(kind)
    assert re.match(r"[A-Z][^\n]*\.(\n\n|$)", text)
    if not issubclass(kind, mo.ModeloptError | mo.Measured):
        assert "Attributes:\n" in text


@pytest.fixture
def things(tmp_path, monkeypatch):
    """What the examples in docstrings speak of."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    Path("net.py").write_text(
        "from torch import nn\n\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    Path("recipe.yaml").write_text(
        "checkpoint: base.safetensors\ndata: digits\nlatency-runs: 0\nsteps:\n  - share: {bits: 4}\n"
    )
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)).eval()
    batch, labels = torch.rand(32, 1, 8, 8), torch.randint(10, (32,))
    loader = DataLoader(TensorDataset(batch, labels), batch_size=8)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    torch.save(network.state_dict(), "net.pth")
    result = mo.share(model, "base.safetensors", bits=8, example_inputs=batch, evaluate=False)
    mo.quantize(model, "int8.safetensors", calibration=loader, evaluate=False)
    return {"mo": mo, "torch": torch, "nn": nn, **locals()}


SHOWN = [*FUNCTIONS, *(name for name in CLASSES if ">>>" in inspect.getdoc(getattr(mo, name)))]


@pytest.mark.parametrize("name", SHOWN)
def test_the_examples_of_docstrings(name, things):
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(getattr(mo, name)), things, name, None, 0)
    assert test.examples
    assert not any(example.options for example in test.examples), "an example that is not run"
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed == 0
