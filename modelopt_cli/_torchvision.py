"""Makes ``import torchvision`` work where its C++ extension cannot be loaded.

PyPI's torchvision wheel is built for CUDA. Next to a CPU-only torch its ``_C.so`` does not load, so the
operators it would define do not exist, and ``torchvision._meta_registrations`` fails on the first two
of them: "operator torchvision::nms does not exist". The models and transforms need none of those
operators; their two schemas are enough for the import to pass (torch 2.13.0, torchvision 0.28.0).

The finder below waits for that one submodule. By then torchvision has tried its own extension, so the
schemas are defined only if that failed, and nothing here imports torch before torchvision does.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

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
