import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from modelopt_cli.cli.main import main
from modelopt_cli.measure.load_time import Loading


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def quick_loading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are not opened in processes of their own to see what that costs, but where ``real_loading`` is.

    That takes longer than everything else in most tests.
    """
    if "real_loading" not in request.fixturenames:
        monkeypatch.setattr("modelopt_cli.measure.load_time.measure_loading", lambda job: Loading(None, None))


@pytest.fixture
def real_loading() -> None:
    """What opening the files costs is measured."""


@pytest.fixture
def modelopt(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs a command line in this process."""

    def call(*argv: object) -> Outcome:
        capsys.readouterr()
        code = main([str(arg) for arg in argv])
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture
def enter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """Makes a copy of a folder the current directory and returns it; no bytecode is added to it."""

    def call(source: Path) -> Path:
        folder = tmp_path / "here"
        shutil.copytree(source, folder)
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        return folder

    return call


@pytest.fixture
def here(good_files: Path, enter: Callable[[Path], Path]) -> Path:
    """A copy of the good files as the current directory."""
    return enter(good_files)


ROOT = Path(__file__).parents[2]


@pytest.fixture
def environ() -> dict[str, str]:
    """An environment for a process of its own, in which this checkout is importable."""
    left_out = ("NO_COLOR", "FORCE_COLOR", "PYTHONUNBUFFERED")
    kept = {key: value for key, value in os.environ.items() if key not in left_out}
    return {**kept, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def process(environ: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[bytes]"]]:
    """Starts the command in a process of its own, with a command ``NAME`` made from ``body``."""

    children: list[subprocess.Popen[bytes]] = []

    def start(*argv: str, body: str = "", **options: object) -> "subprocess.Popen[bytes]":
        script = "\n".join(
            [
                "import sys, time",
                "from modelopt_cli.cli import main",
                "def probe(console):",
                *(f"    {line}" for line in body.splitlines() or ["pass"]),
                "main.COMMANDS['probe'] = probe",
                "main.run()",
            ]
        )
        child = subprocess.Popen(
            [sys.executable, "-c", script, *argv],
            cwd=tmp_path,
            env=environ,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},  # type: ignore[call-overload]
        )

        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate() if child.stdout and not child.stdout.closed else child.wait()
        if child.stderr:
            child.stderr.close()


@pytest.fixture
def interrupted(environ: dict[str, str]) -> "Callable[..., subprocess.CompletedProcess[bytes]]":
    """Starts a command that trains, in a process of its own, and sends it a signal once it has saved a state.

    Its output is ``out.safetensors`` in the current directory.
    """

    def run(number: signal.Signals, delay: float, *argv: str) -> "subprocess.CompletedProcess[bytes]":
        command = [sys.executable, "-m", "modelopt_cli", *argv]
        child = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            deadline = time.monotonic() + 120
            while not Path("out.run", "state.safetensors").exists():
                assert child.poll() is None, child.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.005)
            time.sleep(delay)
            child.send_signal(number)
            out, err = child.communicate(timeout=60)
        finally:
            child.kill()
        return subprocess.CompletedProcess(command, child.returncode, out, err)

    return run


NET = """
from torch import nn

def make(num_classes=10, width=4):
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 4 * 4, num_classes),
    )
"""


@pytest.fixture(scope="session")
def good_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network for 1x8x8 images: its source, checkpoints of it, and an artifact."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "net.py").write_text(NET)
    scope: dict[str, Any] = {}
    exec(compile(NET, "net.py", "exec"), scope)  # noqa: S102 -- our own text, a few lines above
    torch.manual_seed(0)
    state = scope["make"]().state_dict()
    torch.save(state, folder / "net.pth")
    torch.save(scope["make"](num_classes=7).state_dict(), folder / "seven.pth")
    save_file(state, folder / "net.safetensors")
    artifact = folder / "net-int8-weight.safetensors"
    source = [str(folder / "net.pth"), "-o", str(artifact)]
    assert main(["quantize", *source, "--scheme", "int8-weight", "--no-eval", "-q"]) == 0
    return folder
