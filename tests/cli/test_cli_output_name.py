"""The suffix of the output: what is written is a safetensors file, and its name may not say otherwise."""

import pytest
import torch

from modelopt_cli import api
from modelopt_cli.artifact import check_suffix
from modelopt_cli.cli.main import main
from modelopt_cli.errors import OutputError
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.methods.share.config import ShareConfig

COMMANDS = {
    "quantize": ["quantize", "none.pth"],
    "prune": ["prune", "none.pth", "--sparsity", "0.5"],
    "share": ["share", "none.pth", "--bits", "4"],
    "distill": ["distill", "none.pth", "--student", "same", "--train", "digits"],
    "train": ["train", "none.pth", "--train", "digits"],
}


@pytest.mark.parametrize("suffix", [".onnx", ".pt", ".pth", ".bin", ".safetensors.gz", ".json"])
@pytest.mark.parametrize("command", COMMANDS)
def test_another_suffix_is_refused_before_anything_is_read(command, suffix, modelopt):
    for more in ([], ["--dry-run"], ["--force"]):
        outcome = modelopt(*COMMANDS[command], "-o", f"x{suffix}", *more)
        assert outcome.code == 2
        last = suffix[suffix.rindex(".") :]
        assert f"x{suffix}: ends in {last}, but what is written is a safetensors file" in outcome.err


@pytest.mark.parametrize("name", ["a.safetensors", "a.SafeTensors", "a", "a.b/c", ".hidden"])
def test_names_that_promise_nothing_else_pass(name):
    check_suffix(name)


def test_a_recipe_is_refused_before_its_first_step(tmp_path, modelopt):
    (tmp_path / "r.yaml").write_text(
        f"checkpoint: {tmp_path / 'r.yaml'}\noutput: {tmp_path / 'x.onnx'}\nsteps:\n- quantize\n"
    )
    outcome = modelopt("run", tmp_path / "r.yaml")
    assert outcome.code == 2
    assert "step 1 (quantize)" in outcome.err
    assert "ends in .onnx" in outcome.err


def test_the_python_verbs_refuse_it_too(tmp_path):
    torch.save({"w.weight": torch.ones(4, 4)}, tmp_path / "a.pth")
    calls = [
        lambda path: api.quantize(tmp_path / "a.pth", path),
        lambda path: api.prune(tmp_path / "a.pth", path, config=PruneConfig(sparsity=0.5)),
        lambda path: api.share(tmp_path / "a.pth", path, config=ShareConfig(bits=4)),
    ]
    for call in calls:
        with pytest.raises(OutputError, match=r"ends in \.pt"):
            call(tmp_path / "x.pt")


def test_the_hint_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"w.weight": torch.ones(64, 64)}, "a.pth")
    how = ["quantize", "a.pth", "--scheme", "int8-weight", "--no-eval", "-q"]
    assert main([*how, "-o", "a.onnx"]) == 2
    assert main([*how, "-o", "a.safetensors"]) == 0
