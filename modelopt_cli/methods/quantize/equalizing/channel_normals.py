"""Mean and standard deviation of the channels of a network's values, as its batch norms tell them.

A batch norm gives each channel its bias for a mean and its weight for a standard deviation; values are taken
for normally distributed (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
Correction", ICCV 2019, section 4.2.1 and appendix C). From there they are followed through the operations
that the paper meets and some more; channels and operands count as independent.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from modelopt_cli.program import Program
from modelopt_cli.program.calls import arguments, compute, operation, source
from modelopt_cli.program.channels.function_rules import ELEMENTWISE
from modelopt_cli.program.layer_kinds import row_of
from modelopt_cli.program.shapes import program_values

POINTS = 1024
"""Values that stand for a normal distribution where a function is applied to it: one for each equal share."""
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
MULTIPLYING = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_AVERAGES = frozenset(
    (
        *("AvgPool1d", "AvgPool2d", "AvgPool3d"),
        *("AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d"),
        *("avg_pool1d", "avg_pool2d", "avg_pool3d"),
        *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    )
)


@dataclass(frozen=True)
class Normal:
    """Channels taken for independent and normally distributed.

    Attributes:
        mean: of each channel, float64 ``(C,)``.
        std: standard deviation, the same.
    """

    mean: Tensor
    std: Tensor

    def of(self, function: Callable[[Tensor], Tensor]) -> "Normal":
        """The moments of a function of such values, which takes and returns ``(points, C)``."""
        places = (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS
        values = function(self.mean + self.std * torch.special.ndtri(places)[:, None])
        return Normal(values.mean(0), values.std(0, correction=0))


def recorded_normals(normed: Program, folded: Program, scaled: Program) -> dict[str, Normal]:
    """The outputs of batch norms, and of layers that one was folded into, by the layer's name.

    Args:
        normed: with the batch norms.
        folded: without those that could be folded.
        scaled: the same, its channels perhaps scaled: a bias is divided by what its channel is.
    """
    called = {str(node.target) for node in folded.graph.find_nodes(op="call_module")}
    normals = {}
    for node in normed.graph.find_nodes(op="call_module"):
        norm: Any = normed.get_submodule(str(node.target))
        if not isinstance(norm, _NORMS) or norm.running_mean is None:
            continue
        name = str(node.target if node.target in called else source(node).target)
        before, after = (program.get_submodule(name).bias for program in (folded, scaled))
        ones = torch.ones(norm.num_features, dtype=torch.float64)
        divided = ones if before is after or before is None else _ratio(after, before)
        mean = 0 * ones if norm.bias is None else norm.bias.detach().double()
        std = ones if norm.weight is None else norm.weight.detach().double().abs()
        normals[name] = Normal(mean * divided, std * divided)
    return normals


def _ratio(after: Any, before: Any) -> Tensor:
    after, before = after.detach().double(), before.detach().double()
    return torch.where(before == 0, 1.0, after / torch.where(before == 0, 1.0, before))


def channel_normals(program: Program, recorded: Mapping[str, Normal]) -> dict[fx.Node, Normal]:
    """The channels of each value of which something is known.

    Args:
        program: in inference form, without the batch norms that could be folded.
        recorded: the outputs of layers, by name.
    """
    following = _Following(program, recorded)
    for node in program.graph.nodes:
        normal = following.of(node)
        if normal is not None:
            following.known[node] = normal
    return following.known


class _Following:
    """The values of a graph, one after the other."""

    def __init__(self, program: Program, recorded: Mapping[str, Normal]) -> None:
        self.program, self.recorded = program, recorded
        self.shapes = {
            node: tuple(value.shape)
            for node, value in program_values(program, 2).items()
            if isinstance(value, Tensor)
        }
        self.known: dict[fx.Node, Normal] = {}

    def of(self, node: fx.Node) -> Normal | None:
        """The means and standard deviations of a value's channels; None where they do not follow."""
        if node.op == "call_module" and str(node.target) in self.recorded:
            return self.recorded[str(node.target)]
        inputs = [self.known.get(each) for each in node.all_input_nodes]
        if node.op not in ("call_module", "call_function", "call_method") or not inputs or None in inputs:
            return None
        layer: Any = self.program.get_submodule(str(node.target)) if node.op == "call_module" else None
        name = operation(node) or type(layer).__name__
        if len(inputs) > 1:
            return self._of_several(node, name)
        before = self.known[source(node)]
        if isinstance(layer, MULTIPLYING):
            return self._multiplied(node, layer, before)
        if layer is None and name in ELEMENTWISE:
            return before.of(lambda x: compute(node, {source(node).name: x}))
        if layer is not None and row_of(layer).channels == "same":
            return before.of(layer)
        if name in _AVERAGES or (name == "mean" and self._over_space(node)):
            return before
        return self._flattened(node, before) if name in ("flatten", "Flatten") else None

    def _of_several(self, node: fx.Node, name: str) -> Normal | None:
        first, *others = (self.known[each] for each in node.all_input_nodes)
        if name == "cat" and arguments(node)["dim"] == 1:
            parts = [self.known[each] for each in arguments(node)["tensors"]]
            return Normal(torch.cat([each.mean for each in parts]), torch.cat([each.std for each in parts]))
        if len(others) != 1 or len(first.mean) != len(others[0].mean) or "alpha" in node.kwargs:
            return None
        second = others[0]
        if name == "add":
            return Normal(first.mean + second.mean, first.std.hypot(second.std))
        if name == "mul":
            squares = [each.mean.square() + each.std.square() for each in (first, second)]
            mean = first.mean * second.mean
            return Normal(mean, (squares[0] * squares[1] - mean.square()).clamp_min(0).sqrt())
        return None

    def _multiplied(self, node: fx.Node, layer: Any, before: Normal) -> Normal | None:
        """The sums of a layer that no norm follows."""
        if not reads_channels(layer, self.shapes[source(node)], before):
            return None
        weight = layer.weight.detach().double()
        bias = 0.0 if layer.bias is None else layer.bias.detach().double()
        groups = getattr(layer, "groups", 1)
        mean = by_channel(weight, before.mean, groups) + bias
        return Normal(mean, by_channel(weight.square(), before.std.square(), groups).sqrt())

    def _over_space(self, node: fx.Node) -> bool:
        dims, rank = arguments(node).get("dim"), len(self.shapes[source(node)])
        dims = dims if isinstance(dims, list | tuple) else [dims]
        return all(type(dim) is int and dim % rank > 1 for dim in dims)

    def _flattened(self, node: fx.Node, before: Normal) -> Normal | None:
        """Maps as features, channel by channel."""
        shape, channels = self.shapes[node], len(before.mean)
        if len(shape) != 2 or self.shapes[source(node)][1] != channels:
            return None
        times = shape[1] // channels
        return Normal(before.mean.repeat_interleave(times), before.std.repeat_interleave(times))


def reads_channels(layer: Any, shape: tuple[int, ...], normal: Normal) -> bool:
    """True if the input channels of a layer are those of a value.

    Args:
        layer: a convolution or linear layer.
        shape: of the value; a linear layer reads the last dimension, which is that of channels in rows alone.
        normal: its channels.
    """
    linear = isinstance(layer, nn.Linear)
    if linear and len(shape) != 2:
        return False
    channels: int = layer.in_features if linear else layer.in_channels
    return len(normal.mean) == channels


def by_channel(weight: Tensor, values: Tensor, groups: int = 1) -> Tensor:
    """Sums of a layer whose input is the same everywhere: ``(O,)``.

    Args:
        weight: ``(O, C / groups, ...)``.
        values: of each input channel ``(C,)``.
        groups: of the layer.
    """
    taps = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
    by_group = taps.unflatten(0, (groups, -1))
    sums: Tensor = (by_group * values.view(groups, 1, -1)).sum(2).flatten()
    return sums
