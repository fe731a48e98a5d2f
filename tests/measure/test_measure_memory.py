"""Peak memory: the child's arithmetic in a real process, and every way it can fail."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from modelopt_cli.measure.memory import Job, Memory, _answer, peak_memory

JOB = Job("net.pth", None, (8,), 1, threads=1)

# Stands in for the package's API: "loads" a file by holding as many megabytes as its name says.
API = """
import torch
import modelopt_cli
import types, sys

ballast = bytearray(400 << 20)
del ballast  # a peak of the imports, gone before the model comes

class Hog(torch.nn.Module):
    def __init__(self, megabytes):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(megabytes << 18))
    def forward(self, x):
        print("user code may print")
        return x

api = types.ModuleType("modelopt_cli.api")
api.load_network = lambda path, arch, input: Hog(int(path))
sys.modules["modelopt_cli.api"] = modelopt_cli.api = api
from modelopt_cli.measure.memory_child import main
sys.exit(main())
"""


def child(megabytes: int) -> Memory:
    job = f'{{"path": "{megabytes}", "arch": null, "shape": [8], "batch_size": 1, "threads": 1}}'
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(API)], input=job, capture_output=True, text=True, check=False
    )
    return _answer(done)


def test_the_child_reports_what_loading_adds_and_nothing_else() -> None:
    ballast = bytearray(300 << 20)  # of the parent's memory nothing may show
    peak = child(100).peak_bytes
    assert len(ballast) == 300 << 20
    assert peak is not None
    assert 100 << 20 <= peak < 130 << 20


def test_a_file_that_cannot_be_loaded_gives_a_reason(tmp_path: Path) -> None:
    found = peak_memory(Job(str(tmp_path / "none.pth"), None, (8,), 1))
    assert found.peak_bytes is None
    assert found.reason
    assert "\n" not in found.reason


def test_a_child_that_hangs_is_given_up() -> None:
    assert peak_memory(JOB, timeout_s=0.05) == Memory(None, "no answer within 0.05 s")


@pytest.mark.parametrize(
    ("code", "out", "err", "expected"),
    [
        pytest.param(0, 'hello\n{"peak_bytes": 5}\n', "", Memory(5), id="answer-on-the-last-line"),
        pytest.param(1, "", "Traceback\nboom\n\n", Memory(None, "boom"), id="failed"),
        pytest.param(-9, "", "", Memory(None, "the child ended with -9"), id="killed"),
        pytest.param(0, "", "", Memory(None, "the child ended with 0"), id="said-nothing"),
        pytest.param(0, "[1]", "odd", Memory(None, "odd"), id="not-an-object"),
    ],
)
def test_answers(code: int, out: str, err: str, expected: Memory) -> None:
    assert _answer(subprocess.CompletedProcess([], code, out, err)) == expected


def test_a_python_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    found = peak_memory(JOB)
    assert found.peak_bytes is None
    assert found.reason.startswith("cannot start a process")
