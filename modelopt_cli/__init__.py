"""Compress trained PyTorch models: one file in, one file out, one honest table.

    import modelopt_cli as mo

    result = mo.quantize("resnet18.pth", "resnet18-int8.safetensors", data="val/")
    program = mo.load("resnet18-int8.safetensors")
    logits = program(images)

Importing this package imports no torch; the names below load on first use. From then on
``import torchvision`` works next to a CPU-only torch, too. ``docs/python.md`` is the guide.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from modelopt_cli import _torchvision
from modelopt_cli.errors import (
    ArchitectureError,
    ArtifactError,
    BrokenResult,
    CaptureError,
    CheckpointError,
    DataError,
    EnvironmentFailure,
    GateNotMet,
    InputError,
    ModeloptError,
    NothingCompressed,
    OutputError,
    UsageError,
)

if TYPE_CHECKING:
    from modelopt_cli.api import (
        Layer,
        Measured,
        Result,
        distill,
        evaluate,
        layers,
        load,
        load_network,
        load_state_dict,
        prune,
        quantize,
        save,
        share,
        train,
    )
    from modelopt_cli.program import InputSpec, Preprocess, Program

__version__ = "0.1.0"

_HOMES = {
    "modelopt_cli.api": (
        "Layer",
        "Measured",
        "Result",
        "distill",
        "evaluate",
        "layers",
        "load",
        "load_network",
        "load_state_dict",
        "prune",
        "quantize",
        "save",
        "share",
        "train",
    ),
    "modelopt_cli.cli.recipe.python_call": ("run",),
    "modelopt_cli.program": ("InputSpec", "Preprocess", "Program"),
}
_LAZY = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ArchitectureError",
    "ArtifactError",
    "BrokenResult",
    "CaptureError",
    "CheckpointError",
    "DataError",
    "EnvironmentFailure",
    "GateNotMet",
    "InputError",
    "InputSpec",
    "Layer",
    "Measured",
    "ModeloptError",
    "NothingCompressed",
    "OutputError",
    "Preprocess",
    "Program",
    "Result",
    "UsageError",
    "__version__",
    "distill",
    "evaluate",
    "layers",
    "load",
    "load_network",
    "load_state_dict",
    "prune",
    "quantize",
    "run",
    "save",
    "share",
    "train",
]

_torchvision.install()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
