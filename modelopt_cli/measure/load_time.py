"""Costs of opening a file, measured in a process of its own: seconds, and peak memory.

The seconds go from the path to a network that is ready to run: reading, checking the digest, decoding,
building it and preparing its kernels, but not importing torch or the library that has the network. Memory is
the highest resident size after the libraries are imported, minus the resident size at that moment: what the
model costs, not what torch costs. It includes one forward pass. :mod:`modelopt_cli.measure.load_time_child`
is the other side.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

from modelopt_cli.program.input_spec import InputSpec
from modelopt_cli.program.metadata import input_from_data, input_to_data

_TIMEOUT_S = 600


@dataclass(frozen=True)
class Job:
    """Work of the child process.

    Attributes:
        path: file to load.
        arch: architecture, where the file needs to be told one.
        input: what one sample is; None where there is no network to run, and all tensors are read instead.
        batch_size: samples in the forward pass.
        threads: torch threads, or None.
        device: where the network is to run.
    """

    path: str
    arch: str | None
    input: InputSpec | None
    batch_size: int = 1
    threads: int | None = None
    device: str = "cpu"

    def to_json(self) -> str:
        """The job as the child reads it."""
        sample = None if self.input is None else input_to_data(self.input)
        return json.dumps({**vars(self), "input": sample})

    @classmethod
    def from_json(cls, text: str) -> "Job":
        """The job that ``to_json`` wrote."""
        fields = json.loads(text)
        sample = None if fields["input"] is None else input_from_data(fields["input"])
        return cls(**{**fields, "input": sample})


@dataclass(frozen=True)
class Loading:
    """Costs of opening a file.

    Attributes:
        seconds: the median of a few times, or the one time if that took long; None where it failed.
        peak_bytes: resident memory; None where there was no network to run.
        reason: why it failed, or an empty string.
    """

    seconds: float | None
    peak_bytes: int | None
    reason: str = ""


def measure_loading(job: Job, timeout_s: float = _TIMEOUT_S) -> Loading:
    """Start the child and wait for its result; a failure is a reason, never an exception."""
    command = [sys.executable, "-P", "-m", "modelopt_cli.measure.load_time_child"]
    try:
        done = subprocess.run(
            command,
            input=job.to_json(),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env=_environment(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Loading(None, None, f"no answer within {timeout_s:g} s")
    except (OSError, ValueError) as error:
        return Loading(None, None, f"cannot start a process: {error}")
    return _result(done)


def peak_memory_cuda(run: Callable[[], object], device: str) -> int:
    """Highest memory that torch's allocator handed out on ``device`` while ``run()`` ran, in bytes.

    Counts the model's weights too, if they are on the device already.
    """
    import torch

    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def _environment() -> dict[str, str]:
    """The child sees the modules that this process sees, so user code named by ``--arch`` loads alike."""
    paths = [os.path.abspath(entry) if entry else os.getcwd() for entry in sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def _result(done: "subprocess.CompletedProcess[str]") -> Loading:
    lines = done.stdout.splitlines()
    try:
        result = json.loads(lines[-1]) if done.returncode == 0 else {}
        peak = result["peak_bytes"]
        return Loading(float(result["seconds"]), None if peak is None else int(peak))
    except (ValueError, LookupError, TypeError):
        errors = [line for line in done.stderr.splitlines() if line.strip()]
        return Loading(
            None, None, errors[-1].strip() if errors else f"the child ended with {done.returncode}"
        )
