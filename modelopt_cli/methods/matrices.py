"""Weights as matrices, and the inputs that their columns are multiplied with.

A linear layer multiplies its weight with its input, a convolution multiplies it with patches of its
input, one group of channels at a time. So every weight is ``groups`` matrices ``(rows, columns)``: a
row makes one output, a column belongs to one input channel at one kernel position, in the order in
which the weight itself lies in memory.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from modelopt_cli.methods.layer_selection import is_weight_name
from modelopt_cli.program import Program
from modelopt_cli.program.weighted import WEIGHTED_KINDS, fetched_weights

CONVS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
DECONVS: tuple[type[nn.Module], ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CHUNK = 1 << 24
"""Elements of unfolded input at once, if one sample alone is not more."""


def weights_of(program: Program) -> dict[str, Tensor]:
    """Every weight that may be compressed, by parameter name, in graph order.

    Float tensors of two or more dimensions of weight-carrying layers, attention's projections
    included, and weights that functions of the graph fetch directly. A weight that two layers share
    is listed once, under its first name.
    """
    weights: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in _candidates(program):
        if id(tensor) not in seen and tensor.dim() > 1 and tensor.is_floating_point() and tensor.numel():
            weights[name] = tensor
            seen.add(id(tensor))
    return weights


def _candidates(program: Program) -> Iterator[tuple[str, Tensor]]:
    fetched = fetched_weights(program)
    for node in program.graph.nodes:
        path = str(node.target)
        if node.op == "call_module" and isinstance(program.get_submodule(path), WEIGHTED_KINDS):
            yield from (
                (f"{path}.{name}", tensor)
                for name, tensor in program.get_submodule(path).named_parameters()
                if is_weight_name(name)
            )
        elif node.op == "get_attr" and path in fetched:
            yield path, fetched[path]


def calls_by_layer(program: Program) -> dict[str, list[fx.Node]]:
    """The calls of each layer in the graph, by layer, in graph order."""
    calls: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    return calls


def unseen_inputs(program: Program, parameter: str) -> str | None:
    """The reason why the inputs of a weight cannot be watched; None where they can."""
    layer, _, leaf = parameter.rpartition(".")
    calls = calls_by_layer(program)
    if layer not in calls:
        inside = next((name for name in calls if layer.startswith(f"{name}.")), None)
        return f"its inputs stay inside {inside or 'a function'}"
    module = program.get_submodule(layer)
    if leaf != "weight" or type(module) not in (*CONVS, *DECONVS, nn.Linear):
        return f"the inputs of {type(module).__name__} are not multiplied with its weight alone"
    weight = module.weight
    sharing = [name for name in calls if getattr(program.get_submodule(name), "weight", None) is weight]
    return None if sharing == [layer] else "another layer has the same weight"


def to_matrices(module: nn.Module, weight: Tensor) -> Tensor:
    """A layer's weight, or anything of its shape, as ``(groups, rows, columns)``."""
    if isinstance(module, DECONVS):
        weight = _turned(module, weight)
    matrices: Tensor = weight.flatten(1).unflatten(0, (getattr(module, "groups", 1), -1))
    return matrices


def from_matrices(module: nn.Module, matrices: Tensor) -> Tensor:
    """The inverse of ``to_matrices``."""
    layer: Any = module
    flat: Tensor = matrices.flatten(0, 1)
    if not isinstance(module, DECONVS):
        return flat.reshape(tuple(layer.weight.shape))
    shape = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    return _turned(layer, flat.reshape(shape))


def _turned(layer: Any, weight: Tensor) -> Tensor:
    """Between a transposed convolution's weight and that of the convolution it is; its own inverse."""
    grouped: Tensor = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2)
    return grouped.flip(tuple(range(3, grouped.dim()))).flatten(0, 1)


def unfold(module: nn.Module, inputs: Tensor) -> Iterator[Tensor]:
    """The inputs that the columns of ``to_matrices`` multiply, in chunks ``(groups, positions, columns)``.

    The outputs of the layer, without its bias, are ``unfolded @ matrices.mT``.
    """
    layer: Any = module
    if isinstance(module, nn.Linear):
        yield from inputs.reshape(1, -1, inputs.shape[-1]).split(max(1, CHUNK // inputs.shape[-1]), 1)
        return
    if inputs.dim() == len(layer.kernel_size) + 1:  # one sample without a batch dimension
        inputs = inputs.unsqueeze(0)
    ready, stride = _spread(layer, inputs) if isinstance(module, DECONVS) else _padded(layer, inputs)
    columns = ready.shape[1] * math.prod(layer.kernel_size)
    positions = ready[0, 0].numel() // math.prod(stride)
    for part in ready.split(max(1, CHUNK // max(1, columns * positions))):
        yield _windows(part, layer.kernel_size, stride, layer.dilation, layer.groups)


def _padded(layer: Any, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    # The two sides of each dimension, last dimension first: also right for padding="same".
    sides = list(layer._reversed_padding_repeated_twice)
    return F.pad(x, sides, mode=mode) if any(sides) else x, layer.stride


def _spread(layer: Any, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input of the convolution of stride 1 that a transposed convolution is."""
    sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], layer.stride, strict=True)]
    wide = x.new_zeros(*x.shape[:2], *sizes)
    wide[(slice(None), slice(None), *(slice(None, None, step) for step in layer.stride))] = x
    sides: list[int] = []
    for i in reversed(range(len(sizes))):
        edge = layer.dilation[i] * (layer.kernel_size[i] - 1) - layer.padding[i]
        sides += [edge, edge + layer.output_padding[i]]
    return F.pad(wide, sides), (1,) * len(sizes)


def _windows(
    x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...], groups: int
) -> Tensor:
    """All patches of ``(N, C, *size)``: ``(groups, positions, C / groups * prod(kernel))``."""
    x = x.contiguous()
    sizes = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    ]
    shape = (groups, x.shape[0], *sizes, x.shape[1] // groups, *kernel)
    spatial = x.stride()[2:]
    strides = (
        x.stride(1) * (x.shape[1] // groups),
        x.stride(0),
        *(a * s for a, s in zip(spatial, stride, strict=True)),
        x.stride(1),
        *(a * d for a, d in zip(spatial, dilation, strict=True)),
    )
    patches = torch.as_strided(x, shape, strides)
    return patches.reshape(groups, x.shape[0] * math.prod(sizes), -1)
