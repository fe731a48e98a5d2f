"""Networks of other people and their data, as ``make assets`` fetches them.

A module for each network has its architecture, for ``--arch``, and its data, for ``--data``. What the package
of a network defines is imported from ``assets/python`` without the rest of that package.
"""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch.utils.data import Dataset

ASSETS = Path(__file__).parents[2] / "assets"


def source(name: str, **stubs: dict[str, Any]) -> ModuleType:
    """A module of ``assets/python``, on its own: its package's ``__init__`` does not run.

    Args:
        name: with its package, ``demosaicnet.modules``.
        stubs: modules that it imports for what a network does not need, with the names it takes from them.
    """
    package, _, _ = name.partition(".")
    for stub, names in {package: {}, **stubs}.items():
        if stub not in sys.modules:
            module = ModuleType(stub)
            module.__path__ = [str(ASSETS / "python" / stub)]
            module.__dict__.update(names)
            sys.modules[stub] = module
    return importlib.import_module(name)


class Samples(Dataset):
    """Samples ``(inputs, target)`` that are all in memory."""

    def __init__(self, inputs: Sequence[Any], targets: Sequence[Any]) -> None:
        self._samples = list(zip(inputs, targets, strict=True))

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self._samples[index]
