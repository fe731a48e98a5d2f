"""Rounding of a weight up or down that is learned (Nagel et al., "AdaRound", ICML 2020, equations 22 to 24).

While it is learned a weight lies anywhere between the two integers next to it, at a rectified sigmoid of a
number of its own, and a regulariser pushes it towards one of them, late more than early.
"""

import math

import torch
from torch import Tensor

from modelopt_cli.methods.quantize.weight_rounding.weight_grid import WeightGrid

ZETA, GAMMA = 1.1, -0.1
"""Ends of the sigmoid before it is cut to 0 and 1, where it then has a slope."""


class SoftRounding:
    """The weight of a layer on its way up or down.

    Args:
        grid: its integers.

    Attributes:
        logits: learned, of the weight's shape.
    """

    def __init__(self, grid: WeightGrid) -> None:
        self.grid = grid
        self.floor = grid.position.floor()
        part = (grid.position - self.floor).clamp(0.01, 0.99)
        self.logits = torch.logit((part - GAMMA) / (ZETA - GAMMA)).requires_grad_()
        self.fixed = None if bool(grid.free.all()) else ~grid.free

    def raised(self) -> Tensor:
        """The way from the lower to the upper integer that each weight has gone, 0 to 1."""
        return (torch.sigmoid(self.logits) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def steps(self, raised: Tensor) -> Tensor:
        """The weight in steps, whole or not."""
        steps = self.grid.clipped(self.floor + raised)
        return steps if self.fixed is None else torch.where(self.fixed, self.grid.nearest, steps)

    @torch.no_grad()
    def settled(self) -> Tensor:
        """The integers that were learned, in float32."""
        return self.grid.settled(self.steps((self.raised() >= 0.5).float()))


def undecided(raised: Tensor, beta: float) -> Tensor:
    """Mean distance of weights from their integers, 0 to 1: the regulariser (equation 24).

    Args:
        raised: the way to the upper integer, 0 to 1.
        beta: power: the larger, the less those in the middle are pushed.
    """
    return 1 - (2 * raised - 1).abs().pow(beta).mean()


def annealed(done: float, warm: float = 0.2, first: float = 20.0, last: float = 2.0) -> float | None:
    """The power of the regulariser: it falls along a line; None as long as there is none.

    Args:
        done: the fraction of steps that are done.
        warm: the fraction without a regulariser.
        first: power at its beginning.
        last: power in the end.
    """
    if done < warm:
        return None
    return last + (first - last) * (1 - (done - warm) / (1 - warm))


def cosine(done: float) -> float:
    """Factor of a learning rate that falls along a cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * done))
