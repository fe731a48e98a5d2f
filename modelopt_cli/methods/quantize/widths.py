"""Widths of a layer: the bits of its weight, and of the activations that the weight is multiplied with.

Imports no torch, so that the command line reads it, too.
"""

from dataclasses import dataclass

BYTE = 8
"""Bits of the integers that kernels multiply."""
HALF = 16
FLOATS = (HALF, 32)
"""Bits of activations that stay floating point: bfloat16, where the hardware computes in it, or float32."""


@dataclass(frozen=True)
class Widths:
    """Widths of one layer.

    Attributes:
        weight: bits of its weight's integers, 2 to 8.
        activation: bits of its input's integers, 2 to 8; None where the input stays float and the weight is
            only stored as integers.
    """

    weight: int = BYTE
    activation: int | None = BYTE

    @property
    def narrow(self) -> bool:
        """True if a weight or an activation has fewer bits than a byte."""
        return self.least < BYTE

    @property
    def least(self) -> int:
        """The fewer bits of both; an activation in floating point counts as a byte."""
        return min(self.weight, self.activation or BYTE)

    def at_least(self, bits: int) -> "Widths":
        """Widths of so many bits or more."""
        activation = None if self.activation is None else max(self.activation, bits)
        return Widths(max(self.weight, bits), activation)

    @property
    def numbers(self) -> list[int | None]:
        """Both, as the history has them."""
        return [self.weight, self.activation]

    def __str__(self) -> str:
        """``W4A8``, as the literature writes it; ``W4`` where activations stay float."""
        return f"W{self.weight}" + ("" if self.activation is None else f"A{self.activation}")


INT8 = Widths()
