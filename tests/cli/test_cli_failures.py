"""Every way a run can end: the exit code, and one line on stderr."""

import errno

import pytest

from modelopt_cli import errors
from modelopt_cli.cli import main as wiring
from modelopt_cli.cli.failures import Terminated, explain


class FakeOutOfMemoryError(RuntimeError):
    """Has the name of torch's."""


FakeOutOfMemoryError.__name__ = "OutOfMemoryError"

CASES = [
    (errors.GateNotMet("drop is 3", where="gate not met"), 1, "gate not met: drop is 3"),
    (errors.NothingCompressed("no layer matches"), 1, "no layer matches"),
    (errors.InputError("bad"), 2, "bad"),
    (errors.UsageError("bad", where="--crop", hint="say 224"), 2, "--crop: bad; say 224"),
    (errors.GraphNeeded("needs a graph"), 2, "needs a graph"),
    (errors.CheckpointError("truncated", where="a.pth"), 2, "a.pth: truncated"),
    (errors.ArtifactError("damaged"), 2, "damaged"),
    (errors.ArchitectureError("unknown"), 2, "unknown"),
    (errors.CaptureError("cannot trace"), 2, "cannot trace"),
    (errors.DataError("empty"), 2, "empty"),
    (errors.OutputError("is a directory"), 2, "is a directory"),
    (errors.EnvironmentFailure("no CUDA device"), 3, "no CUDA device"),
    (MemoryError(), 3, "out of memory; use smaller batches"),
    (FakeOutOfMemoryError("CUDA out of memory"), 3, "out of memory; use smaller batches"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 3, "out of memory"),
    (OSError(errno.ENOSPC, "No space left on device", "out.bin"), 3, "out.bin: no space left on device"),
    (PermissionError(errno.EACCES, "Permission denied", "a"), 3, "a: permission denied"),
    (OSError(errno.EROFS, "Read-only file system"), 3, "read-only file system"),
    (
        RuntimeError("could not create a primitive"),
        3,
        "out of memory; use smaller batches",
    ),
    (RuntimeError("could not create a primitive descriptor for a sum"), 4, "RuntimeError: could not create"),
    (errors.ModeloptError("impossible"), 4, "impossible"),
    (
        errors.BrokenResult("gives NaN", where="layer conv1"),
        4,
        "layer conv1: gives NaN; nothing was written; this is a bug in modelopt",
    ),
    (
        ZeroDivisionError("division by zero"),
        4,
        "ZeroDivisionError: division by zero; this is a bug in modelopt",
    ),
    (FileNotFoundError(errno.ENOENT, "No such file", "x"), 4, "FileNotFoundError: "),
    (AssertionError(), 4, "AssertionError; this is a bug in modelopt, --debug shows the traceback"),
    (RuntimeError("first\nsecond"), 4, "RuntimeError: first; "),
    (SystemExit(0), 2, "the code that --arch or --data names ended the program"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (Terminated(), 143, "terminated"),
]


@pytest.mark.parametrize(
    ("error", "code", "line"), CASES, ids=[f"{type(c[0]).__name__}-{c[1]}" for c in CASES]
)
def test_every_error_has_its_exit_code_and_one_line(error, code, line, modelopt, monkeypatch):
    def fail(console):
        raise error

    monkeypatch.setitem(wiring.COMMANDS, "fail", fail)
    for flags in ([], ["--json"], ["-q"]):
        outcome = modelopt("fail", *flags)
        assert outcome.code == code
        assert bool(outcome.out) == (flags == ["--json"])
        assert outcome.err.startswith(f"error: {line}")
        assert outcome.err.count("\n") == 1


def test_a_closed_pipe_is_141_and_silent():
    failure = explain(BrokenPipeError())
    assert (failure.exit_code, failure.line) == (141, None)


def test_every_class_of_the_tree_is_tried():
    tried = {type(error) for error, _, _ in CASES}
    tree = {kind for kind in vars(errors).values() if isinstance(kind, type)}
    assert tree <= tried


def test_debug_shows_the_traceback_before_the_line(modelopt, monkeypatch):
    def fail(console):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setitem(wiring.COMMANDS, "fail", fail)
    outcome = modelopt("fail", "--debug")
    assert outcome.code == 4
    assert "Traceback (most recent call last)" in outcome.err
    assert "in fail" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("error: ZeroDivisionError")


def test_an_error_stays_on_one_line_and_moves_no_cursor(modelopt, monkeypatch):
    def fail(console):
        raise errors.CheckpointError("bad\nlayer\x1b[2J [/foo] \udce9", where="a\r.pth")

    monkeypatch.setitem(wiring.COMMANDS, "fail", fail)
    assert modelopt("fail").err == "error: a\\r.pth: bad\\nlayer\\x1b[2J [/foo] \\udce9\n"
