"""Roles of float nodes in an int8 graph: the tables that the int8 plan is made from."""

from collections.abc import Mapping
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor, fx, nn

from modelopt_cli.program.calls import arguments, operation, source
from modelopt_cli.program.patterns import activation_of
from modelopt_cli.program.quantized_operations import QuantizedMaxPool2d


class Role(Enum):
    """Treatment of a uint8 input by a node."""

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
    *(nn.Flatten, nn.Unflatten, nn.Identity, nn.ChannelShuffle, nn.PixelShuffle, nn.PixelUnshuffle, nn.ReLU),
)
PASS_OPERATIONS = (
    *(
        "flatten",
        "unflatten",
        "view",
        "reshape",
        "permute",
        "transpose",
        "contiguous",
        "unsqueeze",
        "squeeze",
    ),
    *("chunk", "split", "unbind", "getitem", "channel_shuffle", "relu"),
)
SHAPE_OPERATIONS = frozenset({"size", "getattr"})

CONV_ACTIVATIONS = {"relu", "relu6", "hardswish", "silu"}
LINEAR_ACTIVATIONS = {"relu", "gelu"}
ADD_ACTIVATIONS = {"relu", "relu6"}


def is_relu(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """True if the node is a ReLU, which on uint8 is a maximum with the zero point."""
    return activation_of(node, modules) == "relu"


def is_mul(node: fx.Node, values: Mapping[fx.Node, Any]) -> bool:
    """True if the node multiplies two tensors of the graph."""
    return operation(node) == "mul" and _takes_two_tensors(node, values)


def _takes_two_tensors(node: fx.Node, values: Mapping[fx.Node, Any]) -> bool:
    given = arguments(node)
    operands = [values.get(operand) for operand in given.values() if isinstance(operand, fx.Node)]
    return len(given) == len(operands) == 2 and all(isinstance(value, Tensor) for value in operands)


def role_of(node: fx.Node, modules: Mapping[str, nn.Module], values: Mapping[fx.Node, Any]) -> Role:
    """The node's role. Layers that are themselves quantized are not looked at here.

    Args:
        node: in normal form.
        modules: the Program's layers by path.
        values: its values by node, as ``program.values.infer`` gives them.
    """
    if max_pool_options(node, modules):
        return Role.PASS
    if avg_pool_options(node, modules, values):
        return Role.POOL
    if node.op == "call_module":
        return Role.PASS if isinstance(modules[str(node.target)], PASS_MODULES) else Role.FLOAT
    name = operation(node)
    if name in SHAPE_OPERATIONS:  # the type that is asked for is that of the real values
        return Role.FLOAT if arguments(node).get("name") == "dtype" else Role.SHAPE
    if name in ("add", "cat"):
        two = name == "cat" or _takes_two_tensors(node, values)
        return Role.FLOAT if not two else Role.CAT if name == "cat" else Role.ADD
    if name == "pad":
        return Role.PASS if _pads_with_zero(node) else Role.FLOAT
    moves = name in PASS_OPERATIONS and _moves_tensor(node, values)
    return Role.PASS if moves else Role.FLOAT


def _moves_tensor(node: fx.Node, values: Mapping[fx.Node, Any]) -> bool:
    """True if a node's first input is a tensor or a part of a split one, not a number or a size."""
    value = values.get(source(node))
    split = isinstance(value, tuple | list) and not isinstance(value, torch.Size)
    return split or isinstance(value, Tensor)


def _pads_with_zero(node: fx.Node) -> bool:
    given = arguments(node)
    return given["mode"] == "constant" and given["value"] in (None, 0, 0.0)


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int):
        return value, value
    if isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(v, int) for v in value):
        return value[0], value[1]
    return None


def max_pool_options(node: fx.Node, modules: Mapping[str, nn.Module]) -> dict[str, Any] | None:
    """Options of a ``QuantizedMaxPool2d`` in place of this node, or None."""
    given: Mapping[str, Any]
    if node.op == "call_module":
        module = modules[str(node.target)]
        if not isinstance(module, nn.MaxPool2d):
            return None
        given = vars(module)
    elif operation(node) == "max_pool2d":
        given = arguments(node)
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


def avg_pool_options(
    node: fx.Node, modules: Mapping[str, nn.Module], values: Mapping[fx.Node, Any]
) -> dict[str, Any] | None:
    """Options of a ``QuantizedAvgPool2d`` in place of this node, or None."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        if isinstance(module, nn.AdaptiveAvgPool2d):
            return _adaptive(module.output_size)
        return _window(vars(module)) if isinstance(module, nn.AvgPool2d) else None
    name = operation(node)
    if name == "adaptive_avg_pool2d":
        return _adaptive(arguments(node)["output_size"])
    if name == "avg_pool2d":
        return _window(arguments(node))
    return _mean(arguments(node), values) if name == "mean" else None


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


def _mean(given: Mapping[str, Any], values: Mapping[fx.Node, Any]) -> dict[str, Any] | None:
    """The mean over height and width of a tensor ``(N, C, H, W)``."""
    value, dims = values.get(given["input"]), given.get("dim")
    if not isinstance(value, Tensor) or value.dim() != 4 or not isinstance(dims, tuple | list):
        return None
    if given.get("dtype") is not None or sorted(d % 4 for d in dims if isinstance(d, int)) != [2, 3]:
        return None
    return {"output_size": (1, 1), "keepdim": bool(given.get("keepdim", False))}
