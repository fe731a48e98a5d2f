"""Choosing entries one column after the other, so that the columns that follow make up for the error.

Optimal brain surgeon for quantization (Hassibi and Stork 1992; Frantar, Singh and Alistarh, "Optimal brain
compression", NeurIPS 2022, section 5), in one order of columns for all rows (Frantar et al., "GPTQ", ICLR
2023). Two things are added. What a weight takes in the file counts beside its error, as in
entropy-constrained quantization (Chou, Lookabaugh and Gray 1989). And the bias is a column as well, whose
input is always 1: it is never rounded, so it makes up for what is left at the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt_cli.methods.walk import Span, damped, inverse_factor

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
