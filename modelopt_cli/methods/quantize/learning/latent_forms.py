"""The forms of layers in training: latent ones of those with integers, real operations of int8 ones."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_cli.artifact.encodings import channel_steps, spread_steps
from modelopt_cli.kernels.saturation import is_depthwise
from modelopt_cli.methods.quantize.learning.fake_quantize import FakeQuantized, Real
from modelopt_cli.methods.quantize.learning.latent_layers import (
    Latent,
    LatentConv1d,
    LatentConv2d,
    LatentConv3d,
    LatentConvTranspose1d,
    LatentConvTranspose2d,
    LatentEmbedding,
    LatentForm,
    LatentLinear,
)
from modelopt_cli.program import Encoding
from modelopt_cli.program.quantization import BITS
from modelopt_cli.program.quantized import Quantized, Weighted
from modelopt_cli.program.quantized_convolutions import (
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedConvTranspose1d,
    QuantizedConvTranspose2d,
)
from modelopt_cli.program.quantized_embedding import QuantizedEmbedding
from modelopt_cli.program.quantized_linear import DynamicLinear, QuantizedLinear
from modelopt_cli.program.quantized_operations import (
    Dequantize,
    Quantize,
    QuantizedAdd,
    QuantizedAvgPool,
    QuantizedMaxPool,
    QuantizedMul,
)
from modelopt_cli.program.quantized_recurrent import QuantizedRecurrent

_MAX_POOLS: dict[int, Any] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}


def trained_form(layer: nn.Module, encoding: Encoding | None) -> nn.Module | None:
    """The form of a layer in training; None where it is trained as it is."""
    if isinstance(layer, Weighted):
        return _weighted(layer)
    if isinstance(layer, QuantizedRecurrent):  # its linear layers are trained
        return None
    if isinstance(layer, Quantized):
        return _unweighted(layer)
    return _stored(layer, encoding)


def _weighted(layer: Weighted) -> Latent:
    form = LatentForm(
        bounded=not is_depthwise(tuple(layer.turned(layer.weight).shape), getattr(layer, "groups", 1)),
        dynamic=isinstance(layer, DynamicLinear),
        activation=layer.activation,
        output=layer.output,
        weight_bits=layer.weight_bits,
        input_bits=layer.activation_bits or BITS,
    )
    return _LATENT[type(layer)](layer, layer.float_weight(), layer.scale, form)


_LATENT: dict[type[nn.Module], Callable[..., Latent]] = {
    **dict.fromkeys((nn.Conv1d, QuantizedConv1d), LatentConv1d),
    **dict.fromkeys((nn.Conv2d, QuantizedConv2d), LatentConv2d),
    QuantizedConv3d: LatentConv3d,
    QuantizedConvTranspose1d: LatentConvTranspose1d,
    QuantizedConvTranspose2d: LatentConvTranspose2d,
    **dict.fromkeys((nn.Linear, QuantizedLinear, DynamicLinear), LatentLinear),
    QuantizedEmbedding: LatentEmbedding,
}
"""Class of a layer, float or int8, to the class that is trained in its place."""


def _unweighted(layer: Quantized) -> nn.Module:
    if isinstance(layer, QuantizedMaxPool):
        windows = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        pool: nn.Module = _MAX_POOLS[layer.rank](*windows, ceil_mode=layer.ceil_mode)
        return pool
    if isinstance(layer, Dequantize):
        return Real()
    assert isinstance(layer, Quantize | QuantizedAdd | QuantizedMul | QuantizedAvgPool)
    return FakeQuantized(layer.real, layer.output)


def _stored(layer: nn.Module, encoding: Encoding | None) -> nn.Module | None:
    """The form of a float layer whose weight is stored as integers."""
    weight = getattr(layer, "weight", None)
    steps = spread_steps(encoding, tuple(weight.shape)) if isinstance(weight, Tensor) else None
    if steps is None:
        return None
    latent = _LATENT.get(type(layer))
    if latent is None or layer.weight.dtype != torch.float32:
        return None
    one_a_channel = channel_steps(encoding)
    scale = steps.scale if one_a_channel is None else one_a_channel[0].float().flatten()
    form = latent(layer, layer.weight, scale, LatentForm(bounded=False, weight_bits=steps.bits))
    form.zero = steps.zero_point
    return form
