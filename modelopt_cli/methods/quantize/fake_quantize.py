"""Fake quantization: rounding in float32 to the values that int8 layers compute with, which can be trained.

Where an int8 layer passes a uint8 tensor on, the real values that it stands for are passed on (Jacob et al.,
"Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018,
section 3). Rounding has no useful derivative, so gradients pass it as if it were not there
(Y. Bengio, N. Leonard and A. Courville, "Estimating or Propagating Gradients Through Stochastic Neurons for
Conditional Computation", 2013); clipping has one.

Scales and zero points stay. Those of activations were fitted to data and those of weights to the weights, and
with 255 steps little is gained by training them, too (S. Esser et al., "Learned Step Size Quantization", ICLR
2020, is about 2 to 4 bits). So training starts from exactly the int8 network that was given.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_cli.methods.quantize.rounding import within_bound
from modelopt_cli.program.quantization import BITS, NotFiniteError, QParams, dynamic_qparams, weight_limits


class _RoundedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, q: QParams) -> Tensor:
        # Step by step as quantize and dequantize, so that the same values come out.
        steps = x.mul(1.0 / q.scale).round_().add_(q.zero_point)
        ctx.save_for_backward((steps >= 0) & (steps <= q.top))
        return steps.clamp_(0, q.top).sub_(q.zero_point).mul_(q.scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None


class RoundedWeight(torch.autograd.Function):
    """The float32 values of the int8 weight nearest to a latent one."""

    @staticmethod
    def forward(
        ctx: Any, latent: Tensor, scale: Tensor, bounded: bool, bits: int, zero: Tensor | None = None
    ) -> Tensor:
        q = nearest_steps(latent, scale, bounded, bits, zero)
        spread = _spread(scale, latent)
        ctx.save_for_backward(latent, (latent / spread).round_() != q)
        return q.mul_(spread)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        latent, beyond = ctx.saved_tensors
        # A latent weight beyond what int8 can follow may come back, but go no further.
        return grads[0].masked_fill(beyond & (grads[0] * latent < 0), 0), None, None, None, None


def fake_quantize(x: Tensor, q: QParams) -> Tensor:
    """Round ``x`` to the float32 values of its uint8 form; outside its range there is no gradient."""
    rounded: Tensor = _RoundedActivation.apply(x.float(), q)  # type: ignore[no-untyped-call]
    return rounded


def fake_quantize_dynamic(x: Tensor, bits: int = BITS) -> Tensor:
    """Round ``x`` to so many bits by its own range; a value that is not finite leaves all as they are."""
    if x.is_meta:  # only shapes are asked for
        return x
    try:
        return fake_quantize(x, dynamic_qparams(x.detach(), bits))
    except NotFiniteError:
        return x


def nearest_steps(
    latent: Tensor, scale: Tensor, bounded: bool, bits: int = BITS, zero: Tensor | None = None
) -> Tensor:
    """The integer weight of a latent one, as integers in float32.

    Args:
        latent: ``(O, C / groups, ...)``.
        scale: float32 ``(O,)``, or one that broadcasts against the weight.
        bounded: keep neighbouring pairs within the bound of ``kernels.saturation``.
        bits: of the integers.
        zero: zero points, which broadcast against the weight; the integers are relative to them.
    """
    steps = (latent / _spread(scale, latent)).round_()
    if zero is not None:
        half = 1 << bits - 1
        return steps.clamp_(-half - zero, half - 1 - zero)
    nearest = steps.clamp_(*weight_limits(bits))
    return within_bound(nearest) if bounded else nearest


def _spread(scale: Tensor, weight: Tensor) -> Tensor:
    return scale if scale.dim() == weight.dim() else scale.view(-1, *[1] * (weight.dim() - 1))


class FakeQuantized(nn.Module):
    """An operation without a weight whose result is rounded.

    Args:
        real: computes it on real values.
        output: of the result.
    """

    def __init__(self, real: Callable[..., Tensor], output: QParams) -> None:
        super().__init__()
        self.real, self.output = real, output

    def forward(self, *args: Tensor) -> Tensor:
        return fake_quantize(self.real(*args), self.output)


class Real(nn.Module):
    """A value that goes on to a float layer, as a tensor of its own: that layer may change it in place."""

    def forward(self, input: Tensor) -> Tensor:
        return input.clone()
