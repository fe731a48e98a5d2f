"""Choosing a kernel for every quantized layer: by device, by what the backend can do, by exactness."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, fx, nn

from modelopt_cli.errors import EnvironmentFailure
from modelopt_cli.kernels import cuda, onednn, reference, sparse24
from modelopt_cli.kernels.bounds import never_saturates
from modelopt_cli.program import Program
from modelopt_cli.program.quantized import (
    DynamicLinear,
    Quantized,
    QuantizedAdd,
    QuantizedAvgPool2d,
    QuantizedConv2d,
    QuantizedLinear,
    QuantizedMaxPool2d,
)

Backend = Literal["onednn", "cuda", "reference"]
Kernel = Callable[..., Tensor]


def require_device(device: str | torch.device) -> None:
    """Make sure that a device is there.

    Raises:
        EnvironmentFailure: it is not.
    """
    target = torch.device(device)
    if target.type != "cuda":
        return
    if not torch.cuda.is_available():
        raise EnvironmentFailure("no CUDA device is available", where=f"--device {device}", hint="use cpu")
    if (target.index or 0) >= (count := torch.cuda.device_count()):
        raise EnvironmentFailure(f"there is no such device, of {count}", where=f"--device {device}")


def prepare(program: Program, device: str | torch.device = "cpu", backend: Backend | None = None) -> Program:
    """Move a Program to a device and give each quantized layer its kernel there, in place.

    Args:
        program: any Program. One without quantized layers is only moved; on CUDA, its half-precision
            linear layers of 2:4 sparse weight get their kernels, too.
        device: "cpu" or a CUDA device.
        backend: which kernels; by default those of the device.

    Returns:
        The same Program.

    Raises:
        EnvironmentFailure: the device is not there.
    """
    require_device(device)
    target = torch.device(device)
    program.to(target)
    chosen = backend or ("cuda" if target.type == "cuda" else "onednn")
    overwritable = _overwritable_residuals(program)
    for name, module in program.named_modules():
        if isinstance(module, Quantized):
            module.kernel = _KERNELS[chosen](module, name in overwritable)
        elif type(module) is nn.Linear:
            (sparse24.attach if chosen == "cuda" else sparse24.detach)(module)
    return program


def _reference(module: nn.Module, _: bool) -> Kernel | None:
    if isinstance(module, QuantizedConv2d):
        return partial(reference.conv2d, module)
    if isinstance(module, QuantizedLinear):
        return partial(reference.linear, module)
    if isinstance(module, DynamicLinear):
        return partial(reference.dynamic_linear, module)
    return None


def _onednn(module: nn.Module, may_overwrite_residual: bool) -> Kernel | None:
    if isinstance(module, QuantizedMaxPool2d):
        return onednn.max_pool2d(module)
    if not isinstance(module, QuantizedConv2d | QuantizedLinear | DynamicLinear):
        return None
    groups = module.groups if isinstance(module, QuantizedConv2d) else 1
    if not torch.backends.mkldnn.is_available() or not never_saturates(module.weight, groups):
        return _reference(module, False)
    if isinstance(module, QuantizedConv2d):
        return onednn.conv2d(module, may_overwrite_residual=may_overwrite_residual)
    return onednn.linear(module) if isinstance(module, QuantizedLinear) else onednn.dynamic_linear(module)


def _cuda(module: nn.Module, _: bool) -> Kernel | None:
    if isinstance(module, QuantizedConv2d):
        return cuda.conv2d(module)
    if isinstance(module, QuantizedLinear):
        return cuda.linear(module)
    return cuda.dynamic_linear(module) if isinstance(module, DynamicLinear) else None


_KERNELS: dict[str, Callable[[nn.Module, bool], Kernel | None]] = {
    "onednn": _onednn,
    "cuda": _cuda,
    "reference": _reference,
}

# Modules whose output is a fresh tensor that shares no memory with their input.
_FRESH = (QuantizedConv2d, QuantizedAdd, QuantizedMaxPool2d, QuantizedAvgPool2d)


def _overwritable_residuals(program: Program) -> set[str]:
    """Names of the convolutions whose residual nobody else can still read when they run.

    That holds where a fresh tensor is the residual and all its other readers run earlier and keep
    no view of it. A layer that is called more than once must satisfy it at every call.
    """
    modules = dict(program.named_modules())
    position = {node: i for i, node in enumerate(program.graph.nodes)}
    good: set[str] = set()
    bad: set[str] = set()

    def fresh(node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(modules[str(node.target)], _FRESH)

    for node in program.graph.nodes:
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, QuantizedConv2d) or layer.residual is None:
            continue
        first, residual = node.args
        safe = (
            residual is not first
            and fresh(residual)
            and all(
                user is node or (fresh(user) and position[user] < position[node]) for user in residual.users
            )
        )
        (good if safe else bad).add(str(node.target))
    return good - bad
