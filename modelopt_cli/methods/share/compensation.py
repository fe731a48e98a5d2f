"""Choosing entries one column after the other, so that the columns that follow make up for the error.

Optimal brain surgeon for quantization (Hassibi and Stork 1992; Frantar, Singh and Alistarh, "Optimal brain
compression", NeurIPS 2022, section 5), in one order of columns for all rows (Frantar et al., "GPTQ", ICLR
2023). Two things are added. What a weight takes in the file counts beside its error, as in
entropy-constrained quantization (Chou, Lookabaugh and Gray 1989). And the bias is a column as well, whose
input is always 1: it is never rounded, so it makes up for what is left at the end.


Going through a network's layers to share them, each on inputs that went through those shared before.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_cli.methods.context import Context
from modelopt_cli.methods.layer_pass import (
    Columns,
    LayerPass,
    Span,
    calibration_data,
    damped,
    hessians,
    inverse_factor,
    layers_in_call_order,
)
from modelopt_cli.methods.matrices import from_matrices, to_matrices, unseen_inputs
from modelopt_cli.program import Program

_REGULAR = 1e-3
"""What is added to the diagonal beside shrinking, as a part of its mean."""
BLOCK = 128
"""Columns after which the update of all later columns is carried out."""


@dataclass(frozen=True)
class Levels:
    """The values that weights may take.

    Attributes:
        table: float64 ``(K,)``, or ``(groups, rows, K)`` where rows have tables of their own.
        rates: what each costs beside its squared error in the layer's outputs, of the table's shape or
            ``(K,)``.
        zero: index of the level that pruned weights have; ``(groups, rows)`` where that differs.
    """

    table: Tensor
    rates: Tensor
    zero: Tensor | int = 0


@dataclass(frozen=True)
class Curvature:
    """What the errors of a layer's columns do to its outputs.

    Attributes:
        factors: for each span ``U`` with ``U^T U = H^-1``, ``(groups, width, width)``.
        spans: the columns of each.
    """

    factors: tuple[Tensor, ...]
    spans: tuple[Span, ...]

    @classmethod
    def of(
        cls, hessians: Sequence[Tensor], spans: Sequence[Span], samples: int, *, constant: bool = False
    ) -> "Curvature":
        """From the second moments of a layer's inputs.

        Args:
            hessians: of each span, summed over samples and positions.
            spans: columns that share one.
            samples: how many there were: the fewer, the less their correlations are believed.
            constant: whether the last column is the bias'.
        """
        last = len(hessians) - 1
        believed = [shrunk(h, samples, constant=constant and i == last) for i, h in enumerate(hessians)]
        return cls(tuple(inverse_factor(damped(h, _REGULAR)) for h in believed), tuple(spans))

    def importance(self, columns: int) -> Tensor:
        """What the squared error of each column costs once the later columns have made up for it.

        Float64 ``(groups, columns)``, without the bias' column.
        """
        diagonals = [factor.diagonal(dim1=-2, dim2=-1) for factor in self.factors]
        return 1 / torch.cat(diagonals, -1)[..., :columns].square()


def shrunk(hessian: Tensor, samples: int, *, constant: bool = False) -> Tensor:
    """Second moments whose correlations are as far from none as so many samples show.

    The oracle approximating shrinkage of Chen, Wiesel, Eldar and Hero ("Shrinkage algorithms for MMSE
    covariance estimation", IEEE Transactions on Signal Processing, 2010, equation 23), applied to
    correlations as Schäfer and Strimmer (2005) do, which leaves the variances alone. Positions of one
    sample count together as one observation: they are far from independent. Means, which the bias makes up
    for, are believed.

    Args:
        hessian: ``(groups, n, n)``, sums over positions.
        samples: how many.
        constant: whether the last column stands for the constant 1; the others are then centred first.
    """
    if constant:
        count = hessian[..., -1:, -1:]
        sums = hessian[..., :-1, -1:]
        outer = sums @ sums.mT / count
        inner = shrunk(hessian[..., :-1, :-1] - outer, samples) + outer
        return torch.cat((torch.cat((inner, sums), -1), hessian[..., -1:, :]), -2)
    scale = hessian.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    spread = scale.unsqueeze(-1) * scale.unsqueeze(-2)
    live = (scale > 0).sum(-1).clamp(min=1).double()
    correlation = torch.where(spread > 0, hessian / spread.clamp(min=1e-300), 0.0)
    square = correlation.square().sum((-1, -2))
    excess = (samples + 1 - 2 / live) * (square - live)
    part = ((1 - 2 / live) * square + live.square()) / excess.clamp(min=1e-300)
    part = torch.where(excess > 0, part.clamp(0, 1), 1.0)[..., None, None]
    return (1 - part) * hessian + part * torch.diag_embed(hessian.diagonal(dim1=-2, dim2=-1))


def compensated(
    weight: Tensor, bias: Tensor | None, curvature: Curvature, levels: Levels, free: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The level of every weight, and the bias that goes with them.

    Args:
        weight: ``(groups, rows, columns)``.
        bias: ``(groups, rows)``, if the curvature has a column for it.
        curvature: of the layer.
        levels: to choose from.
        free: False where a weight is pruned, and takes the level ``zero``.

    Returns:
        int64 indices of the weight's shape, and the new bias.
    """
    columns = weight.shape[-1]
    left = weight.detach().double()
    left = left.clone() if bias is None else torch.cat((left, bias.detach().double().unsqueeze(-1)), -1)
    chosen = torch.zeros(weight.shape, dtype=torch.int64)
    for (start, stop), factor in zip(curvature.spans, curvature.factors, strict=True):
        end = min(stop, columns)
        for first in range(start, end, BLOCK):
            last = min(first + BLOCK, end)
            errors = torch.zeros_like(left[..., first:last])
            for at in range(first, last):
                j = at - start
                value, scale = left[..., at].clone(), factor[:, j, j].unsqueeze(-1)
                held = None if free is None else ~free[..., at]
                index = _nearest(value, scale, levels, held)
                chosen[..., at] = index
                error = (value - _values(levels.table, index)) / scale
                errors[..., at - first] = error
                left[..., at:last] -= error.unsqueeze(-1) * factor[:, j : j + 1, j : last - start]
            inside = factor[:, first - start : last - start, last - start :]
            left[..., last:stop] -= errors @ inside
    return chosen, None if bias is None else left[..., columns]


def _nearest(value: Tensor, scale: Tensor, levels: Levels, held: Tensor | None) -> Tensor:
    cost = ((value.unsqueeze(-1) - levels.table) / scale.unsqueeze(-1)).square_().add_(levels.rates)
    index = cost.argmin(-1)
    return index if held is None else torch.where(held, levels.zero, index)


def _values(table: Tensor, index: Tensor) -> Tensor:
    if table.dim() == 1:
        return table[index]
    return table.gather(-1, index.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class Layer:
    """A layer whose inputs are known.

    Attributes:
        parameter: the name of its weight.
        module: the layer itself; its weight may be changed.
        hessians: second moments of its inputs, summed over samples, for each span of its columns, on the
            CPU like all that is computed from them.
        columns: where they are cut, and whether the last one is the bias'.
        samples: how many were looked at.
    """

    parameter: str
    module: Any
    hessians: list[Tensor]
    columns: Columns
    samples: int

    @property
    def weight(self) -> Tensor:
        """``(groups, rows, columns)``, float64."""
        return to_matrices(self.module, self.module.weight.detach()).double().cpu()

    @property
    def bias(self) -> Tensor | None:
        """``(groups, rows)``, float64, if the curvature knows it."""
        if not self.columns.constant:
            return None
        bias: Tensor = self.module.bias.detach().double().cpu()
        return bias.view(getattr(self.module, "groups", 1), -1)

    def curvature(self) -> Curvature:
        """What errors of its weights do to its outputs."""
        columns = self.columns
        return Curvature.of(self.hessians, columns.spans, self.samples, constant=columns.constant)

    def importance(self, curvature: Curvature) -> Tensor:
        """What the error of each weight costs, float32 of the weight's shape."""
        groups, rows, count = self.weight.shape
        spread = curvature.importance(count).unsqueeze(1).expand(groups, rows, count)
        return from_matrices(self.module, spread).float()

    def choose(
        self, curvature: Curvature, levels: Levels, free: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The level of each weight, int64 of the weight's shape, and the bias that goes with it."""
        mask = None if free is None else to_matrices(self.module, free)
        index, bias = compensated(self.weight, self.bias, curvature, levels, mask)
        return from_matrices(self.module, index), bias

    def error(self, change: Tensor) -> float:
        """The squared error of the outputs, summed over samples, with the bias that makes it least.

        Args:
            change: of the weight, of its shape.
        """
        moved = to_matrices(self.module, change).double()
        total, count = 0.0, moved.shape[-1]
        for (start, stop), hessian in zip(self.columns.spans, self.hessians, strict=True):
            part, moments = moved[..., start : min(stop, count)], hessian
            if stop > count:
                mean = hessian[..., -1:, :-1]
                moments = hessian[..., :-1, :-1] - mean.mT @ mean / hessian[..., -1:, -1:]
            total += float(((part @ moments) * part).sum())
        return total

    def shift(self, change: Tensor) -> Tensor | None:
        """What the bias must change by to keep the mean of the outputs, flat; None if it is not known."""
        if not self.columns.constant or len(self.columns.spans) > 1:
            return None
        hessian = self.hessians[0]
        mean = hessian[..., :-1, -1:] / hessian[..., -1:, -1:]
        return -(to_matrices(self.module, change).double() @ mean).flatten()


def watchable(program: Program, names: Iterable[str]) -> list[str]:
    """Those weights whose inputs can be watched."""
    return [name for name in names if unseen_inputs(program, name) is None]


def layers(network: Program, names: Iterable[str], context: Context, samples: int) -> Iterator[Layer]:
    """Layers in the order in which they are called, their inputs as the layers before have become by then.

    Args:
        network: on the context's device, in evaluation mode; its weights may be changed on the way.
        names: of weights whose inputs can be watched.
        context: data, seed, batch size, progress.
        samples: how many to look at, at most.

    Raises:
        UsageError: no data.
        DataError: no samples, or the network gives no finite numbers on them.
    """
    data = calibration_data(context, "weighting hessian", samples, "--weighting none")
    by_layer = layers_in_call_order(network, names, "--weighting none")
    columns = {layer: _columns(network.get_submodule(layer)) for layer in by_layer}
    for layer, moments in hessians(LayerPass(network, data, context), by_layer, columns):
        module = network.get_submodule(layer)
        on_cpu = [moment.cpu() for moment in moments]
        yield Layer(by_layer[layer], module, on_cpu, columns[layer], data.size or samples)


def _columns(module: nn.Module) -> Columns:
    count = to_matrices(module, module.get_parameter("weight")).shape[-1]
    return Columns(count, constant=getattr(module, "bias", None) is not None)


def put(module: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Give a layer other values."""
    with torch.no_grad():
        module.get_parameter("weight").copy_(weight)
        if bias is not None:
            module.get_parameter("bias").copy_(bias.flatten())
