"""GPTQ for weights that are stored as integers and computed in floating point, as in the paper.

Groups of inputs with scales of their own and zero points stay those of the nearest integers; see ``gptq``.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from modelopt_cli.data import Data
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.layer_pass import Columns, LayerPass, hessians
from modelopt_cli.methods.matrices import from_matrices, to_matrices, unseen_inputs
from modelopt_cli.methods.quantize.stored_weights import WeightSteps, encode_weight
from modelopt_cli.methods.quantize.weight_rounding.gptq import ColumnGrid, rounded_columns, width_of
from modelopt_cli.program import Encoding, Program


def compensate(program: Program, steps: Mapping[str, WeightSteps], data: Data, context: Context) -> None:
    """Put weights onto integer steps, in place, and say so in the Program's encodings.

    Weights whose inputs cannot be watched are left as they are.

    Args:
        program: in evaluation mode; inputs go through the layers that are done.
        steps: of each weight, by parameter name.
        data: samples to look at.
        context: batch size, progress.

    Raises:
        DataError: there are no samples, or the network gives no finite numbers on them.
    """
    watched = {name.rpartition(".")[0]: name for name in steps if unseen_inputs(program, name) is None}
    columns = {layer: Columns(width_of(program.get_submodule(layer))) for layer in watched}
    for layer, moments in hessians(LayerPass(program, data, context), watched, columns):
        name, module = watched[layer], program.get_submodule(layer)
        weight = module.get_parameter("weight")
        _, encoding = encode_weight(weight.detach(), steps[name])
        scale, zero = (_of_each(encoding, part, weight) for part in ("scale", "zero_point"))
        assert scale is not None
        half = 1 << steps[name].bits - 1
        low = -half if zero is not None or steps[name].bits < 8 else 1 - half
        grid = ColumnGrid(
            to_matrices(module, scale.double()),
            None if zero is None else to_matrices(module, zero.double()),
            (low, half - 1),
        )
        matrices = to_matrices(module, weight.detach().double())
        integers = from_matrices(module, rounded_columns(matrices, moments, columns[layer].spans, grid))
        relative = integers if zero is None else integers - zero
        with torch.no_grad():
            weight.copy_((relative.float() * scale).to(weight.dtype))
        program.encodings[name] = Encoding(
            encoding.codec, encoding.params, encoding.parts, integers.to(torch.int8)
        )


def _of_each(encoding: Encoding, part: str, weight: Tensor) -> Tensor | None:
    """The scale or zero point of each weight, float32 of its shape; None where there is none."""
    numbers = encoding.parts.get(part)
    if numbers is None:
        return None
    if (group := encoding.params["group"]) is None:
        return numbers.float().view(-1, *[1] * (weight.dim() - 1)).expand(weight.shape)
    return numbers.float().repeat_interleave(group, 1)[:, : weight.shape[1]]
