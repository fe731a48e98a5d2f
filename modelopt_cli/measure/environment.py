"""On what the figures were taken: a latency means nothing without it."""

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Environment:
    """The machine and the versions.

    Attributes:
        processor: name of the CPU or of the GPU.
        torch: version of torch.
        threads: torch threads within one operator.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
    """

    processor: str
    torch: str
    threads: int
    device: str


def environment(threads: int, device: str = "cpu") -> Environment:
    """What the figures of this run are taken on."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_name()
    return Environment(name, str(torch.__version__), threads, device)


def cpu_name(cpuinfo: Path = _CPUINFO) -> str:
    """The CPU's name as the kernel gives it, else its architecture."""
    try:
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return " ".join(value.split())
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown processor"
