"""Error compensation: centroids chosen one column after the other, later columns making up for the error.

Optimal brain surgeon for quantization (Hassibi and Stork 1992; Frantar, Singh and Alistarh, "Optimal brain
compression", NeurIPS 2022, section 5), in one order of columns for all rows (Frantar et al., "GPTQ", ICLR
2023). Two things are added. The bits that a weight takes in the file count next to its error, as in
entropy-constrained quantization (Chou, Lookabaugh and Gray 1989). And the bias is a column as well, whose
input is always 1: it is never rounded, so it makes up for the error left at the end.

Layers are taken in call order, each on inputs that went through the layers compressed before it.
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
from modelopt_cli.methods.share.choices import NO_DATA
from modelopt_cli.program import Program
from modelopt_cli.settings import option

_REGULAR = 1e-3
"""Addition to the diagonal on top of shrinking, as a fraction of its mean."""
BLOCK = 128
"""Columns after which the update of all later columns is carried out."""


@dataclass(frozen=True)
class Levels:
    """The values that weights may take.

    Attributes:
        values: float64 ``(K,)``, or ``(groups, rows, K)`` where rows have codebooks of their own.
        costs: of each, next to its squared error in the layer's outputs; of the values' shape or ``(K,)``.
        zero: index of the level that pruned weights have; ``(groups, rows)`` where that differs.
    """

    values: Tensor
    costs: Tensor
    zero: Tensor | int = 0


@dataclass(frozen=True)
class Curvature:
    """The effect of errors in a layer's columns on its outputs.

    Attributes:
        factors: for each span ``U`` with ``U^T U = H^-1``, ``(groups, width, width)``.
        spans: the columns of each.
    """

    factors: tuple[Tensor, ...]
    spans: tuple[Span, ...]

    @classmethod
    def of(
        cls, moments: Sequence[Tensor], spans: Sequence[Span], samples: int, *, constant: bool = False
    ) -> "Curvature":
        """The curvature from the second moments of a layer's inputs.

        Args:
            moments: of each span, summed over samples and positions, ``(groups, width, width)``.
            spans: columns that share one.
            samples: number of samples: the fewer, the less their correlations are believed.
            constant: the last column is the bias'.
        """
        last = len(moments) - 1
        factors = []
        for i, part in enumerate(moments):
            believed = shrink_correlations(part, samples, constant=constant and i == last)
            factors.append(inverse_factor(damped(believed, _REGULAR)))
        return cls(tuple(factors), tuple(spans))

    def importance(self, columns: int) -> Tensor:
        """The cost of each column's squared error once the later columns have made up for it.

        Float64 ``(groups, columns)``, without the bias' column.
        """
        diagonals = [factor.diagonal(dim1=-2, dim2=-1) for factor in self.factors]
        return 1 / torch.cat(diagonals, -1)[..., :columns].square()


def shrink_correlations(moments: Tensor, samples: int, *, constant: bool = False) -> Tensor:
    """Second moments whose correlations are as far from none as so many samples show.

    The oracle approximating shrinkage of Chen, Wiesel, Eldar and Hero ("Shrinkage algorithms for MMSE
    covariance estimation", IEEE Transactions on Signal Processing, 2010, equation 23), applied to
    correlations as Schäfer and Strimmer (2005) do, which leaves the variances alone. Positions of one
    sample count together as one observation: they are far from independent. Means, which the bias makes up
    for, are believed.

    Args:
        moments: ``(groups, n, n)``, sums over positions.
        samples: number of samples.
        constant: the last column stands for the constant 1; the others are then centred first.
    """
    if constant:
        count = moments[..., -1:, -1:]
        sums = moments[..., :-1, -1:]
        outer = sums @ sums.mT / count
        inner = shrink_correlations(moments[..., :-1, :-1] - outer, samples) + outer
        return torch.cat((torch.cat((inner, sums), -1), moments[..., -1:, :]), -2)
    scale = moments.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    spread = scale.unsqueeze(-1) * scale.unsqueeze(-2)
    # Columns that were always zero have no correlation, and are not counted as dimensions.
    live = (scale > 0).sum(-1).clamp(min=1).double()
    correlation = torch.where(spread > 0, moments / spread.clamp(min=1e-300), 0.0)
    square = correlation.square().sum((-1, -2))
    excess = (samples + 1 - 2 / live) * (square - live)
    part = ((1 - 2 / live) * square + live.square()) / excess.clamp(min=1e-300)
    part = torch.where(excess > 0, part.clamp(0, 1), 1.0)[..., None, None]
    return (1 - part) * moments + part * torch.diag_embed(moments.diagonal(dim1=-2, dim2=-1))


def compensated(
    weight: Tensor, bias: Tensor | None, curvature: Curvature, levels: Levels, unpruned: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The level of every weight, and the bias that goes with them.

    Args:
        weight: ``(groups, rows, columns)``.
        bias: ``(groups, rows)``, if the curvature has a column for it.
        curvature: of the layer.
        levels: to choose from.
        unpruned: False where a weight is pruned, and takes the level ``zero``.

    Returns:
        int64 indices of the weight's shape, and the new bias.
    """
    columns = weight.shape[-1]
    # Weights as they should be by now: each later column takes its part of the errors made so far.
    target = weight.detach().double()
    target = target.clone() if bias is None else torch.cat((target, bias.detach().double().unsqueeze(-1)), -1)
    chosen = torch.zeros(weight.shape, dtype=torch.int64)
    for (start, stop), factor in zip(curvature.spans, curvature.factors, strict=True):
        end = min(stop, columns)
        for first in range(start, end, BLOCK):
            last = min(first + BLOCK, end)
            errors = torch.zeros_like(target[..., first:last])
            for column in range(first, last):
                j = column - start
                value, scale = target[..., column].clone(), factor[:, j, j].unsqueeze(-1)
                pruned = None if unpruned is None else ~unpruned[..., column]
                index = _cheapest(value, scale, levels, pruned)
                chosen[..., column] = index
                # The least-squares solution of the later columns to this error is a row of the factor.
                error = (value - _values(levels.values, index)) / scale
                errors[..., column - first] = error
                target[..., column:last] -= error.unsqueeze(-1) * factor[:, j : j + 1, j : last - start]
            # All later columns at once: one matrix product in place of BLOCK narrow ones.
            inside = factor[:, first - start : last - start, last - start :]
            target[..., last:stop] -= errors @ inside
    return chosen, None if bias is None else target[..., columns]


def _cheapest(value: Tensor, scale: Tensor, levels: Levels, pruned: Tensor | None) -> Tensor:
    """The level of least error and cost for one weight of each row."""
    cost = ((value.unsqueeze(-1) - levels.values) / scale.unsqueeze(-1)).square_().add_(levels.costs)
    index = cost.argmin(-1)
    return index if pruned is None else torch.where(pruned, levels.zero, index)


def _values(values: Tensor, index: Tensor) -> Tensor:
    if values.dim() == 1:
        return values[index]
    return values.gather(-1, index.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class CalibratedLayer:
    """A layer whose inputs are known.

    Attributes:
        parameter: the name of its weight.
        module: the layer itself; its weight may be changed.
        moments: second moments of its inputs, summed over samples, for each span of its columns, on the
            CPU like all that is computed from them.
        columns: the spans, and a last column for the bias or not.
        samples: number of samples looked at.
    """

    parameter: str
    module: Any
    moments: list[Tensor]
    columns: Columns
    samples: int

    @property
    def weight(self) -> Tensor:
        """``(groups, rows, columns)``, float64."""
        return to_matrices(self.module, self.module.weight.detach()).double().cpu()

    @property
    def bias(self) -> Tensor | None:
        """``(groups, rows)``, float64, if the columns have one for it."""
        if not self.columns.constant:
            return None
        bias: Tensor = self.module.bias.detach().double().cpu()
        return bias.view(getattr(self.module, "groups", 1), -1)

    def curvature(self) -> Curvature:
        """The effect of errors in its weight on its outputs."""
        spans, constant = self.columns.spans, self.columns.constant
        return Curvature.of(self.moments, spans, self.samples, constant=constant)

    def importance(self, curvature: Curvature) -> Tensor:
        """The cost of each weight's squared error, float32 of the weight's shape."""
        groups, rows, count = self.weight.shape
        spread = curvature.importance(count).unsqueeze(1).expand(groups, rows, count)
        return from_matrices(self.module, spread).float()

    def choose(
        self, curvature: Curvature, levels: Levels, unpruned: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The level of each weight, int64 of the weight's shape, and the bias that goes with it."""
        mask = None if unpruned is None else to_matrices(self.module, unpruned)
        index, bias = compensated(self.weight, self.bias, curvature, levels, mask)
        return from_matrices(self.module, index), bias

    def error(self, change: Tensor) -> float:
        """The squared error of the outputs, summed over samples, with the bias that makes it least.

        Args:
            change: of the weight, of its shape.
        """
        moved = to_matrices(self.module, change).double()
        total, count = 0.0, moved.shape[-1]
        for (start, stop), moments in zip(self.columns.spans, self.moments, strict=True):
            part = moved[..., start : min(stop, count)]
            if stop > count:  # the bias' column is here: the mean error is its to take away
                mean = moments[..., -1:, :-1]
                moments = moments[..., :-1, :-1] - mean.mT @ mean / moments[..., -1:, -1:]
            total += float(((part @ moments) * part).sum())
        return total

    def bias_shift(self, change: Tensor) -> Tensor | None:
        """The change of the bias ``(O,)`` that keeps the mean of the outputs; None if it is not known.

        Args:
            change: of the weight, of its shape.
        """
        if not self.columns.constant or len(self.columns.spans) > 1:
            return None
        mean = self.moments[0][..., :-1, -1:] / self.moments[0][..., -1:, -1:]
        return -(to_matrices(self.module, change).double() @ mean).flatten()


def watchable(program: Program, names: Iterable[str]) -> list[str]:
    """Weights whose inputs can be watched."""
    return [name for name in names if unseen_inputs(program, name) is None]


def calibrated_layers(
    network: Program, names: Iterable[str], context: Context, samples: int
) -> Iterator[CalibratedLayer]:
    """Layers in call order, with their inputs through the layers before as they are by then.

    Args:
        network: on the context's device, in evaluation mode; its weights may be changed on the way.
        names: of weights whose inputs can be watched.
        context: data, seed, batch size, progress.
        samples: most samples to look at.

    Raises:
        UsageError: no data.
        DataError: no samples, or the network gives no finite numbers on them.
    """
    alternative = option("weighting", NO_DATA)
    data = calibration_data(context, "error compensation", samples, alternative)
    by_layer = layers_in_call_order(network, names, alternative)
    columns = {layer: _columns(network.get_submodule(layer)) for layer in by_layer}
    for layer, moments in hessians(LayerPass(network, data, context), by_layer, columns):
        module, on_cpu = network.get_submodule(layer), [moment.cpu() for moment in moments]
        yield CalibratedLayer(by_layer[layer], module, on_cpu, columns[layer], data.size or samples)


def _columns(module: nn.Module) -> Columns:
    count = to_matrices(module, module.get_parameter("weight")).shape[-1]
    return Columns(count, constant=getattr(module, "bias", None) is not None)


def set_values(module: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Give a layer another weight and, unless None, another bias."""
    with torch.no_grad():
        module.get_parameter("weight").copy_(weight)
        if bias is not None:
            module.get_parameter("bias").copy_(bias.flatten())
