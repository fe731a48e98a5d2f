"""``--code``: the same network in fewer bytes, whatever the method; sizes known before."""

import json
import runpy
import shutil

import pytest
import torch

import modelopt_cli
from modelopt_cli.errors import UsageError
from modelopt_cli.methods.prune.config import PruneConfig

HOW = ["--arch", "net.py:make?width=48", "--input-size", "8", "--channels", "1"]
CODES = ("plain", "packed", "entropy")
DATA = ["--data", "digits", "--calibration-samples", "64"]
METHODS = {
    "int8": ["quantize", *DATA],
    "int8-dynamic": ["quantize", "--scheme", "int8-dynamic"],
    "int8-weight": ["quantize", "--scheme", "int8-weight"],
    "sparse": ["prune", "--structure", "unstructured", "--sparsity", "0.8"],
    "2:4": ["prune", "--structure", "2:4"],
    "channels": ["prune", "--sparsity", "0.5"],
    "shared": ["share", "--bits", "4"],
}


@pytest.fixture
def here(good_files, enter):
    """The good files as the current directory, with a checkpoint of a wider network."""
    folder = enter(good_files)
    torch.manual_seed(0)
    # By path, since an earlier test's module may still have the name.
    make = runpy.run_path(str(folder / "net.py"))["make"]
    torch.save(make(width=48).state_dict(), folder / "net.pth")
    return folder


def write(modelopt, method, code, *more, source="net.pth"):
    command, *how = METHODS[method]
    arch = HOW if source == "net.pth" else []
    argv = [command, source, *arch, *how, "--code", code, "--json", "-q", *more]
    planned = json.loads(modelopt(*argv, "--dry-run").out)
    outcome = modelopt(*argv, "--no-eval", "-o", f"{code}.safetensors", "--force")
    assert outcome.code == 0, outcome.err
    written = json.loads(outcome.out)["output"]["file_bytes"]
    assert written == planned["predicted_bytes"]
    return written, modelopt_cli.load(f"{code}.safetensors").state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_code_is_the_same_network_in_fewer_bytes(method, here, modelopt):
    sizes, states = zip(*(write(modelopt, method, code) for code in CODES), strict=True)
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(tensor, states[0][name]) for name, tensor in state.items())
    assert sizes[2] < sizes[1] <= sizes[0]
    if method.startswith("int8") or method == "sparse":
        kept = {name for name, tensor in states[0].items() if tensor.dtype == torch.int8}
        assert sizes[2] < sizes[0] - 0.1 * sum(states[0][name].numel() for name in kept)


@pytest.mark.parametrize("code", CODES)
def test_a_file_that_was_coded_can_be_gone_on_with(code, here, modelopt):
    write(modelopt, "sparse", "entropy")
    shutil.copy(here / "entropy.safetensors", here / "first.safetensors")
    before = modelopt_cli.load("first.safetensors").state_dict()
    _, after = write(modelopt, "int8", code, source="first.safetensors")
    for name in ("0.weight", "2.weight", "5.weight"):
        assert not after[name][before[name] == 0].any()


@pytest.mark.parametrize("bare", [False, True], ids=["network", "tensors"])
@pytest.mark.parametrize("code", CODES)
def test_a_target_in_bytes_is_that_of_the_file_as_it_is_written(code, bare, here, modelopt):
    arch = [] if bare else HOW
    command = ["prune", "net.pth", *arch, "--structure", "unstructured", "--no-eval", "--json", "-q"]
    outcome = modelopt(*command, "--bytes", "0.4", "--code", code, "-o", "out.safetensors")
    assert outcome.code == 0, outcome.err
    data = json.loads(outcome.out)
    assert data["predicted_bytes"] == (here / "out.safetensors").stat().st_size
    assert data["target"]["reached"] == pytest.approx(0.4, abs=0.011)
    whole = json.loads(modelopt(*command, "--sparsity", "0.0001", "-o", "whole.safetensors").out)
    assert data["predicted_bytes"] / whole["predicted_bytes"] == pytest.approx(0.4, abs=0.05)


def test_another_code_is_refused(here, modelopt):
    for command in (["quantize"], ["prune", "--sparsity", "0.5"], ["share", "--bits", "3"]):
        refused = modelopt(command[0], "net.pth", *HOW, *command[1:], "--code", "entropie", "--no-eval")
        assert refused.code == 2
        assert (
            "--code: 'entropie' is not one of plain, packed, entropy; did you mean 'entropy'?" in refused.err
        )
    config = PruneConfig(sparsity=0.5)
    with pytest.raises(UsageError, match="code: 'zip' is not one of plain, packed, entropy"):
        modelopt_cli.api.prune("net.pth", "out.safetensors", config=config, code="zip", evaluate=False)
