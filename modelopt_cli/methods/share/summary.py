"""What sharing made of each layer, to be shown."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt_cli.methods.select import layer_names
from modelopt_cli.program.coverage import Coverage


@dataclass(frozen=True)
class SharedLayer:
    """One weight before and after.

    Attributes:
        name: of its layer.
        kind: of its layer.
        weights: how many there are.
        values: how many different ones after.
        bits: empirical entropy of the values, in bits for a weight, without regard to their order.
        error: squared change of the weights over their squares; None where they cannot be compared, since a
            batch norm was folded into them.
        reason: why it was left alone, or an empty string.
    """

    name: str
    kind: str
    weights: int
    values: int
    bits: float
    error: float | None
    reason: str


def summary(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], coverage: Coverage, *, comparable: bool
) -> tuple[SharedLayer, ...]:
    """Every weight-carrying layer, in the order of ``coverage``.

    Args:
        before: the weights as they were, by parameter name.
        after: the same as they are.
        coverage: what became of each layer.
        comparable: whether the same weights can be compared.
    """
    names = {label: name for name, label in layer_names(after).items()}
    layers = []
    for layer in coverage.layers:
        name = names.get(layer.name)
        if name is None:
            continue
        values, bits = _spread(after[name])
        error = _error(before[name], after[name]) if comparable and name in before else None
        count = after[name].numel()
        layers.append(SharedLayer(layer.name, layer.kind, count, values, bits, error, layer.reason))
    return tuple(layers)


def _spread(weight: Tensor) -> tuple[int, float]:
    """How many different values there are, and their entropy."""
    counts = torch.unique(weight.detach().flatten(), return_counts=True)[1].double()
    return len(counts), float((counts / counts.sum() * (counts.sum() / counts).log2()).sum())


def _error(before: Tensor, after: Tensor) -> float:
    old, new = before.detach().double(), after.detach().double()
    energy = float(old.square().sum())
    return float((new - old).square().sum()) / energy if energy else 0.0
