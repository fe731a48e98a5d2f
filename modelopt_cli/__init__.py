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
    GraphNeeded,
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

_API = "modelopt_cli.api"
_ELSEWHERE = {
    "InputSpec": "modelopt_cli.program",
    "Preprocess": "modelopt_cli.program",
    "Program": "modelopt_cli.program",
    "run": "modelopt_cli.cli.recipe.python_call",
}
"""Homes of the names below that are not in ``modelopt_cli.api``."""

__all__ = [
    "ArchitectureError",
    "ArtifactError",
    "BrokenResult",
    "CaptureError",
    "CheckpointError",
    "DataError",
    "EnvironmentFailure",
    "GateNotMet",
    "GraphNeeded",
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
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_ELSEWHERE.get(name, _API)), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
