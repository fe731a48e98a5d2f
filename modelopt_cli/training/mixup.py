"""Mixup of samples and of their classes.

H. Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from modelopt_cli.errors import UsageError
from modelopt_cli.program.input_batch import Inputs, each_of, tensors_of
from modelopt_cli.settings import option


def draw_mixup(alpha: float, samples: int, seed: int, step: int) -> tuple[float, Tensor]:
    """Fraction of a sample that stays, from Beta(alpha, alpha), and the partner of every sample."""
    generator = np.random.default_rng((seed, step))
    return float(generator.beta(alpha, alpha)), torch.from_numpy(generator.permutation(samples))


def mix(inputs: Inputs, labels: Tensor, classes: int, share: float, partner: Tensor) -> tuple[Inputs, Tensor]:
    """Inputs, and the probabilities ``(N, classes)`` that are their targets, both mixed alike.

    Args:
        inputs: a batch of floats.
        labels: ``(N,)`` int64.
        classes: number of classes.
        share: fraction of a sample itself; the rest is its partner's.
        partner: ``(N,)`` int64, a permutation.

    Raises:
        UsageError: an input is of integers.
    """
    partner = partner.to(labels.device)
    if not all(tensor.is_floating_point() for tensor in tensors_of(inputs)):
        hint = "leave it out: integers cannot be mixed"
        raise UsageError("an input of the network is of integers", where=option("mixup"), hint=hint)
    mixed = each_of(inputs, lambda tensor: torch.lerp(tensor[partner], tensor, share))
    targets = F.one_hot(labels, classes).to(tensors_of(mixed)[0].dtype)
    return mixed, torch.lerp(targets[partner], targets, share)
