"""Biases corrected by the errors of the weights and the means of their inputs, without data."""

from typing import TYPE_CHECKING, Any

import torch

from modelopt_cli.errors import UsageError
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.quantize.equalizing.bias_correction import correctable
from modelopt_cli.methods.quantize.equalizing.channel_normals import (
    MULTIPLYING,
    by_channel,
    channel_normals,
    reads_channels,
)
from modelopt_cli.program import Program
from modelopt_cli.program.calls import source
from modelopt_cli.program.shapes import program_values
from modelopt_cli.settings import option

if TYPE_CHECKING:
    from modelopt_cli.methods.quantize.static import Calibrated


def correct_by_norms(integer: Program, ready: "Calibrated", context: Context) -> None:
    """Take from each bias what rounding the weight adds to the mean of the layer's outputs.

    That is the error of the weight times the mean of the input (Nagel et al., ICCV 2019, equation 16), which
    is known where batch norms tell it; other layers keep their biases.

    Args:
        integer: the int8 form of ``ready.program``; its biases are changed.
        ready: what it was made of.
        context: is not used.

    Raises:
        UsageError: the mean of no layer's input is known.
    """
    normals = channel_normals(ready.program, ready.normals)
    shapes = program_values(ready.program, 2)
    corrected = 0
    for name, unit in correctable(integer, ready).items():
        layer: Any = ready.program.get_submodule(name)
        read = source(unit.head)
        normal = normals.get(read)
        if normal is None or not isinstance(layer, MULTIPLYING):
            continue
        if not reads_channels(layer, tuple(shapes[read].shape), normal):
            continue
        rounded: Any = integer.get_submodule(name)
        error = rounded.float_weight().double() - layer.weight.detach().double()
        with torch.no_grad():
            rounded.bias -= by_channel(error, normal.mean, getattr(layer, "groups", 1)).float()
        corrected += 1
    if not corrected:
        problem = "no batch norm tells the mean of any layer's input"
        hint = "use another rule, or none"
        raise UsageError(problem, where=option("bias_correction"), hint=hint)
