"""Layers that compute in float32 what int8 layers compute, and that can be trained.

Every weight is a *latent* one, which the optimizer moves as it likes; the layer computes with the nearest
int8 weight (Jacob et al., CVPR 2018, section 3; see ``fake_quantize``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelopt_cli.methods.quantize.fake_quantize import (
    RoundedWeight,
    fake_quantize,
    fake_quantize_dynamic,
    nearest_steps,
)
from modelopt_cli.program.quantization import ACTIVATIONS, BITS, QParams
from modelopt_cli.program.quantized_convolutions import stacked, transposed_convolution, turned


@dataclass(frozen=True)
class LatentForm:
    """Rounding of a layer's weight, its input and its result.

    Attributes:
        bounded: the pair bound holds for the weight.
        dynamic: the input is rounded first, by its own range.
        activation: a key of ``ACTIVATIONS``, applied to the result.
        output: of the uint8 result; None where it stays float32.
        weight_bits: of the weight's integers.
        input_bits: of a dynamic input's.
    """

    bounded: bool
    dynamic: bool = False
    activation: str = "none"
    output: QParams | None = None
    weight_bits: int = BITS
    input_bits: int = BITS


class Latent(nn.Module):
    """A layer that computes with the int8 form of its weight; see the module.

    Its tensors are called as those of the int8 layer: ``weight`` and ``bias``, which learn, and ``scale``.
    """

    weight: Tensor
    bias: Any
    scale: Tensor
    zero: Tensor | None
    form: LatentForm

    def _adopt(self, like: Any, weight: Tensor, scale: Tensor, form: LatentForm) -> None:
        self.weight = nn.Parameter(weight.detach().clone())
        bias = getattr(like, "bias", None)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("zero", None)  # of a weight with zero points, which follow
        self.form = form

    def turned(self, weight: Tensor) -> Tensor:
        """The weight with its output channels first, and back; as ``Weighted.turned``."""
        return weight

    @torch.no_grad()
    def steps(self) -> Tensor:
        """The int8 weight as it is now."""
        form = self.form
        steps = nearest_steps(self.turned(self.weight), self.scale, form.bounded, form.weight_bits)
        return self.turned(steps).to(torch.int8)

    def rounded(self) -> Tensor:
        """The float32 values of the int8 weight."""
        latent, form = self.turned(self.weight), self.form
        weight: Tensor = RoundedWeight.apply(  # type: ignore[no-untyped-call]
            latent, self.scale, form.bounded, form.weight_bits, self.zero
        )
        return self.turned(weight)

    def _finish(self, y: Tensor) -> Tensor:
        y = ACTIVATIONS[self.form.activation](y)
        return y if self.form.output is None else fake_quantize(y, self.form.output)


class LatentConvolution(Latent):
    """A convolution; a second input is added to its result before the activation.

    Args:
        like: has its geometry and bias.
        weight: float32 ``(O, C / groups, ...)``.
        scale: of the weight's steps, float32 ``(O,)``.
        form: the rest.
    """

    kind: ClassVar[Any]
    _conv_forward: Callable[..., Tensor]

    def __init__(self, like: Any, weight: Tensor, scale: Tensor, form: LatentForm) -> None:
        with torch.device("meta"):  # draws no random numbers
            self.kind.__init__(
                self,
                *(like.in_channels, like.out_channels, like.kernel_size),
                *(like.stride, like.padding, like.dilation, like.groups),
                bias=like.bias is not None,
                padding_mode=getattr(like, "padding_mode", "zeros"),
            )
        self._adopt(like, weight, scale, form)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self._conv_forward(input, self.rounded(), self.bias)
        return self._finish(y if residual is None else y + residual)


class LatentConv1d(LatentConvolution, nn.Conv1d):
    """A 1-D convolution."""

    kind = nn.Conv1d


class LatentConv2d(LatentConvolution, nn.Conv2d):
    """A 2-D convolution."""

    kind = nn.Conv2d


class LatentConv3d(LatentConvolution, nn.Conv3d):
    """A 3-D convolution."""

    kind = nn.Conv3d

    def turned(self, weight: Tensor) -> Tensor:
        return stacked(weight, self.kernel_size[0])


class LatentTransposed(Latent):
    """A transposed convolution.

    Args:
        like: has its geometry and bias.
        weight: float32 ``(C, O / groups, ...)``.
        scale: of the weight's steps, float32 ``(O,)``.
        form: the rest.
    """

    kind: ClassVar[Any]
    groups: int

    def __init__(self, like: Any, weight: Tensor, scale: Tensor, form: LatentForm) -> None:
        with torch.device("meta"):
            self.kind.__init__(
                self,
                *(like.in_channels, like.out_channels, like.kernel_size, like.stride, like.padding),
                *(like.output_padding, like.groups, like.bias is not None, like.dilation),
            )
        self._adopt(like, weight, scale, form)

    def turned(self, weight: Tensor) -> Tensor:
        return turned(weight, self.groups)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return self._finish(transposed_convolution(self, input, self.rounded(), self.bias))


class LatentConvTranspose1d(LatentTransposed, nn.ConvTranspose1d):
    """A transposed 1-D convolution."""

    kind = nn.ConvTranspose1d


class LatentConvTranspose2d(LatentTransposed, nn.ConvTranspose2d):
    """A transposed 2-D convolution."""

    kind = nn.ConvTranspose2d


class LatentLinear(Latent, nn.Linear):
    """A linear layer.

    Args:
        like: has its sizes and bias.
        weight: float32 ``(O, C)``.
        scale: of the weight's steps, float32 ``(O,)``.
        form: the rest.
    """

    def __init__(self, like: Any, weight: Tensor, scale: Tensor, form: LatentForm) -> None:
        with torch.device("meta"):
            nn.Linear.__init__(self, like.in_features, like.out_features, bias=like.bias is not None)
        self._adopt(like, weight, scale, form)

    def forward(self, input: Tensor) -> Tensor:
        x = fake_quantize_dynamic(input, self.form.input_bits) if self.form.dynamic else input
        return self._finish(F.linear(x, self.rounded(), self.bias))


class LatentEmbedding(Latent, nn.Embedding):
    """An embedding.

    Args:
        like: has its sizes.
        weight: float32 ``(V, E)``.
        scale: of the steps of each row, float32 ``(V,)``.
        form: the rest.
    """

    def __init__(self, like: Any, weight: Tensor, scale: Tensor, form: LatentForm) -> None:
        with torch.device("meta"):
            nn.Embedding.__init__(self, like.num_embeddings, like.embedding_dim)
        self._adopt(like, weight, scale, form)

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.rounded())
