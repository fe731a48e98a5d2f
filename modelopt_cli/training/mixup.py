"""Mixing samples. H. Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def draw(alpha: float, samples: int, seed: int, step: int) -> tuple[float, Tensor]:
    """The share of a sample that stays, from Beta(alpha, alpha), and the partner of every sample."""
    generator = np.random.default_rng((seed, step))
    return float(generator.beta(alpha, alpha)), torch.from_numpy(generator.permutation(samples))


def mix(images: Tensor, labels: Tensor, classes: int, share: float, partner: Tensor) -> tuple[Tensor, Tensor]:
    """Images, and the probabilities ``(N, classes)`` that are their targets, both mixed alike.

    Args:
        images: ``(N, ...)``.
        labels: ``(N,)`` int64.
        classes: number of classes.
        share: of a sample itself; the rest is its partner's.
        partner: ``(N,)`` int64, a permutation.
    """
    partner = partner.to(images.device)
    mixed = torch.lerp(images[partner], images, share)
    targets = F.one_hot(labels, classes).to(images.dtype)
    return mixed, torch.lerp(targets[partner], targets, share)
