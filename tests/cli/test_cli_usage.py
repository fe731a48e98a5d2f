"""What is wrong with a command line is said in one line, with the nearest thing that would be right."""

import pytest

from modelopt_cli.methods.quantize.observers import OBSERVERS
from modelopt_cli.methods.quantize.schemes import SCHEMES

NEAR = [
    (["quantise", "a"], "unknown command 'quantise'; did you mean 'quantize'?"),
    (
        ["xyzzy"],
        "unknown command 'xyzzy'; "
        "commands are train, prune, quantize, share, distill, eval, run, inspect, env",
    ),
    (["eval", "a", "--forse"], "unknown option --forse; did you mean --force?"),
    (["--verion"], "unknown option --verion; did you mean --version?"),
    (["quantize", "a", "-z"], "unknown option -z"),
    (["quantize"], "missing argument 'CHECKPOINT'"),
    (["eval"], "missing argument 'CHECKPOINT...'"),
    (["quantize", "a", "b"], "got unexpected extra argument(s) (b)"),
    (["quantize", "a", "--output"], "option '--output' requires an argument"),
    (["quantize", "a", "--seed", "x"], "--seed: 'x' is not an integer"),
    (
        ["quantize", "a", "--seed", "-1"],
        "--seed: must be at least 0 and at most",
    ),
    (["quantize", "a", "--threads", "0"], "--threads: must be at least 1, not 0"),
    (["quantize", "a", "--min-coverage", "2"], "--min-coverage: must be at least 0 and at most 1, not 2"),
    (["quantize", "a", "--max-drop", "nan"], "--max-drop: 'nan' is not a number"),
    (
        ["quantize", "a", "--scheme", "int-8"],
        f"--scheme: 'int-8' is not one of {', '.join(SCHEMES)}; did you mean 'int8'?",
    ),
    (
        ["quantize", "a", "--observer", "entropi"],
        f"--observer: 'entropi' is not one of {', '.join(OBSERVERS)}; did you mean 'entropy'?",
    ),
    (
        ["eval", "a", "--interpolation", "bilinar"],
        "--interpolation: 'bilinar' is not one of nearest, bilinear, bicubic; did you mean 'bilinear'?",
    ),
    (["eval", "a", "--channels", "2"], "--channels: '2' is not one of 1, 3"),
    (["eval", "a", "--device", "gpu"], "--device: 'gpu' is not cpu, cuda or cuda:N"),
    (["eval", "a", "--std", "1,0,1"], "--std: every number must be above 0"),
    (["eval", "a", "--channels", "1", "--mean", "1,2,3"], "--mean: 3 numbers for 1 channels"),
    (
        ["quantize", "a", "--dry-run", "--export", "t.md"],
        "--export: has no meaning with --dry-run",
    ),
    (["prune", "a", "--no-eval", "--export", "t.md"], "--export: has no meaning with --dry-run"),
    (
        ["train", "a", "--train", "d", "--no-eval", "--export", "t.md"],
        "--export: has no meaning with --dry-run",
    ),
    (["eval", "a", "b", "--confident"], "--confident: needs --max-drop"),
    (["eval", "a", "b", "--confident", "--min-ratio", "2"], "--confident: needs --max-drop"),
    (
        ["eval", "a", "b", "--target-model", "c", "--max-drop", "1"],
        "--target-model: c is not one of the files to measure",
    ),
    (
        ["eval", "a", "b", "--target-model", "a", "--max-drop", "1"],
        "--target-model: a is the baseline itself",
    ),
    (["eval", "a", "b", "--target-model", "b"], "--target-model: has no meaning without a limit"),
    (["eval", "a", "--export", "t.xls"], "--export: t.xls ends in none of .json, .md, .csv"),
]


@pytest.mark.parametrize(("argv", "line"), NEAR, ids=[" ".join(argv) for argv, _ in NEAR])
def test_a_usage_error_is_one_line_and_2(argv, line, modelopt):
    outcome = modelopt(*argv)
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith(f"error: {line}")
    assert outcome.err.count("\n") == 1


def test_everything_wrong_is_reported_together(modelopt):
    outcome = modelopt("quantize", "a", "--scheme", "x", "--crop", "y", "--device", "z")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert all(option in outcome.err for option in ("--scheme: ", "--crop: ", "--device: "))


def test_no_command_shows_help_on_stderr(modelopt):
    outcome = modelopt()
    assert (outcome.code, outcome.out) == (2, "")
    assert "quantize" in outcome.err


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["quantize", "--help"], ["eval", "-h"], ["env", "-h"]])
def test_help_goes_to_stdout(argv, modelopt):
    outcome = modelopt(*argv)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("Usage: modelopt ")


def test_version(modelopt):
    import modelopt_cli

    outcome = modelopt("--version")
    assert (outcome.code, outcome.out, outcome.err) == (0, f"modelopt {modelopt_cli.__version__}\n", "")
