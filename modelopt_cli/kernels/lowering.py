"""Other convolutions as 2-D ones of the same integers, so that each backend needs one kernel for all."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modelopt_cli.program.quantized_convolutions import (
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConvolution,
)


@dataclass(frozen=True)
class Lowered:
    """A 2-D convolution that computes what another layer does.

    Attributes:
        conv: the convolution.
        before: makes its input, and its residual, of the layer's.
        after: makes the layer's output of its own.
    """

    conv: QuantizedConv2d
    before: Callable[[Tensor], Tensor]
    after: Callable[[Tensor], Tensor]

    def around(self, kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The layer's kernel, of the kernel of the 2-D convolution."""
        before, after = self.before, self.after
        return lambda *args: after(kernel(*map(before, args)))


def _conv2d(layer: QuantizedConvolution, weight: Tensor, **windows: Any) -> QuantizedConv2d:
    """A 2-D convolution with a layer's scales, bias and activation, and these windows and weight."""
    kept = ("in_channels", "out_channels", "groups", "has_bias", "input", "output", "activation", "residual")
    options: dict[str, Any] = {name: getattr(layer, name) for name in kept}
    with torch.device("meta"):
        conv = QuantizedConv2d(**options, **windows)
    conv._buffers = {**layer._buffers, "weight": weight}
    return conv


def _of_rows(layer: QuantizedConv1d) -> Lowered:
    """Rows as images of height 1; nothing is copied."""
    windows = {name: (1, *getattr(layer, name)) for name in ("kernel_size", "stride", "dilation")}
    conv = _conv2d(layer, layer.weight.unsqueeze(2), **windows, padding=(0, *layer.padding))
    return Lowered(conv, lambda x: x.unsqueeze(2), lambda y: y.squeeze(2))


LOWERINGS: dict[type, Callable[[Any], Lowered]] = {QuantizedConv1d: _of_rows}
"""Class of a layer to its form as a 2-D convolution."""
