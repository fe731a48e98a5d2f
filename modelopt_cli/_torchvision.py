"""Makes ``import torchvision`` work where its C++ extension cannot be loaded.

PyPI's torchvision wheel is built for CUDA. Beside a CPU-only torch its ``_C.so`` does not load, so the
operators it would define do not exist, and ``torchvision._meta_registrations`` fails on the first two
of them: "operator torchvision::nms does not exist". The models and transforms need none of those
operators; their two schemas are enough for the import to pass (torch 2.13.0, torchvision 0.28.0).

The finder below waits for that one submodule. By then torchvision has tried its own extension, so the
schemas are defined only if that failed, and nothing here imports torch before torchvision does.

``python -m modelopt_cli.mend``, which ``make setup`` runs, makes it work in every program of the
environment: no wheel on PyPI fits a CPU-only torch, so a ``.pth`` file puts the finder into place when Python
starts. It does nothing where torchvision can be imported as it is.
"""

import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

START_FILE = "modelopt_torchvision.pth"
_START = "import modelopt_cli._torchvision; modelopt_cli._torchvision.install()\n"
_TRIGGER = "torchvision._meta_registrations"
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_libraries: list[Any] = []  # a schema lives as long as the Library that defined it


class TorchvisionFinder(MetaPathFinder):
    """Finds nothing itself; defines the missing schemas just before they are needed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns None always, so that the ordinary finders load the module."""
        if fullname == _TRIGGER and not _extension_loaded():
            _define_schemas()
        return None


def install() -> None:
    """Put the finder in front of the others, once."""
    if not any(isinstance(finder, TorchvisionFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, TorchvisionFinder())


def imports_alone() -> bool:
    """True if ``import torchvision`` works in a program of this environment that does not import modelopt."""
    command = [sys.executable, "-c", "import torchvision"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def mend(folder: Path | None = None) -> None:
    """Have every program that has ``folder`` among its site directories install the finder as it starts.

    Args:
        folder: by default that of this environment.
    """
    ((folder or _site()) / START_FILE).write_text(_START)


def is_mended() -> bool:
    """True if :func:`mend` was done to this environment."""
    return (_site() / START_FILE).exists()


def _site() -> Path:
    return Path(sysconfig.get_path("purelib"))


def has_operators() -> bool:
    """True if torchvision's own C++ operators are available; imports torchvision."""
    import torchvision.extension

    return bool(torchvision.extension._has_ops())


def _extension_loaded() -> bool:
    extension = sys.modules.get("torchvision.extension")
    return extension is None or bool(extension._has_ops())


def _define_schemas() -> None:
    import torch

    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(schema)
            _libraries.append(library)
