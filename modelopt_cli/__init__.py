"""Compress trained PyTorch models: one file in, one file out, one honest table.

    import modelopt_cli
    program = modelopt_cli.load("resnet18-int8.safetensors")
    logits = program(images)

Importing this package imports no torch; the names below load on first use. From then on
``import torchvision`` works beside a CPU-only torch, too.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from modelopt_cli import _torchvision

if TYPE_CHECKING:
    from modelopt_cli.api import (
        distill,
        evaluate,
        load,
        load_network,
        load_state_dict,
        prune,
        quantize,
        share,
        train,
    )
    from modelopt_cli.program import Program

__version__ = "0.1.0"
__all__ = [
    "Program",
    "__version__",
    "distill",
    "evaluate",
    "load",
    "load_network",
    "load_state_dict",
    "prune",
    "quantize",
    "share",
    "train",
]

_LAZY = {
    "Program": "modelopt_cli.program",
    "distill": "modelopt_cli.api",
    "evaluate": "modelopt_cli.api",
    "load": "modelopt_cli.api",
    "load_network": "modelopt_cli.api",
    "load_state_dict": "modelopt_cli.api",
    "prune": "modelopt_cli.api",
    "quantize": "modelopt_cli.api",
    "share": "modelopt_cli.api",
    "train": "modelopt_cli.api",
}

_torchvision.install()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
