"""GPTQ: weights rounded column by column, later columns making up for the error of earlier ones.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR
2023, algorithm 1: the Hessian of a layer's squared output error is that of its inputs, here those from the
integer network so far. A convolution multiplies patches of its input; each of its groups has its own.
Columns with the largest inputs come first, as in the authors' own code (``--act-order``).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modelopt_cli.methods.layer_pass import Columns, LayerPass, Span, damped, hessians, inverse_factor
from modelopt_cli.methods.matrices import from_matrices, to_matrices
from modelopt_cli.methods.quantize.weight_rounding.rounding_problem import (
    Rounded,
    RoundedLayer,
    RoundingProblem,
)
from modelopt_cli.methods.quantize.weight_rounding.simulation import set_weight, simulate
from modelopt_cli.program.quantization import weight_limits

COLUMNS = 128
"""Columns after which the update of all later columns is carried out."""


def gptq(problem: RoundingProblem) -> Rounded:
    """The integers of every layer that may be rounded freely.

    Raises:
        DataError: no samples, or the network gives no finite numbers on them.
    """
    network = simulate(problem).program
    free = {name: f"{name}.weight" for name, layer in problem.layers.items() if layer.free}
    columns = {name: Columns(width_of(network.get_submodule(name))) for name in free}
    known = {}
    for name, moments in hessians(LayerPass(network, problem.data, problem.context), free, columns):
        layer, module = problem.layers[name], network.get_submodule(name)
        grid = layer.grid
        weight = to_matrices(module, layer.form.turned(grid.weight))
        scale = to_matrices(module, layer.form.turned(grid.spread.expand_as(grid.weight)))
        columns_of = ColumnGrid(scale.double(), None, weight_limits(grid.bits))
        integers = rounded_columns(weight.double(), moments, columns[name].spans, columns_of)
        steps = grid.settled(layer.form.turned(from_matrices(module, integers).float()))
        set_weight(module, layer.real(steps))
        known[name] = RoundedLayer(steps.to(torch.int8), grid.scale)
    return Rounded(known, problem.qparams)


def width_of(module: nn.Module) -> int:
    """Columns of a layer's weight as matrices."""
    return to_matrices(module, module.get_parameter("weight")).shape[-1]


@dataclass(frozen=True)
class ColumnGrid:
    """The integers that weights may become: ``scale * (integer - zero point)`` is the weight.

    Attributes:
        scale: of each weight, float64 ``(groups, rows, columns)``.
        zero_point: of each weight, of the same shape; None where all are 0.
        limits: the smallest and the largest integer.
    """

    scale: Tensor
    zero_point: Tensor | None
    limits: tuple[int, int]

    def take(self, index: Tensor) -> "ColumnGrid":
        """The grid with its columns in another order, or some of them, ``(groups, rows, K)``."""
        zero = None if self.zero_point is None else self.zero_point.gather(-1, index)
        return ColumnGrid(self.scale.gather(-1, index), zero, self.limits)

    def nearest(self, weight: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """The integers next to one column, and what they stand for."""
        scale = self.scale[..., column]
        zero = 0.0 if self.zero_point is None else self.zero_point[..., column]
        integers = ((weight / scale).round() + zero).clamp(*self.limits)
        return integers, (integers - zero) * scale


def rounded_columns(
    weight: Tensor, hessians: Sequence[Tensor], spans: Sequence[Span], grid: ColumnGrid
) -> Tensor:
    """Integers for weights such that the outputs of the layer change little.

    Args:
        weight: float64 ``(groups, rows, columns)``. Zeros stay zeros: they may be pruned.
        hessians: X^T X of the inputs of each span of columns, float64 ``(groups, width, width)``.
        spans: the columns of each.
        grid: the integers to choose from.

    Returns:
        float64 of the weight's shape.
    """
    parts = []
    for (start, _), hessian in zip(spans, hessians, strict=True):
        order = hessian.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
        by_row = order.unsqueeze(1).expand(-1, weight.shape[1], -1)
        own = hessian.gather(1, order.unsqueeze(2).expand_as(hessian))
        factor = inverse_factor(damped(own.gather(2, order.unsqueeze(1).expand_as(own))))
        found = _in_order(weight.gather(-1, start + by_row), factor, grid.take(start + by_row))
        parts.append(torch.zeros_like(found).scatter(-1, by_row, found))
    return torch.cat(parts, -1)


def _in_order(target: Tensor, factor: Tensor, grid: ColumnGrid) -> Tensor:
    """The algorithm itself: integers of the columns, from first to last.

    Args:
        target: the weights, which are changed: each later column takes its part of the errors made so far.
        factor: upper triangular U with U^T U = H^-1, ``(groups, columns, columns)``.
        grid: of the columns.
    """
    count, kept = target.shape[-1], target != 0
    chosen = torch.zeros_like(target)
    for first in range(0, count, COLUMNS):
        last = min(first + COLUMNS, count)
        errors = torch.zeros_like(target[..., first:last])
        for j in range(first, last):
            aim = torch.where(kept[..., j], target[..., j], 0.0)
            chosen[..., j], value = grid.nearest(aim, j)
            error = (target[..., j] - value) / factor[:, j, j].unsqueeze(-1)
            target[..., j:last] -= error.unsqueeze(-1) * factor[:, j, j:last].unsqueeze(1)
            errors[..., j - first] = error
        target[..., last:] -= errors @ factor[:, first:last, last:]
    return chosen
