"""Roles of float nodes in an int8 graph: the tables that the int8 plan is made from."""

from collections.abc import Mapping
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor, fx, nn

from modelopt_cli.program.calls import arguments, operation, source
from modelopt_cli.program.fold import zero_padding
from modelopt_cli.program.quantization import QParams
from modelopt_cli.program.quantized_operations import (
    QuantizedAvgPool,
    QuantizedAvgPool1d,
    QuantizedAvgPool2d,
    QuantizedAvgPool3d,
    QuantizedMaxPool,
    QuantizedMaxPool1d,
    QuantizedMaxPool2d,
    QuantizedMaxPool3d,
)


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

ADD_ACTIVATIONS = {"relu", "relu6"}


def is_mul(node: fx.Node, values: Mapping[fx.Node, Any]) -> bool:
    """True if the node multiplies two tensors of the graph."""
    return operation(node) == "mul" and _takes_two_tensors(node, values)


def _takes_two_tensors(node: fx.Node, values: Mapping[fx.Node, Any]) -> bool:
    named = arguments(node)
    operands = [values.get(operand) for operand in named.values() if isinstance(operand, fx.Node)]
    return len(named) == len(operands) == 2 and all(isinstance(value, Tensor) for value in operands)


def role_of(node: fx.Node, modules: Mapping[str, nn.Module], values: Mapping[fx.Node, Any]) -> Role:
    """The node's role. Layers that are themselves quantized are not looked at here.

    Args:
        node: in normal form.
        modules: the Program's layers by path.
        values: its values by node, as ``program.shapes.program_values`` gives them.
    """
    if quantized_max_pool(node, modules) is not None:
        return Role.PASS
    if avg_pool_options(node, modules, values):
        return Role.POOL
    if zero_sides(node, modules) is not None:
        return Role.PASS
    if node.op == "call_module":
        return Role.PASS if isinstance(modules[str(node.target)], PASS_MODULES) else Role.FLOAT
    name = operation(node)
    if name in SHAPE_OPERATIONS:  # the type that is asked for is that of the real values
        return Role.FLOAT if arguments(node).get("name") == "dtype" else Role.SHAPE
    if name in ("add", "cat"):
        two = name == "cat" or _takes_two_tensors(node, values)
        return Role.FLOAT if not two else Role.CAT if name == "cat" else Role.ADD
    moves = name in PASS_OPERATIONS and _moves_tensor(node, values)
    return Role.PASS if moves else Role.FLOAT


def _moves_tensor(node: fx.Node, values: Mapping[fx.Node, Any]) -> bool:
    """True if a node's first input is a tensor or a part of a split one, not a number or a size."""
    value = values.get(source(node))
    split = isinstance(value, tuple | list) and not isinstance(value, torch.Size)
    return split or isinstance(value, Tensor)


def zero_sides(node: fx.Node, modules: Mapping[str, nn.Module]) -> list[Any] | None:
    """The argument of ``F.pad`` that a node stands for, where it pads with zeros."""
    return zero_padding(node, modules[str(node.target)] if node.op == "call_module" else None)


def _sizes(value: Any, rank: int) -> tuple[int, ...] | None:
    """One integer for each dimension of space; None for anything else."""
    if isinstance(value, int):
        return (value,) * rank
    integers = isinstance(value, tuple | list) and all(isinstance(v, int) for v in value)
    return tuple(value) * (rank if len(value) == 1 else 1) if integers and len(value) in (1, rank) else None


_MAX_POOLS: dict[type[nn.Module] | str, type[QuantizedMaxPool]] = {
    **{nn.MaxPool1d: QuantizedMaxPool1d, nn.MaxPool2d: QuantizedMaxPool2d, nn.MaxPool3d: QuantizedMaxPool3d},
    **{"max_pool1d": QuantizedMaxPool1d, "max_pool2d": QuantizedMaxPool2d, "max_pool3d": QuantizedMaxPool3d},
}
_ADAPTIVE: dict[type[nn.Module] | str, int] = {
    **{nn.AdaptiveAvgPool1d: 1, nn.AdaptiveAvgPool2d: 2, nn.AdaptiveAvgPool3d: 3},
    **{"adaptive_avg_pool1d": 1, "adaptive_avg_pool2d": 2, "adaptive_avg_pool3d": 3},
}
_WINDOWED: dict[type[nn.Module] | str, int] = {
    **{nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3},
    **{"avg_pool1d": 1, "avg_pool2d": 2, "avg_pool3d": 3},
}
"""Layers and operations that pool, by class and by name, and their dimensions of space."""
_AVERAGES: dict[int, type[QuantizedAvgPool]] = {
    **{1: QuantizedAvgPool1d, 2: QuantizedAvgPool2d, 3: QuantizedAvgPool3d},
}


def _called(node: fx.Node, modules: Mapping[str, nn.Module]) -> type[nn.Module] | str:
    """Class of the layer or name of the operation that a node calls."""
    return type(modules[str(node.target)]) if node.op == "call_module" else operation(node)


def _given(node: fx.Node, modules: Mapping[str, nn.Module]) -> Mapping[str, Any]:
    """Settings of what a node calls."""
    return vars(modules[str(node.target)]) if node.op == "call_module" else arguments(node)


def quantized_max_pool(node: fx.Node, modules: Mapping[str, nn.Module]) -> QuantizedMaxPool | None:
    """The quantized pooling in place of this node, or None where it is no max pooling."""
    pool = _MAX_POOLS.get(_called(node, modules))
    if pool is None:
        return None
    settings = _given(node, modules)
    kernel = _sizes(settings.get("kernel_size"), pool.rank)
    stride = _sizes(settings.get("stride"), pool.rank) or kernel
    padding, dilation = (
        _sizes(settings.get("padding", 0), pool.rank),
        _sizes(settings.get("dilation", 1), pool.rank),
    )
    if (
        kernel is None
        or stride is None
        or padding is None
        or dilation is None
        or settings.get("return_indices")
    ):
        return None
    return pool(kernel, stride, padding, dilation, bool(settings.get("ceil_mode", False)))


def avg_pool_options(
    node: fx.Node, modules: Mapping[str, nn.Module], values: Mapping[fx.Node, Any]
) -> dict[str, Any] | None:
    """Options of the quantized average pooling in place of this node, with its ``rank``, or None."""
    kind = _called(node, modules)
    if kind in _ADAPTIVE:
        return _adaptive(_given(node, modules)["output_size"], _ADAPTIVE[kind])
    if kind in _WINDOWED:
        return _window(_given(node, modules), _WINDOWED[kind])
    return _mean(arguments(node), values) if kind == "mean" else None


def average_pool(options: Mapping[str, Any], before: QParams, after: QParams) -> QuantizedAvgPool:
    """The quantized pooling of these options."""
    settings = {name: value for name, value in options.items() if name != "rank"}
    return _AVERAGES[options["rank"]](before, after, **settings)


def _adaptive(output_size: Any, rank: int) -> dict[str, Any] | None:
    sizes = (output_size,) * rank if isinstance(output_size, int) else output_size
    fits = isinstance(sizes, tuple | list) and len(sizes) == rank
    return {"rank": rank, "output_size": tuple(sizes)} if fits else None


def _window(settings: Mapping[str, Any], rank: int) -> dict[str, Any] | None:
    kernel, padding = _sizes(settings.get("kernel_size"), rank), _sizes(settings.get("padding", 0), rank)
    if kernel is None or padding is None or settings.get("divisor_override") is not None:
        return None
    return {
        "rank": rank,
        "kernel_size": kernel,
        "stride": _sizes(settings.get("stride"), rank) or kernel,
        "padding": padding,
        "ceil_mode": bool(settings.get("ceil_mode", False)),
        "count_include_pad": bool(settings.get("count_include_pad", True)),
    }


def _mean(settings: Mapping[str, Any], values: Mapping[fx.Node, Any]) -> dict[str, Any] | None:
    """The mean over all dimensions of space of a tensor ``(N, C, ...)``."""
    value, dims = values.get(settings["input"]), settings.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    rank = value.dim() - 2 if isinstance(value, Tensor) else 0
    if rank not in _AVERAGES or not isinstance(dims, tuple | list) or settings.get("dtype") is not None:
        return None
    space = [*range(2, rank + 2)]
    if sorted(d % (rank + 2) for d in dims if isinstance(d, int)) != space or len(dims) != rank:
        return None
    return {"rank": rank, "output_size": (1,) * rank, "keepdim": bool(settings.get("keepdim", False))}
