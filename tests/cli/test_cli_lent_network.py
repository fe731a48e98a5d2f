"""Weights whose architecture nobody says, next to a file that holds its network."""

import json
import shutil

import pytest
import torch

from modelopt_cli.cli.main import main

HOW = ["--latency-runs", "0", "-q"]
DATA = ["--data", "digits"]
ERROR = "error: net.pth: nothing says its architecture, so it cannot be run next to int8.safetensors"


@pytest.fixture(scope="module")
def files_of_it(good_files, tmp_path_factory):
    """The weights, an int8 file of them, and one of shared weights that computes in float32."""
    folder = tmp_path_factory.mktemp("lent") / "files"
    shutil.copytree(good_files, folder)
    sample = ["--arch", f"{folder / 'net.py'}:make", "--input-size", "8", "--channels", "1", "--no-eval"]
    for words, name in (
        (["quantize", "--calibration", "digits?split=train"], "int8"),
        (["share", "--bits", "3"], "shared"),
    ):
        source, out = str(folder / "net.pth"), str(folder / f"{name}.safetensors")
        assert main([*words, source, *sample, *HOW, "-o", out]) == 0
    return folder


@pytest.fixture
def made(files_of_it, enter):
    """A copy of these files as the current directory."""
    return enter(files_of_it)


@pytest.mark.parametrize("files", [["net.pth", "int8.safetensors"], ["int8.safetensors", "net.pth"]])
@pytest.mark.parametrize("more", [DATA, [], ["--dry-run"], [*DATA, "--min-ratio", "0"]])
def test_it_is_refused_where_the_network_of_the_file_is_another(files, more, made, modelopt):
    found = modelopt("eval", *files, *more, *HOW)
    assert (found.code, found.out, found.err.count("\n")) == (2, "", 1)
    assert found.err.startswith(ERROR)
    assert "give --arch, such as FILE.py:CALLABLE" in found.err


def test_a_limit_on_sizes_needs_no_network(made, modelopt):
    found = modelopt("eval", "net.pth", "int8.safetensors", "--min-ratio", "0", *HOW)
    assert found.code == 0


def test_it_is_run_by_the_network_of_a_file_with_its_names_and_shapes(made, modelopt):
    files = ["net.pth", "shared.safetensors", "int8.safetensors"]
    found = modelopt("eval", *files, *DATA, "--latency-runs", "0", "--json")
    assert found.code == 0, found.err
    assert "net.pth: run by the network of shared.safetensors, whose weights have its names" in found.err
    named = modelopt("eval", *files, *DATA, "--arch", "net.py:make", "--latency-runs", "0", "--json")
    own, expected = json.loads(found.out)["models"], json.loads(named.out)["models"]
    for mine, theirs in zip(own, expected, strict=True):
        assert mine["metrics"] == theirs["metrics"]
        assert mine["fidelity"] == theirs["fidelity"]
    assert own[1]["fidelity"]["snr_db"]["output"] < 60


def test_other_shapes_are_no_weights_of_it(made, modelopt):
    state = torch.load("net.pth", weights_only=True)
    name, weight = next((n, w) for n, w in state.items() if w.dim() > 1)
    torch.save({**state, name: weight[:-1]}, "net.pth")
    found = modelopt("eval", "net.pth", "shared.safetensors", *DATA, *HOW)
    assert (found.code, "it cannot be run next to shared.safetensors" in found.err) == (2, True)


def test_it_is_said_whose_input_is_taken(made, modelopt):
    how = ["--arch", "net.py:make", *HOW]
    given = modelopt("eval", "net.pth", "shared.safetensors", *DATA, *how)
    assert "input: 1x8x8, resize 8x8 bilinear, mean 0, std 1 (recorded in shared.safetensors)" in given.out, (
        given.err
    )
    alone = modelopt("eval", "net.pth", *DATA, *how)
    assert "(of the data)" in alone.out, alone.err
