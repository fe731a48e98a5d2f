"""What each node of a float graph can do with uint8: the tables that the int8 plan is made from."""

import operator
from collections.abc import Mapping
from enum import Enum, auto
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from modelopt_cli.program.patterns import activation_of
from modelopt_cli.program.quantized import QuantizedMaxPool2d


class Role(Enum):
    """How a node treats a uint8 input."""

    FLOAT = auto()
    """Computes on real values."""
    PASS = auto()
    """Moves or selects elements: the same scale and zero point go through."""
    CAT = auto()
    """Joins tensors, which must then share one scale and zero point."""
    POOL = auto()
    """Averages: uint8 in and out, with a scale of its own."""
    ADD = auto()
    """Adds two tensors."""
    SHAPE = auto()
    """Reads sizes, not values."""


PASS_MODULES = (
    *(nn.Flatten, nn.Unflatten, nn.Identity, nn.ChannelShuffle, nn.PixelShuffle, nn.PixelUnshuffle),
    *(nn.ReLU, nn.MaxPool2d),
)
PASS_FUNCTIONS = {
    *(torch.flatten, torch.permute, torch.transpose, torch.reshape, torch.unsqueeze, torch.squeeze),
    *(torch.chunk, torch.split, torch.unbind, operator.getitem, torch.channel_shuffle),
    *(F.relu, torch.relu, F.max_pool2d, torch.max_pool2d),
}
PASS_METHODS = {
    *("flatten", "view", "reshape", "permute", "transpose", "contiguous", "unsqueeze", "squeeze"),
    *("chunk", "split", "unbind", "relu", "relu_", "unflatten"),
}
SHAPE_METHODS = {"size", "dim"}

ADDS = {operator.add, operator.iadd, torch.add}
MULS = {operator.mul, operator.imul, torch.mul}
CATS = {torch.cat, torch.concat, torch.concatenate}

CONV_ACTIVATIONS = {"relu", "relu6", "hardswish", "silu"}
LINEAR_ACTIVATIONS = {"relu", "gelu"}
ADD_ACTIVATIONS = {"relu", "relu6"}


def is_relu(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the node is a ReLU, which on uint8 is a maximum with the zero point."""
    return activation_of(node, modules) == "relu"


def is_mul(node: fx.Node) -> bool:
    """Whether the node multiplies two tensors of the graph."""
    called = node.target in MULS if node.op == "call_function" else node.target in ("mul", "mul_")
    return node.op in ("call_function", "call_method") and called and _two_tensors(node)


def _two_tensors(node: fx.Node) -> bool:
    return len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args) and not node.kwargs


def role_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> Role:
    """The node's role. Layers that are themselves quantized are not looked at here."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        if max_pool_options(node, modules) or (
            isinstance(module, PASS_MODULES) and not isinstance(module, nn.MaxPool2d)
        ):
            return Role.PASS
        return Role.POOL if avg_pool_options(node, modules) else Role.FLOAT
    if node.op == "call_method":
        return _method_role(node, modules)
    return _function_role(node, modules) if node.op == "call_function" else Role.FLOAT


def _method_role(node: fx.Node, modules: Mapping[str, nn.Module]) -> Role:
    if node.target in SHAPE_METHODS:
        return Role.SHAPE
    if node.target in ("add", "add_") and _two_tensors(node):
        return Role.ADD
    if node.target in PASS_METHODS:
        return Role.PASS
    return Role.POOL if avg_pool_options(node, modules) else Role.FLOAT


def _function_role(node: fx.Node, modules: Mapping[str, nn.Module]) -> Role:
    if node.target is getattr:
        return Role.SHAPE
    if node.target in ADDS and _two_tensors(node):
        return Role.ADD
    if node.target in CATS:
        return Role.CAT
    if node.target is F.pad:
        return Role.PASS if _pads_with_zero(node) else Role.FLOAT
    if node.target in (F.max_pool2d, torch.max_pool2d):
        return Role.PASS if max_pool_options(node, modules) else Role.FLOAT
    if node.target in PASS_FUNCTIONS:
        return Role.PASS
    return Role.POOL if avg_pool_options(node, modules) else Role.FLOAT


def _pads_with_zero(node: fx.Node) -> bool:
    arguments = {**dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)), **node.kwargs}
    return arguments.get("mode", "constant") == "constant" and arguments.get("value") in (None, 0, 0.0)


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int):
        return value, value
    if isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(v, int) for v in value):
        return value[0], value[1]
    return None


def max_pool_options(node: fx.Node, modules: Mapping[str, nn.Module]) -> dict[str, Any] | None:
    """Options of a ``QuantizedMaxPool2d`` in place of this node, or None."""
    names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    if node.op == "call_module":
        module = modules[str(node.target)]
        if not isinstance(module, nn.MaxPool2d):
            return None
        given: dict[str, Any] = {name: getattr(module, name) for name in names[1:]}
    elif node.op == "call_function" and node.target in (F.max_pool2d, torch.max_pool2d):
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    else:
        return None
    kernel = _pair(given.get("kernel_size"))
    stride = _pair(given.get("stride")) or kernel
    padding, dilation = _pair(given.get("padding", 0)), _pair(given.get("dilation", 1))
    if given.get("return_indices") or None in (kernel, padding, dilation):
        return None
    sizes = {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    return {**sizes, "ceil_mode": bool(given.get("ceil_mode", False))}


def quantized_max_pool(node: fx.Node, modules: Mapping[str, nn.Module]) -> QuantizedMaxPool2d | None:
    """The quantized pooling in place of this node, or None where it is no max pooling."""
    options = max_pool_options(node, modules)
    return QuantizedMaxPool2d(**options) if options else None


def avg_pool_options(node: fx.Node, modules: Mapping[str, nn.Module]) -> dict[str, Any] | None:
    """Options of a ``QuantizedAvgPool2d`` in place of this node, or None."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        if isinstance(module, nn.AdaptiveAvgPool2d):
            return _adaptive(module.output_size)
        return _window(vars(module)) if isinstance(module, nn.AvgPool2d) else None
    if node.op == "call_function" and node.target is F.adaptive_avg_pool2d:
        return _adaptive(node.args[1] if len(node.args) > 1 else node.kwargs.get("output_size"))
    if node.op == "call_function" and node.target is F.avg_pool2d:
        names = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
        return _window({**dict(zip(names, node.args, strict=False)), **node.kwargs})
    if node.target in (torch.mean, "mean"):
        return _mean(node)
    return None


def _adaptive(output_size: Any) -> dict[str, Any] | None:
    if isinstance(output_size, int):
        return {"output_size": (output_size, output_size)}
    return {"output_size": tuple(output_size)} if isinstance(output_size, tuple | list) else None


def _window(given: Mapping[str, Any]) -> dict[str, Any] | None:
    kernel, padding = _pair(given.get("kernel_size")), _pair(given.get("padding", 0))
    if kernel is None or padding is None or given.get("divisor_override") is not None:
        return None
    return {
        "kernel_size": kernel,
        "stride": _pair(given.get("stride")) or kernel,
        "padding": padding,
        "ceil_mode": bool(given.get("ceil_mode", False)),
        "count_include_pad": bool(given.get("count_include_pad", True)),
    }


def _mean(node: fx.Node) -> dict[str, Any] | None:
    arguments = {**dict(zip(("input", "dim", "keepdim"), node.args, strict=False)), **node.kwargs}
    dims = arguments.get("dim")
    if not isinstance(dims, tuple | list) or sorted(d % 4 if isinstance(d, int) else -1 for d in dims) != [
        2,
        3,
    ]:
        return None
    return {"output_size": (1, 1), "keepdim": bool(arguments.get("keepdim", False))}
