"""``modelopt env``: the versions, the CPU and the kernels here, for a bug report or a CI log."""

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from modelopt_cli import __version__
from modelopt_cli.cli.console import Console

_PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "safetensors",
    "typer",
    "rich",
    "pydantic",
    "timm",
    "transformers",
)

_TORCHVISION = (
    "import torchvision fails in programs that have not imported modelopt_cli: its wheel is for CUDA, torch "
    "is not; mend this environment with python -m modelopt_cli.torchvision_start"
)


def env(console: Console) -> None:
    """Show versions, the CPU, and the int8 kernels that run here."""
    facts = environment()
    if console.json:
        console.result_json({"schema_version": 1, **facts})
        return
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    for section, entries in facts.items():
        for name, value in entries.items():
            table.add_row(section, name, _text(value))
    console.result(table)
    if not facts["torchvision"]["imports_alone"]:
        console.note(_TORCHVISION)


def environment() -> dict[str, dict[str, Any]]:
    """Versions, CPU, GPU and kernels, as JSON values."""
    import torch

    from modelopt_cli._torchvision import has_operators
    from modelopt_cli.kernels.dispatch import BACKENDS
    from modelopt_cli.measure.environment import cores, cpu_name
    from modelopt_cli.torchvision_start import is_installed

    return {
        "versions": {"modelopt": __version__, "python": platform.python_version(), **_versions()},
        "system": {"platform": platform.platform(), "machine": platform.machine()},
        "cpu": {
            "model": cpu_name(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "int8_dot_product": bool(_cpu_flags() & {"avx512_vnni", "avx_vnni", "asimddp", "i8mm"}),
            "threads": torch.get_num_threads(),
            "cores": cores(),
        },
        "cuda": {
            "available": torch.cuda.is_available(),
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "torchvision": {
            "operators": (operators := has_operators()),
            "imports_alone": operators or is_installed(),
        },
        "kernels": {name: row.present for name, row in BACKENDS.items()},
    }


def _versions() -> dict[str, str | None]:
    return {name: _version(name) for name in _PACKAGES}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:  # no Linux
        return set()
    return {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split()}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "not installed" if value is None else str(value)
