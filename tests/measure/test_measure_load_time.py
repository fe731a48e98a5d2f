"""What opening a file costs: the child's arithmetic in a real process, and every way it can fail."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from modelopt_cli.measure import load_time_child
from modelopt_cli.measure.load_time import Job, Loading, _result, measure_loading
from modelopt_cli.program import InputSpec

JOB = Job("net.pth", None, InputSpec((8,)), 1, threads=1)

# Stands in for the package's API: "loads" a file by holding as many megabytes, and by putting the clock
# as far forward each time, as its name says.
API = """
import time
import torch
import sys
from modelopt_cli import checkpoint

ballast = bytearray(400 << 20)
del ballast  # a peak of the imports, gone before the model comes

class Hog(torch.nn.Module):
    def __init__(self, megabytes):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(megabytes << 18))
    def forward(self, x):
        print("user code may print")
        clock[0] += 50  # running it is not loading it
        return x

def load_network(path, arch, input_spec, device):
    megabytes, *seconds = path.split("/")
    clock[0] += float(seconds[min(len(loads), len(seconds) - 1)])
    loads.append(path)
    return Hog(int(megabytes))

loads, clock = [], [0.0]
time.perf_counter = lambda: clock[0]
checkpoint.load_network = load_network
from modelopt_cli.measure.load_time_child import main
code = main()
sys.stderr.write(str(len(loads)))
sys.exit(code)
"""


def child(megabytes: int, *seconds: float) -> tuple[Loading, int]:
    """What the child answers, and how often it has loaded."""
    job = Job("/".join(map(str, (megabytes, *seconds))), None, InputSpec((8,)), 1, threads=1)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(API)],
        input=job.to_json(),
        capture_output=True,
        text=True,
        check=False,
    )
    return _result(done), int(done.stderr)


@pytest.mark.slow
def test_the_child_reports_what_loading_adds_and_nothing_else() -> None:
    ballast = bytearray(300 << 20)  # of the parent's memory nothing may show
    found, loads = child(100, 0.35, 0.01, 0.02, 0.03, 0.04)
    assert len(ballast) == 300 << 20
    assert found.peak_bytes is not None
    assert 100 << 20 <= found.peak_bytes < 130 << 20
    assert loads == 5
    assert found.seconds == pytest.approx(0.03)  # the median: neither the first time nor the mean, 0.09


@pytest.mark.slow
def test_what_takes_seconds_is_loaded_once() -> None:
    found, loads = child(1, 1.0, 0.0)
    assert loads == 1
    assert found.seconds == pytest.approx(1.0)


@pytest.mark.parametrize("named", ["hf", "timm"])
def test_the_import_of_the_class_that_a_folder_names_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    says = {"hf": '{"architectures": ["BertModel"]}', "timm": '{"architecture": "resnet10t"}'}
    (tmp_path / "config.json").write_text(says[named])
    clock, imported = [0.0], set()

    def import_it(spec: str) -> None:
        if spec not in imported:
            clock[0] += 14.0
        imported.add(spec)

    def load(*_: object) -> torch.nn.Module:
        import_it(f"hf:{tmp_path}" if named == "hf" else "timm:resnet10t")
        clock[0] += 1.5
        return torch.nn.Identity()

    monkeypatch.setattr(load_time_child, "resolve", import_it)
    monkeypatch.setattr(load_time_child, "load_network", load)
    monkeypatch.setattr(load_time_child, "_start", lambda: 0)  # the peak of this process stays its own
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    assert load_time_child.measure_here(Job(str(tmp_path), None, InputSpec((8,))))["seconds"] == 1.5


@pytest.mark.slow
def test_a_checkpoint_without_a_network_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "bare.pth"
    torch.save({"some.weight": torch.ones(3)}, path)
    found = measure_loading(Job(str(path), None, None))
    assert found.seconds is not None
    assert found.seconds > 0
    assert found == Loading(found.seconds, None)


@pytest.mark.slow
def test_a_file_that_cannot_be_loaded_gives_a_reason(tmp_path: Path) -> None:
    found = measure_loading(Job(str(tmp_path / "none.pth"), None, InputSpec((8,)), 1))
    assert (found.seconds, found.peak_bytes) == (None, None)
    assert found.reason
    assert "\n" not in found.reason


def test_a_child_that_hangs_is_given_up() -> None:
    assert measure_loading(JOB, timeout_s=0.05) == Loading(None, None, "no answer within 0.05 s")


def failed(reason: str) -> Loading:
    return Loading(None, None, reason)


@pytest.mark.parametrize(
    ("code", "out", "err", "expected"),
    [
        pytest.param(
            0, 'hello\n{"seconds": 0.5, "peak_bytes": 5}\n', "", Loading(0.5, 5), id="answer-on-the-last-line"
        ),
        pytest.param(0, '{"seconds": 1, "peak_bytes": null}\n', "", Loading(1.0, None), id="tensors-alone"),
        pytest.param(1, "", "Traceback\nboom\n\n", failed("boom"), id="failed"),
        pytest.param(-9, "", "", failed("the child ended with -9"), id="killed"),
        pytest.param(0, "", "", failed("the child ended with 0"), id="said-nothing"),
        pytest.param(0, "[1]", "odd", failed("odd"), id="not-an-object"),
    ],
)
def test_answers(code: int, out: str, err: str, expected: Loading) -> None:
    assert _result(subprocess.CompletedProcess([], code, out, err)) == expected


def test_a_python_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    found = measure_loading(JOB)
    assert found.peak_bytes is None
    assert found.reason.startswith("cannot start a process")
