"""Errors under ``--json``: one object on stdout, in place of the result, and the line on stderr as ever."""

import json

import pytest
import torch

from modelopt_cli.cli import main as command_line
from modelopt_cli.cli.failures import Terminated
from modelopt_cli.cli.groups import signature_of
from modelopt_cli.errors import EnvironmentFailure, UsageError

KEYS = {"exit", "what", "where", "hint", "notes"}


def error_of(outcome):
    """The one object on stdout, whose error must agree with the line on stderr."""
    found = json.loads(outcome.out)
    assert found.keys() == {"schema_version", "error"}
    error = found["error"]
    assert error.keys() == KEYS
    assert error["exit"] == outcome.code
    told = f"{error['where']}: {error['what']}" if error["where"] else error["what"]
    assert outcome.err == f"error: {'; '.join(filter(None, (told, error['hint'], *error['notes'])))}\n"
    return error


@pytest.mark.parametrize(
    ("argv", "code", "expected"),
    [
        (["quantize", "none.pth", "--json"], 2, {"where": "none.pth", "what": "no such file"}),
        (["quantize", "--json"], 2, {"where": None}),
        (["eval", "a", "--json", "--chanels", "1"], 2, {"hint": "did you mean --channels?"}),
        (["quantise", "--json"], 2, {"what": "unknown command 'quantise'"}),
        (["prune", "a", "--sparsity", "x", "--json"], 2, {"hint": None}),
        (["run", "none.yaml", "--json"], 2, {"where": "none.yaml"}),
        (["inspect", "none.pth", "--json"], 2, {"where": "none.pth"}),
        (["quantize", "n\udcff.pth", "--json"], 2, {"where": "n\\udcff.pth"}),
    ],
)  # fmt: skip
def test_what_cannot_be_used(argv, code, expected, modelopt):
    outcome = modelopt(*argv)
    assert outcome.code == code
    error = json.loads(outcome.out)["error"] if "\udcff" in argv[1] else error_of(outcome)
    assert expected.items() <= error.items()


@pytest.mark.parametrize(
    ("raised", "code", "what"),
    [
        (UsageError("odd", where="--x", hint="use y"), 2, "odd"),
        (EnvironmentFailure("no space"), 3, "no space"),
        (MemoryError(), 3, "out of memory"),
        (ZeroDivisionError("by zero"), 4, "ZeroDivisionError: by zero"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Terminated(), 143, "terminated"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_way_to_end(raised, code, what, modelopt, monkeypatch):
    raised.add_note("go on with --resume")

    def probe(console):
        raise raised

    monkeypatch.setitem(command_line.COMMANDS, "probe", probe)
    outcome = modelopt("probe", "--json")
    error = error_of(outcome)
    assert (error["exit"], error["what"], error["notes"]) == (code, what, ["go on with --resume"])
    assert modelopt("probe").out == ""


def test_a_closed_pipe_is_told_nothing(modelopt, monkeypatch):
    def probe(console):
        raise BrokenPipeError

    monkeypatch.setitem(command_line.COMMANDS, "probe", probe)
    outcome = modelopt("probe", "--json")
    assert (outcome.code, outcome.out) == (141, "")


def test_a_missed_gate_is_part_of_the_one_result(here, modelopt):
    how = [
        "--arch",
        "net.py:make",
        "--input-shape",
        "1x8x8",
        "--data",
        "digits",
        "--limit",
        "32",
        "--latency-runs",
        "0",
    ]
    outcome = modelopt("quantize", "net.pth", *how, "--min-ratio", "100", "--json")
    assert outcome.code == 1
    found = json.loads(outcome.out)  # raises if there were two
    assert "error" not in found
    assert [gate["passed"] for gate in found["evaluation"]["gates"]] == [False]


def test_nothing_to_compress_has_no_result_but_the_error(modelopt, tmp_path):
    torch.save({"a.bias": torch.ones(4)}, tmp_path / "a.pth")
    outcome = modelopt("quantize", tmp_path / "a.pth", "--scheme", "int8-weight", "--json", "-q")
    assert outcome.code == 1
    assert error_of(outcome)["exit"] == 1


@pytest.mark.parametrize("command", [*command_line.COMMANDS])
def test_help_of_a_command(command, modelopt):
    asked, usual = modelopt("help", command), modelopt(command, "--help")
    assert asked.code == usual.code == 0
    assert asked.out == usual.out != ""


def test_help_alone_and_of_what_is_no_command(modelopt):
    assert modelopt("help").out == modelopt("--help").out != ""
    outcome = modelopt("help", "quantise")
    assert (outcome.code, outcome.out) == (2, "")
    assert "did you mean 'quantize'?" in outcome.err


def test_every_fraction_may_be_a_percentage(modelopt):
    fractions = {}
    for name, command in command_line.build().commands.items():
        for field in signature_of(command).fields.values():
            if field.metavar == "F":
                fractions[name, field.flag] = field.read("30%")
                assert field.read("0.3") == 0.3
    assert set(fractions.values()) == {0.3}
    assert {("prune", "--sparsity"), ("prune", "--flops"), ("share", "--bytes")} <= fractions.keys()
    assert ("train", "--val-fraction") in fractions
    assert {("quantize", "--min-coverage"), ("distill", "--label-smoothing")} <= fractions.keys()
    for text in ("x", "30%%", "nan", "inf%", ""):
        outcome = modelopt("prune", "a", "--sparsity", text)
        assert outcome.code == 2
        assert f"'{text}' is neither a fraction such as 0.3 nor a percentage such as 30%" in outcome.err


def test_a_percentage_prunes_as_the_fraction_does(here, modelopt):
    how = [
        "--arch",
        "net.py:make?width=16",
        "--input-shape",
        "1x8x8",
        "--no-eval",
        "--structure",
        "unstructured",
    ]
    scope = {}
    exec(compile((here / "net.py").read_text(), "net.py", "exec"), scope)  # noqa: S102 -- the test's own
    torch.save(scope["make"](width=16).state_dict(), "wide.pth")
    for text in ("30%", "0.3"):
        outcome = modelopt("prune", "wide.pth", *how, "--sparsity", text, "-o", f"{text}.safetensors")
        assert outcome.code == 0, outcome.err
    assert (here / "30%.safetensors").read_bytes() == (here / "0.3.safetensors").read_bytes()
