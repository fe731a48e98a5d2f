"""GPTQ: weights rounded column by column, later columns making up for the error of earlier ones.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR
2023, algorithm 1: the Hessian of a layer's squared output error is that of its inputs, here those from the
integer network so far. A convolution multiplies patches of its input; each of its groups has its own.
Columns with the largest inputs come first, as in the authors' own code (``--act-order``).
"""

import torch
from torch import Tensor, nn

from modelopt_cli.methods.layer_pass import Columns, LayerPass, damped, hessians, inverse_factor
from modelopt_cli.methods.matrices import from_matrices, to_matrices
from modelopt_cli.methods.quantize.rounding_problem import Rounded, RoundedLayer, RoundingProblem
from modelopt_cli.methods.quantize.simulation import set_weight, simulate
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
    columns = {name: Columns(_width(network.get_submodule(name))) for name in free}
    known = {}
    for name, moments in hessians(LayerPass(network, problem.data, problem.context), free, columns):
        layer, module = problem.layers[name], network.get_submodule(name)
        grid = layer.grid
        weight = to_matrices(module, layer.form.turned(grid.weight)).double()
        spread = to_matrices(module, layer.form.turned(grid.spread.expand_as(grid.weight)))[..., :1].double()
        parts = [
            rounded_columns(weight[..., start:stop] / spread, hessian, grid.bits)
            for (start, stop), hessian in zip(columns[name].spans, moments, strict=True)
        ]
        steps = layer.form.turned(from_matrices(module, torch.cat(parts, -1)).float())
        steps = grid.settled(torch.where(grid.weight == 0, 0.0, steps))
        set_weight(module, layer.real(steps))
        known[name] = RoundedLayer(steps.to(torch.int8), grid.scale)
    return Rounded(known, problem.qparams)


def _width(module: nn.Module) -> int:
    return to_matrices(module, module.get_parameter("weight")).shape[-1]


def rounded_columns(weight: Tensor, hessian: Tensor, bits: int) -> Tensor:
    """Whole numbers for weights in steps, such that the outputs change little.

    Args:
        weight: in steps of each row, float64 ``(groups, rows, columns)``.
        hessian: X^T X of the inputs of the columns, float64 ``(groups, columns, columns)``.
        bits: of the integers.

    Returns:
        float64 of the weight's shape.
    """
    limits = weight_limits(bits)
    order = hessian.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    by_row = order.unsqueeze(1).expand_as(weight)
    sorted_hessian = hessian.gather(1, order.unsqueeze(2).expand_as(hessian))
    sorted_hessian = sorted_hessian.gather(2, order.unsqueeze(1).expand_as(hessian))
    factor = inverse_factor(damped(sorted_hessian))
    target, count = weight.gather(-1, by_row), weight.shape[-1]
    zero = target == 0  # what is pruned stays so
    chosen = torch.zeros_like(target)
    for first in range(0, count, COLUMNS):
        last = min(first + COLUMNS, count)
        errors = torch.zeros_like(target[..., first:last])
        for j in range(first, last):
            nearest = target[..., j].round().clamp(*limits)
            chosen[..., j] = nearest.masked_fill(zero[..., j], 0)
            error = (target[..., j] - chosen[..., j]) / factor[:, j, j].unsqueeze(-1)
            target[..., j:last] -= error.unsqueeze(-1) * factor[:, j, j:last].unsqueeze(1)
            errors[..., j - first] = error
        target[..., last:] -= errors @ factor[:, first:last, last:]
    return torch.zeros_like(chosen).scatter(-1, by_row, chosen)
