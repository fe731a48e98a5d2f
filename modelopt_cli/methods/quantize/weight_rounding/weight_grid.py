"""The integers that a layer's weight may become, and the nearest of them."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from modelopt_cli.kernels.saturation import is_depthwise
from modelopt_cli.methods.quantize.rounding import quantize_weight, within_bound
from modelopt_cli.program.quantization import BITS, weight_limits


@dataclass(frozen=True, eq=False)
class WeightGrid:
    """Steps of a weight: an integer times the scale of its output channel.

    Attributes:
        weight: float32, the output channels first.
        scale: of each output channel, float32 ``(O,)``.
        bits: of the integers, 2 to 8.
        bounded: neighbouring pairs keep to the bound of ``kernels.saturation``.
    """

    weight: Tensor
    scale: Tensor
    bits: int
    bounded: bool

    @classmethod
    def of(cls, weight: Tensor, groups: int, bits: int) -> "WeightGrid":
        """The grid with the scales that ``quantize_weight`` chooses.

        Args:
            weight: ``(O, C / groups, ...)``.
            groups: of the convolution.
            bits: of the integers, 2 to 8.
        """
        weight = weight.detach().float()
        _, scale = quantize_weight(weight, groups, bits=bits)
        return cls(weight, scale, bits, bits == BITS and not is_depthwise(tuple(weight.shape), groups))

    @cached_property
    def spread(self) -> Tensor:
        """The scale of each weight, ``(O, 1, ...)``."""
        return self.scale.view(-1, *[1] * (self.weight.dim() - 1))

    @cached_property
    def position(self) -> Tensor:
        """Each weight in steps, within the grid."""
        return self.clipped(self.weight / self.spread)

    @cached_property
    def nearest(self) -> Tensor:
        """The nearest integers, in float32."""
        return self.settled(self.position.round())

    @cached_property
    def free(self) -> Tensor:
        """True where a weight may go up or down: not zero, its nearest integer not pulled back."""
        return (self.weight != 0) & (self.nearest == self.position.round())

    def clipped(self, steps: Tensor) -> Tensor:
        """Steps within the range of the integers."""
        return steps.clamp(*weight_limits(self.bits))

    def settled(self, steps: Tensor) -> Tensor:
        """Whole steps, pulled back onto the bound of ``kernels.saturation``; zeros stay."""
        return within_bound(steps) if self.bounded else steps

    def real(self, steps: Tensor) -> Tensor:
        """The values that steps stand for, whole ones or not."""
        return steps * self.spread
