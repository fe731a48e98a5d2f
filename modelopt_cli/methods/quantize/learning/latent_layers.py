"""Layers that compute in float32 what int8 layers compute, and that can be trained.

Every weight is a *latent* one, which the optimizer moves as it likes; the layer computes with the nearest
int8 weight (Jacob et al., CVPR 2018, section 3; see ``fake_quantize``).

A layer whose batch norm was folded may have one again while it learns (see ``latent_norms``). In evaluation
mode the norm is part of the weight's scales and of the bias, as it will be in the int8 layer: integers stay.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelopt_cli.methods.quantize.learning.fake_quantize import (
    RoundedWeight,
    StepSize,
    fake_quantize_dynamic,
    multiple,
    nearest_steps,
)
from modelopt_cli.program.quantization import ACTIVATIONS, BITS, SMALLEST_SCALE, QParams
from modelopt_cli.program.quantized_convolutions import stacked, transposed_convolution, turned


class LatentNorm(nn.Module):
    """A batch norm whose factors are positive, so that it can become part of scales.

    Args:
        mean: ``(O,)``; it takes it away and puts it back, so that it changes nothing at the start.
        variance: ``(O,)``, likewise.
        eps: as in ``nn.BatchNorm2d``.
        momentum: likewise.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, mean: Tensor, variance: Tensor, eps: float, momentum: float) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight, self.bias = nn.Parameter(torch.sqrt(variance + eps)), nn.Parameter(mean.clone())
        self.register_buffer("running_mean", mean.clone())
        self.register_buffer("running_var", variance.clone())

    def forward(self, y: Tensor) -> Tensor:
        learned = (self.weight.abs(), self.bias)
        return F.batch_norm(
            y, self.running_mean, self.running_var, *learned, self.training, self.momentum, self.eps
        )


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

    Attributes:
        growth: logarithm of the weight's step sizes as multiples of ``scale``, ``(O,)``; it learns. A scalar,
            which stays, of weights with several scales for each output.
        rounding: of the result; None where it stays float32.
        norm: batch norm of the sums, or None.
    """

    weight: Tensor
    bias: Any
    scale: Tensor
    zero: Tensor | None
    growth: nn.Parameter
    form: LatentForm
    rounding: StepSize | None
    norm: LatentNorm | None

    def _adopt(self, like: Any, weight: Tensor, scale: Tensor, form: LatentForm) -> None:
        self.weight = nn.Parameter(weight.detach().clone())
        bias = getattr(like, "bias", None)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("zero", None)  # of a weight with zero points, which follow
        self.growth = nn.Parameter(torch.zeros(scale.shape if scale.dim() == 1 else ()))
        self.rounding = None if form.output is None else StepSize(form.output)
        self.norm = None
        self.form = form

    def turned(self, weight: Tensor) -> Tensor:
        """The weight with its output channels first, and back; as ``Weighted.turned``."""
        return weight

    @torch.no_grad()
    def nearest(self) -> Tensor:
        """The integers of the weight, float32, output channels first, relative to zero points."""
        form, step = self.form, self.scale * multiple(self.growth)
        return nearest_steps(self.turned(self.weight), step, form.bounded, form.weight_bits, self.zero)

    def steps(self) -> Tensor:
        """The int8 weight as it is now."""
        return self.turned(self.nearest()).to(torch.int8)

    def rounded(self) -> Tensor:
        """The float32 values of the int8 weight, without the batch norm."""
        latent, form = self.turned(self.weight), self.form
        weight: Tensor = RoundedWeight.apply(  # type: ignore[no-untyped-call]
            latent, self.growth, self.scale, form.bounded, form.weight_bits, self.zero
        )
        return self.turned(weight)

    @torch.no_grad()
    def settled(self) -> tuple[Tensor, Any]:
        """Scales ``(O,)`` and bias of the int8 layer as it is now, the batch norm folded into both."""
        scale, norm = self.scale * multiple(self.growth), self.norm
        if norm is None:
            return scale, None if self.bias is None else self.bias.detach()
        factor = norm.weight.abs() / torch.sqrt(norm.running_var + norm.eps)
        shifted = (self.bias - norm.running_mean) * factor + norm.bias
        return (scale * factor).clamp_(min=SMALLEST_SCALE), shifted

    def _product(self, product: Callable[[Tensor, Any], Tensor]) -> Tensor:
        """Sums of the layer, normalised where it has a batch norm.

        Args:
            product: computes them of a weight and a bias.
        """
        if self.norm is None:
            return product(self.rounded(), self.bias)
        if self.norm.training:
            normalised: Tensor = self.norm(product(self.rounded(), self.bias))
            return normalised
        scale, bias = self.settled()
        steps = self.nearest()
        return product(self.turned(steps * scale.view(-1, *[1] * (steps.dim() - 1))), bias)

    def _finish(self, y: Tensor) -> Tensor:
        y = ACTIVATIONS[self.form.activation](y)
        return y if self.rounding is None else self.rounding(y)


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
        y = self._product(partial(self._conv_forward, input))
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
        return self._finish(self._product(partial(transposed_convolution, self, input)))


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
        return self._finish(self._product(partial(F.linear, x)))


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
