"""Optimal brain surgeon: weights that stay make up for those that go, layer by layer.

Hassibi and Stork (NIPS 1992) remove one weight at a time and solve for the change of the others that
least changes the layer's outputs on calibration data. SparseGPT (Frantar and Alistarh, ICML 2023) makes
that affordable: columns are worked through in one order for all rows, so that one Cholesky factor
serves every row, and later columns are updated a block at a time.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from modelopt_cli.data import Data
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.layer_pass import (
    DAMPING,
    Columns,
    LayerPass,
    Span,
    damped,
    evaluation_copy,
    hessians,
    inverse_factor,
    layers_in_call_order,
)
from modelopt_cli.methods.matrices import DECONVS, from_matrices, to_matrices
from modelopt_cli.methods.prune.criteria import Pruned, alternative
from modelopt_cli.methods.prune.masks import Masks, lowest, lowest_in_groups
from modelopt_cli.methods.prune.structures import SparsityPattern
from modelopt_cli.program import Program

BLOCK = 128
"""Number of columns after which all later columns are updated."""
CHOSEN = 8
"""Number of columns whose weights are chosen together, by their values after the removals before them.

SparseGPT chooses 128 at a time. A choice does not see the changes that it itself causes, so few is better:
at 95 % of LeNet-300-100 on Fashion-MNIST 8 keep 76 % accuracy where 128 keep 65 %.
"""


def obs_obstacle(program: Program, parameter: str, pattern: SparsityPattern) -> str | None:
    """The reason why a weight cannot be pruned in a pattern with updates; None where it can."""
    module = program.get_submodule(parameter.rpartition(".")[0])
    if pattern.label is not None and isinstance(module, DECONVS):
        return f"the rows of {type(module).__name__} are not its outputs"
    return None


def obs_prune(
    program: Program,
    pattern: SparsityPattern,
    sparsities: Mapping[str, float],
    data: Data,
    context: Context,
    *,
    damping: float = DAMPING,
) -> Pruned:
    """Prune one layer after the other, each on inputs that went through the layers already pruned.

    Args:
        program: the network; it is not changed.
        pattern: the zeros that may be put.
        sparsities: fraction of the units of each weight to remove, by parameter name; for N:M only
            the names count.
        data: samples to calibrate on.
        context: batch size, device, progress.
        damping: of the Hessian.

    Raises:
        UsageError: the inputs of a weight cannot be watched.
        DataError: no samples, or the network gives no finite numbers on them.
    """
    network, held = evaluation_copy(program, context.device), Masks.of(program).masks
    layers, masks = layers_in_call_order(network, sparsities, alternative()), {}
    works = {
        layer: _Layer(network.get_submodule(layer), pattern, held.get(parameter))
        for layer, parameter in layers.items()
    }
    columns = {layer: work.columns for layer, work in works.items()}
    for layer, parts in hessians(LayerPass(network, data, context), layers, columns):
        masks[layers[layer]] = works[layer].prune(parts, sparsities[layers[layer]], damping).cpu()
    return Pruned(network.cpu().train(program.training), masks)


class _Layer:
    """A layer's weight as matrices ``(groups, rows, columns)``, columns in the order of work."""

    def __init__(self, module: Any, pattern: SparsityPattern, held: Tensor | None) -> None:
        self.module = module
        weight = module.weight.detach()
        self.held = torch.ones_like(weight, dtype=torch.bool) if held is None else held.to(weight.device)
        count = to_matrices(module, weight).shape[-1]
        self.unit, self.pattern = pattern.unit, pattern
        if not pattern.fixed:
            self.columns = Columns(count, None, range(0, count, self.unit))
            self.starts: frozenset[int] = frozenset()
        else:
            order, starts, cuts = _pattern_order(tuple(weight.shape), pattern.group)
            self.columns, self.starts = Columns(count, order, cuts), frozenset(starts)

    def prune(self, hessians: list[Tensor], sparsity: float, damping: float) -> Tensor:
        """Put new values into the layer's weight and return its mask; the Hessians are used up."""
        weight = self._in_order(self.module.weight.detach()).double()
        keep = self._in_order(self.held)
        spans = self.columns.spans
        factors = [inverse_factor(damped(hessians.pop(0), damping)) for _ in spans]
        choices = {} if self.pattern.fixed else self._choices(weight, keep, factors, sparsity)
        for (start, stop), factor in zip(spans, factors, strict=True):
            for first, last in self.columns.divide(start, stop, BLOCK):
                inside = slice(first - start, last - start)
                error = self._eliminate(weight, keep, factor[..., inside, inside], (first, last), choices)
                weight[..., last:stop] -= error @ factor[..., inside, last - start :]
        return self._put_back(weight, keep)

    def _choices(
        self, weight: Tensor, keep: Tensor, factors: list[Tensor], sparsity: float
    ) -> dict[int, tuple[int, int]]:
        """Blocks of ``CHOSEN`` columns, by their first: where they end, and how many of their units go.

        As many as are among the lowest of all, by the saliencies before any update. SparseGPT takes the
        same part of every 128 columns; but the first columns have more others to make up for them, and
        cost less.
        """
        saliencies: dict[Span, Tensor] = {}
        for (start, stop), factor in zip(self.columns.spans, factors, strict=True):
            for block in self.columns.divide(start, stop, BLOCK):
                for first, last in self.columns.divide(*block, CHOSEN):
                    inside = slice(first - start, last - start)
                    upper = factor[..., inside, inside]
                    saliencies[first, last] = _saliency(
                        weight, keep, upper, (first, last), self.unit
                    ).flatten()
        sizes = [len(scores) for scores in saliencies.values()]
        marks = lowest(torch.cat(list(saliencies.values())), round(sparsity * sum(sizes))).split(sizes)
        return {first: (last, int(part.sum())) for (first, last), part in zip(saliencies, marks, strict=True)}

    def _eliminate(
        self, weight: Tensor, keep: Tensor, upper: Tensor, block: Span, choices: dict[int, tuple[int, int]]
    ) -> Tensor:
        """Remove weights column by column and let the columns after it in the block make up for it.

        Returns:
            The error of each column's removal, by which the columns after the block are to be updated.
        """
        first, last = block
        errors = torch.zeros_like(weight[..., first:last])
        for j in range(last - first):
            at = first + j
            if at in self.starts:
                self._choose_of_pattern(weight, keep, upper, at, j)
            elif at in choices:
                self._choose_units(weight, keep, upper[..., j:, j:], at, *choices[at])
            error = weight[..., at].masked_fill(keep[..., at], 0) / upper[..., j, j].unsqueeze(-1)
            weight[..., at:last] -= error.unsqueeze(-1) * upper[..., j : j + 1, j:]
            errors[..., j] = error
        weight[..., first:last].masked_fill_(~keep[..., first:last], 0)
        return errors

    def _choose_units(
        self, weight: Tensor, keep: Tensor, upper: Tensor, first: int, last: int, count: int
    ) -> None:
        """Mark ``count`` units of a few columns, by their present saliencies."""
        gone = lowest(_saliency(weight, keep, upper, (first, last), self.unit), count)
        wide = gone.repeat_interleave(self.unit, -1)
        keep[..., first : first + wide.shape[-1]] &= ~wide

    def _choose_of_pattern(self, weight: Tensor, keep: Tensor, upper: Tensor, at: int, j: int) -> None:
        """Mark the weights that go of the N:M group that starts at a column."""
        group = slice(at, at + self.pattern.group)
        scores = _saliency(weight, keep, upper[..., j:, j:], (group.start, group.stop), 1)
        keep[..., group] &= ~lowest_in_groups(scores, self.pattern.group - self.pattern.keep)

    def _in_order(self, tensor: Tensor) -> Tensor:
        matrices = to_matrices(self.module, tensor)
        return matrices.clone() if self.columns.order is None else matrices[..., self.columns.order]

    def _put_back(self, weight: Tensor, keep: Tensor) -> Tensor:
        if self.columns.order is not None:
            places = self.columns.order.argsort()
            weight, keep = weight[..., places], keep[..., places]
        with torch.no_grad():
            self.module.weight.copy_(from_matrices(self.module, weight))
        return from_matrices(self.module, keep)


def _saliency(weight: Tensor, keep: Tensor, upper: Tensor, columns: Span, size: int) -> Tensor:
    """The squared error that the removal of each unit between two columns adds: ``(groups, rows, units)``.

    With all columns before a unit decided, w^T ([H^-1]_SS)^-1 w for the columns S of the unit. Units that
    are gone already have ``-inf``. ``upper`` starts at the first column.
    """
    units = (columns[1] - columns[0]) // size
    part = slice(columns[0], columns[0] + units * size)
    values: Tensor = weight[..., part].unflatten(-1, (units, size))
    gone = ~keep[..., part].unflatten(-1, (units, size)).any(-1)
    if size == 1:
        diagonal = upper.diagonal(dim1=-2, dim2=-1)[..., :units]
        scores: Tensor = (values.squeeze(-1) / diagonal.unsqueeze(-2)).square()
    else:
        square = upper[..., : units * size, : units * size]
        tiles = square.unflatten(-1, (units, size)).unflatten(-3, (units, size))
        own = tiles.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
        solved = torch.linalg.solve_triangular(own.mT, values.movedim(-3, -1), upper=False)
        scores = solved.square().sum(-2).mT
    return scores.masked_fill(gone, -torch.inf)


def _pattern_order(shape: tuple[int, ...], group: int) -> tuple[Tensor, list[int], list[int]]:
    """The columns with input channels running fastest, where groups start, and where they may be cut."""
    channels, positions = shape[1], prod(shape[2:])
    order = torch.arange(channels * positions).view(channels, positions).T.flatten()
    grouped = channels // group * group  # the rest, too few for a group, stays
    starts = [p * channels + c for p in range(positions) for c in range(0, grouped, group)]
    tails = [p * channels + grouped for p in range(positions)] if grouped < channels else []
    return order, starts, sorted(starts + tails)
