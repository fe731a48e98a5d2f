"""Commands on a network that is captured in parts: its file needs the code that calls them."""

import json
import sys
from pathlib import Path

import pytest
import torch

import modelopt_cli

sys.path.insert(0, str(Path(__file__).parents[1] / "program"))
from parted_networks import gated

DATA = """
import torch

def load():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(3, 16, 16, generator=generator), number % 4) for number in range(16)]
"""
pytestmark = pytest.mark.slow
HOW = ["--arch", "net.py:Gated", "--input-shape", "3x16x16"]
DATA_HOW = [*HOW, "--data", "data.py:load"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = Path(__file__).parents[1] / "program" / "parted_networks.py"
    (tmp_path / "net.py").write_text(source.read_text())
    (tmp_path / "data.py").write_text(DATA)
    torch.save(gated().state_dict(), "net.pth")
    return tmp_path


def test_from_a_checkpoint_to_int8_and_back(here, modelopt):
    outcome = modelopt("quantize", "net.pth", *DATA_HOW, "-o", "q.safetensors", "--no-eval", "--json")
    assert outcome.code == 0, outcome.err
    told = json.loads(outcome.out)
    assert told["parts"]["submodules"] == ["first", "second", "head"]
    assert told["parts"]["flops"] == pytest.approx(173_568 / 173_584)
    assert "values in a tensor" in told["parts"]["reason"]
    assert told["compressed"]["layers"] == 5
    assert {layer["name"]: layer["reason"] for layer in told["coverage"]}["mixing"].startswith("outside")
    x = torch.randn(3, 3, 24, 16)
    quantized = modelopt_cli.load("q.safetensors", arch="net.py:Gated")
    torch.testing.assert_close(quantized(x), gated()(x), atol=0.05, rtol=0)
    assert not torch.equal(quantized(x), gated()(x))

    refused = modelopt("eval", "q.safetensors", "--data", "data.py:load")
    assert refused.code == 2
    assert "holds parts of a network, which its own code calls; name that: --arch net.py:Gated" in refused.err
    table = modelopt("eval", "net.pth", "q.safetensors", *DATA_HOW, "--latency-runs", "0", "--json")
    assert table.code == 0, table.err
    assert [len(model["metrics"]) > 0 for model in json.loads(table.out)["models"]] == [True, True]


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("prune", ["--structure", "unstructured", "--sparsity", "0.5"]),
        ("share", ["--bits", "4"]),
    ],
)
def test_training_goes_through_the_whole_network(method, more, here, modelopt):
    train = ["--train", "data.py:load", "--epochs", "1", "--batch-size", "8", "--val-fraction", "0.5"]
    outcome = modelopt(method, "net.pth", *HOW, *more, *train, "-o", "o.safetensors", "--no-eval")
    assert outcome.code == 0, outcome.err
    before, after = gated().state_dict(), modelopt_cli.load("o.safetensors", arch="net.py:Gated").state_dict()
    assert after.keys() == before.keys()
    assert not torch.equal(after["scale"], before["scale"])  # it belongs to no part
    weight = after["second.0.weight"]
    assert (weight == 0).float().mean() > 0.4 if method == "prune" else len(weight.unique()) <= 16


@pytest.mark.parametrize("loss", ["kd+ce", "ce+hint@second"])
def test_a_student_in_parts_learns_from_a_teacher_in_parts(loss, here, modelopt):
    learn = ["--student", "net.py:Gated", "--train", "data.py:load", "--loss", loss, "--epochs", "1"]
    outcome = modelopt("distill", "net.pth", *HOW, *learn, "-o", "o.safetensors", "--no-eval", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["parts"]["submodules"] == ["first", "second", "head"]
    assert ("second" in str(json.loads(outcome.out)["distillation"].get("compared"))) == ("hint" in loss)
    student = modelopt_cli.load("o.safetensors", arch="net.py:Gated")
    assert student(torch.randn(2, 3, 16, 16)).shape == (2, 4)


def test_channels_inside_of_parts_go(here, modelopt):
    how = ["--sparsity", "0.5", "--round-to", "1", "--no-eval"]
    outcome = modelopt("prune", "net.pth", *DATA_HOW, *how, "-o", "o.safetensors")
    assert outcome.code == 0, outcome.err
    pruned = modelopt_cli.load("o.safetensors", arch="net.py:Gated")
    state = pruned.state_dict()
    inside = state["first.0.0.weight"].shape[0]
    assert inside < 8
    assert state["first.1.0.weight"].shape[:2] == (8, inside)  # what a part returns keeps its shape
    assert pruned(torch.randn(2, 3, 16, 16)).shape == (2, 4)
