"""A moving average of the weights, which often generalises better than the last ones.

B. Polyak and A. Juditsky, Acceleration of stochastic approximation by averaging, 1992.
"""

import copy

import torch
from torch import Tensor, nn


class MovingAverage:
    """A copy of a network whose weights follow those of the network.

    After step ``t``, counted from 0, every parameter and buffer of floating point becomes
    ``a + (1 - d) (w - a)`` with ``d = min(decay, (1 + t) / (10 + t))``: the first steps, far from where
    training ends, are soon forgotten. Integers are copied.

    Attributes:
        network: the copy, in evaluation mode.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self._decay = decay
        # By name: a copied graph has its parameters in another order. A tensor with two names counts once.
        mine, followed = _tensors(self.network), _tensors(network)
        pairs = list({id(mine[name]): (mine[name], theirs) for name, theirs in followed.items()}.values())
        self._float = [pair for pair in pairs if pair[0].is_floating_point()]
        self._whole = [pair for pair in pairs if not pair[0].is_floating_point()]

    def update(self, step: int) -> None:
        """Follow the network after ``step``."""
        weight = 1 - decay_at(self._decay, step)
        with torch.no_grad():
            torch._foreach_lerp_([a for a, _ in self._float], [w.detach() for _, w in self._float], weight)
            for mine, theirs in self._whole:
                mine.copy_(theirs)


def decay_at(decay: float, step: int) -> float:
    """The decay in force after ``step``."""
    return min(decay, (1 + step) / (10 + step))


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(network.named_parameters(remove_duplicate=False)),
        **dict(network.named_buffers(remove_duplicate=False)),
    }
