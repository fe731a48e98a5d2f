"""``python -m modelopt_cli.torchvision_start``: every program of this environment can ``import torchvision``.

``make setup`` runs it. No wheel on PyPI fits a CPU-only torch, so a ``.pth`` file puts the finder of
``_torchvision`` into place when Python starts. It does nothing where torchvision can be imported as it is.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

START_FILE = "modelopt_torchvision.pth"
_START = "import modelopt_cli._torchvision; modelopt_cli._torchvision.install()\n"


def imports_alone() -> bool:
    """True if ``import torchvision`` works in a program of this environment that does not import modelopt."""
    command = [sys.executable, "-c", "import torchvision"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def install(folder: Path | None = None) -> None:
    """Have every program that has ``folder`` among its site directories install the finder as it starts.

    Args:
        folder: by default that of this environment.
    """
    ((folder or _site()) / START_FILE).write_text(_START)


def is_installed() -> bool:
    """True if :func:`install` was done to this environment."""
    return (_site() / START_FILE).exists()


def _site() -> Path:
    return Path(sysconfig.get_path("purelib"))


if __name__ == "__main__" and not imports_alone():
    install()
