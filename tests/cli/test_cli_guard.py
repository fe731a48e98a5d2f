"""A method that makes something broken writes nothing: exit code 4, one line, no file."""

import operator
from dataclasses import replace
from itertools import cycle, product

import pytest
import torch
from quick_cases import quick

from modelopt_cli.api import training
from modelopt_cli.kernels import dispatch
from modelopt_cli.methods import method_table
from modelopt_cli.methods.context import MethodResult
from modelopt_cli.program.quantized_convolutions import QuantizedConv2d

HOW = ["--arch", "net.py:make", "--input-size", "8", "--channels", "1"]
CALIB = ["--calibration", "digits"]
TRAIN = ["--train", "digits?split=train", "--epochs", "1", "--lr", "0.01"]
END = ["-o", "out.safetensors", "--no-eval", "-q"]

COMMANDS = {
    "quantize": ["quantize", "net.pth", *HOW, *CALIB],
    "quantize int8-dynamic": ["quantize", "net.pth", *HOW, "--scheme", "int8-dynamic"],
    "quantize int8-weight": ["quantize", "net.pth", *HOW, "--scheme", "int8-weight"],
    "prune channels": ["prune", "net.pth", *HOW, "--sparsity", "0.333"],
    "prune weights": ["prune", "net.pth", *HOW, "--sparsity", "0.3", "--structure", "unstructured"],
    "prune and train": ["prune", "net.pth", *HOW, "--sparsity", "0.333", *TRAIN],
    "share": ["share", "net.pth", *HOW, "--bits", "4"],
    "distill": ["distill", "net.pth", *HOW, "--student", "net.py:make?width=3", *TRAIN],
    "train": ["train", "net.pth", *HOW, *TRAIN],
    "train from scratch": ["train", *HOW, *TRAIN],
}


def append(program, function, *args, **kwargs):
    """Pass what the Program returns through one more call."""
    (output,) = program.graph.find_nodes(op="output")
    with program.graph.inserting_before(output):
        call = program.graph.call_function(function, (output.args[0], *args), kwargs)
    output.args = (call,)
    program.recompile()
    return call.name


FAULTS = {
    "another shape": lambda p: append(p, torch.flatten, start_dim=0),
    "another structure": lambda p: append(p, torch.chunk, chunks=2, dim=1),
    "an exception": lambda p: append(p, torch.reshape, (3, 7, 11)),
    "not finite": lambda p: (
        append(p, operator.mul, 0.0),
        append(p, torch.log),
        append(p, operator.mul, 0.0),
    ),
}
SAYS = {
    "another shape": "returns float32 (80,) where the original returns float32 (8, 10)",
    "another structure": "returns ['float32 (8, 5)', 'float32 (8, 5)'] where",
    "an exception": "reshape: the result fails on samples of shape (1, 8, 8): ",
    "not finite": "layer log",
}
QUICK = [*zip(COMMANDS, cycle(FAULTS)), *product(["quantize"], FAULTS)]


def spoil(monkeypatch, fault):
    """Make every method break what it has made."""
    for name, row in method_table.METHODS.items():

        def broken(program, config, context, apply=row.apply):
            result = apply(program, config, context)
            fault(result.program)
            return MethodResult(result.program, result.skipped, result.target, result.notes)

        monkeypatch.setitem(method_table.METHODS, name, replace(row, apply=broken))

    def fit(network, *args, real=training.fit, **kwargs):
        found = real(network, *args, **kwargs)
        fault(network)
        return found

    monkeypatch.setattr(training, "fit", fit)


@pytest.mark.parametrize(("command", "fault"), quick(product(COMMANDS, FAULTS), QUICK))
def test_what_is_broken_is_not_written(command, fault, here, modelopt, monkeypatch):
    spoil(monkeypatch, FAULTS[fault])
    found = modelopt(*COMMANDS[command], *END)
    assert found.code == 4
    assert found.err.count("\n") == 1
    assert SAYS[fault] in found.err
    assert "this is a bug in modelopt" in found.err
    assert not (here / "out.safetensors").exists()


def test_a_kernel_that_is_wrong_is_found_before_its_file_is_written(here, modelopt, monkeypatch):
    def shorter(module, _):
        return lambda x: module.emulate(x)[..., :-1]

    kernels = dispatch.BACKENDS["onednn"]
    spoilt = replace(kernels, builders={**kernels.builders, QuantizedConv2d: shorter})
    monkeypatch.setitem(dispatch.BACKENDS, "onednn", spoilt)
    found = modelopt(*COMMANDS["quantize"], *END)
    assert (found.code, found.err.count("\n")) == (4, 1)
    assert "the result fails on samples of shape (1, 8, 8)" in found.err
    assert not (here / "out.safetensors").exists()


def test_a_recipe_stops_at_the_step_that_made_it(here, modelopt, monkeypatch):
    lines = ["checkpoint: net.pth", "output: out.safetensors", "arch: net.py:make", "input-size: 8"]
    lines += ["channels: 1", "data: digits", "latency-runs: 0", "steps:", "- prune: {sparsity: 0.333}"]
    (here / "recipe.yaml").write_text("\n".join([*lines, "- quantize: {calib: digits}"]))
    spoil(monkeypatch, FAULTS["an exception"])
    found = modelopt("run", "recipe.yaml", "-q")
    assert (found.code, found.err.count("\n")) == (4, 1)
    assert "this was step 1 of 2 (prune)" in found.err
    assert not [*here.rglob("*prune.safetensors")]
    assert not (here / "out.safetensors").exists()


def test_a_student_made_of_the_teacher_is_held_against_it(here, modelopt, monkeypatch):
    from modelopt_cli.api import students

    def broken(spec, network, context, real=students.derived):
        program = real(spec, network, context)
        FAULTS["an exception"](program)
        return program

    monkeypatch.setattr(students, "derived", broken)
    found = modelopt("distill", "net.pth", *HOW, "--student", "width:0.5", *TRAIN, *END)
    assert (found.code, found.err.count("\n")) == (4, 1)
    assert SAYS["an exception"] in found.err
    assert not (here / "out.safetensors").exists()
