"""Machine and versions that figures were measured on: a latency means nothing without them."""

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_CPUINFO = Path("/proc/cpuinfo")
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


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
    """Machine and versions of this run."""
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


def cores(groups: Path = _CGROUPS, own: Path = _OWN_GROUPS) -> float:
    """Cores that this process may use: its CPU affinity, or the quota of its control groups if that is less.

    Args:
        groups: where control groups are mounted, of version 1 or 2.
        own: list of the groups of this process.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([float(affinity), *_quotas(groups, own)])


def _quotas(groups: Path, own: Path) -> Iterator[float]:
    """Cores that each control group above this process grants, where it grants less than all."""
    for line in _text(own).splitlines():
        _, controllers, path = (line + "::").split(":")[:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        # A container sees its own group as the root, whatever the path says.
        for folder in (Path(path.lstrip("/")), *Path(path.lstrip("/")).parents):
            group = groups / "cpu" / folder if controllers else groups / folder
            limit = _text(group / "cpu.max") or (
                f"{_text(group / 'cpu.cfs_quota_us')} {_text(group / 'cpu.cfs_period_us')}"
            )
            quota, _, period = limit.partition(" ")
            if quota.strip().isdigit() and period.strip().isdigit():
                yield int(quota) / int(period)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
