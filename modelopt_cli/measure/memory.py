"""Peak memory of loading a file and running it once, measured in a process of its own.

The figure is the highest resident size after the libraries are imported, minus the resident size at
that moment: what the model costs, not what torch costs. It includes reading the file, building the
network and one forward pass. :mod:`modelopt_cli.measure.memory_child` is the other side.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

_TIMEOUT_S = 600


@dataclass(frozen=True)
class Job:
    """What the child is to do.

    Attributes:
        path: file to load.
        arch: architecture, where the file needs to be told one.
        shape: of one sample.
        batch_size: samples in the forward pass.
        threads: torch threads, or None.
    """

    path: str
    arch: str | None
    shape: tuple[int, ...]
    batch_size: int
    threads: int | None = None


@dataclass(frozen=True)
class Memory:
    """Peak memory.

    Attributes:
        peak_bytes: None where it could not be measured.
        reason: why not, or an empty string.
    """

    peak_bytes: int | None
    reason: str = ""


def peak_memory(job: Job, timeout_s: float = _TIMEOUT_S) -> Memory:
    """Start the child and wait for its answer; a failure is a reason, never an exception."""
    command = [sys.executable, "-P", "-m", "modelopt_cli.measure.memory_child"]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(asdict(job)),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env=_environment(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Memory(None, f"no answer within {timeout_s:g} s")
    except (OSError, ValueError) as error:
        return Memory(None, f"cannot start a process: {error}")
    return _answer(done)


def peak_memory_cuda(run: Any, device: str) -> Memory:
    """Highest memory that torch's allocator handed out on ``device`` while ``run()`` ran.

    Counts the model's weights too, if they are on the device already.
    """
    import torch

    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return Memory(torch.cuda.max_memory_allocated(device))


def _environment() -> dict[str, str]:
    """The child sees the modules that this process sees, so user code named by ``--arch`` loads alike."""
    paths = [os.path.abspath(entry) if entry else os.getcwd() for entry in sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def _answer(done: "subprocess.CompletedProcess[str]") -> Memory:
    lines = done.stdout.splitlines()
    try:
        answer = json.loads(lines[-1]) if done.returncode == 0 else {}
        return Memory(int(answer["peak_bytes"]))
    except (ValueError, LookupError, TypeError):
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return Memory(None, said[-1].strip() if said else f"the child ended with {done.returncode}")
