"""Fake quantization: rounding in float32 to the values that int8 layers compute with, which can be trained.

Where an int8 layer passes a uint8 tensor on, the real values that it stands for are passed on (Jacob et al.,
"Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018,
section 3). Rounding has no useful derivative, so gradients pass it as if it were not there
(Y. Bengio, N. Leonard and A. Courville, "Estimating or Propagating Gradients Through Stochastic Neurons for
Conditional Computation", 2013); clipping has one.

Step sizes learn along with the weights (S. Esser et al., "Learned Step Size Quantization", ICLR 2020,
equations 1 to 3 and section 2.2). What learns is the logarithm of a step size as a multiple of that at the
start, which calibration found: so it stays positive, and adaptive optimizers move large and small steps
alike (S. Jain et al., "Trained Quantization Thresholds", MLSys 2020). Its gradient is the paper's
over the start, with which plain gradient descent moves the step size as it does there, but for gradients
beyond 1 in size, which are cut to that: a value of 8 bits at the end of its range alone has 255 times its own
gradient.

Zero points stay. A real zero stays exact in padding, after ReLU and where weights were pruned; learned
offsets (Y. Bhalgat et al., "LSQ+", CVPRW 2020) would give that up, and calibration has found them for the
range at hand.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_cli.methods.quantize.rounding import within_bound
from modelopt_cli.program.quantization import BITS, NotFiniteError, QParams, dynamic_qparams, weight_limits

MOST = 1.0
"""Largest gradient of the logarithm of a step size: what a learning rate may change it by in a step."""
FARTHEST = 8.0
"""Largest logarithm of a step size as a multiple of that at the start: a factor of 3,000."""


class RoundedActivation(torch.autograd.Function):
    """The real values of the uint8 form of an activation; its step size is a multiple of that of ``q``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, growth: Tensor | None, q: QParams) -> Tensor:
        # In the arithmetic of quantize and dequantize, so that the same values come out.
        if growth is None:
            scale: Any = q.scale
            steps = x.mul(1.0 / scale)
        else:
            exact = multiple(growth.double()) * q.scale
            scale, steps = exact.float(), x.mul(exact.reciprocal().float())
        low, high = _whole_steps(q)
        rounded = steps.clamp(low, high).round_().mul_(scale)
        # Not x, which its other readers may change in place.
        ctx.save_for_backward(steps, *(() if growth is None else (rounded, scale)))
        ctx.q = q
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (grad,), (steps, *learned), q = grads, ctx.saved_tensors, ctx.q
        low, high = _whole_steps(q)
        inside = torch.ops.aten.hardtanh_backward(grad, steps, low, high)  # 0 outside, in a single pass
        of_growth = None
        if ctx.needs_input_grad[1]:
            rounded, scale = learned
            features = steps.numel() // max(len(steps), 1) if steps.dim() else 1
            # The whole steps, less the steps themselves where they are inside.
            of_step = _dot(grad, rounded) / scale - _dot(inside, steps)
            of_growth = (of_step * (gradient_scale(features, high) / q.scale)).clamp_(-MOST, MOST)
        return inside, of_growth, None


def _whole_steps(q: QParams) -> tuple[int, int]:
    """The least and the most steps from the zero point."""
    return -q.zero_point, q.top - q.zero_point


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of the products, without a tensor of them."""
    return torch.dot(a.reshape(-1), b.reshape(-1))


class RoundedWeight(torch.autograd.Function):
    """The float32 values of the int8 weight nearest to a latent one; steps are multiples of ``scale``."""

    @staticmethod
    def forward(
        ctx: Any,
        latent: Tensor,
        growth: Tensor,
        scale: Tensor,
        bounded: bool,
        bits: int,
        zero: Tensor | None = None,
    ) -> Tensor:
        step = scale * multiple(growth)
        q = nearest_steps(latent, step, bounded, bits, zero)
        ctx.save_for_backward(latent, q.to(torch.int16), step, scale, zero)
        ctx.bits = bits
        return q.mul_(_spread(step, latent))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        (grad,), (latent, whole, step, scale, zero) = grads, ctx.saved_tensors
        low, high = step_limits(ctx.bits, zero)
        steps, whole = latent / _spread(step, latent), whole.float()
        # Neither beyond the integers there are nor pulled back onto the bound on pairs.
        inside = (steps > low) & (steps < high) & (steps.round() == whole)
        of_growth = None
        if ctx.needs_input_grad[1]:
            of_step = (grad * (whole - steps * inside)).flatten(1).sum(1)
            of_growth = (of_step * (gradient_scale(latent[:1].numel(), int(high)) / scale)).clamp_(
                -MOST, MOST
            )
        # In the paper a latent weight beyond gets no gradient; here it may come back, but go no further.
        return grad.masked_fill(~inside & (grad * latent < 0), 0), of_growth, None, None, None, None


def multiple(growth: Tensor) -> Tensor:
    """A step size as a multiple of that at the start, of its logarithm."""
    return growth.clamp(-FARTHEST, FARTHEST).exp()


def gradient_scale(values: int, largest: int) -> float:
    """Factor of a step size's gradient, ``1 / sqrt(N * Qp)`` (Esser et al., section 2.2).

    Args:
        values: that have the step size; of an activation, of one sample.
        largest: integer of them, as a multiple of the step.
    """
    return 1 / math.sqrt(max(values, 1) * max(largest, 1))


def fake_quantize(x: Tensor, q: QParams, growth: Tensor | None = None) -> Tensor:
    """Round ``x`` to the float32 values of its uint8 form; outside its range there is no gradient.

    Args:
        x: of any shape; samples come first.
        q: scale and zero point.
        growth: logarithm of the step size as a multiple of the scale, a scalar that can learn; None where it
            stays.
    """
    rounded: Tensor = RoundedActivation.apply(x.float(), growth, q)  # type: ignore[no-untyped-call]
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
    nearest = (latent / _spread(scale, latent)).round_().clamp_(*step_limits(bits, zero))
    return within_bound(nearest) if bounded and zero is None else nearest


def step_limits(bits: int, zero: Tensor | None) -> tuple[Any, Any]:
    """The smallest and the largest integer of a weight, relative to zero points where it has some."""
    half = 1 << bits - 1
    return weight_limits(bits) if zero is None else (-half - zero, half - 1 - zero)


def _spread(scale: Tensor, weight: Tensor) -> Tensor:
    return scale if scale.dim() == weight.dim() else scale.view(-1, *[1] * (weight.dim() - 1))


class StepSize(nn.Module):
    """Rounding of activations with a step size that learns; those that share it share the module.

    Args:
        q: scale and zero point at the start.

    Attributes:
        growth: logarithm of the step size as a multiple of that scale, a scalar.
    """

    def __init__(self, q: QParams) -> None:
        super().__init__()
        self.start, self.growth = q, nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.start, self.growth)

    @property
    def qparams(self) -> QParams:
        """Scale and zero point as they are now."""
        return replace(self.start, scale=self.start.scale * float(multiple(self.growth.detach().double())))


class FakeQuantized(nn.Module):
    """An operation without a weight whose result is rounded.

    Args:
        real: computes it on real values.
        output: of the result.
    """

    def __init__(self, real: Callable[..., Tensor], output: QParams) -> None:
        super().__init__()
        self.real, self.rounding = real, StepSize(output)

    def forward(self, *args: Tensor) -> Tensor:
        rounded: Tensor = self.rounding(self.real(*args))
        return rounded


class Real(nn.Module):
    """A value that goes on to a float layer, as a tensor of its own: that layer may change it in place."""

    def forward(self, input: Tensor) -> Tensor:
        return input.clone()
