"""Widths of a layer: the bits of its weight, and of the activations that the weight is multiplied with."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Widths:
    """Widths of one layer.

    Attributes:
        weight: bits of its weight's integers, 2 to 8.
        activation: bits of its input's integers, 2 to 8; None where the input stays float and the weight is
            only stored as integers.
    """

    weight: int = 8
    activation: int | None = 8


INT8 = Widths()
