"""Random numbers of training samples, which depend on seed, variant and index of a sample alone."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def uniform(seed: int, variant: int, indices: NDArray[np.int64], draws: int) -> Tensor:
    """Random numbers for samples, by index: float64 ``(N, draws)`` in 0 to below 1."""
    place = (indices[:, None] * draws + np.arange(draws)).astype(np.uint64)
    return torch.from_numpy((splitmix64(_key(seed, variant), place) >> np.uint64(11)) * 2.0**-53)


@contextlib.contextmanager
def seeded(seed: int, variant: int, index: int) -> Iterator[None]:
    """Seed the global generators of torch, NumPy and Python for a sample, inside the context."""
    number = int(splitmix64(_key(seed, variant), np.array([index], dtype=np.uint64))[0])
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(number)
        random.seed(number)
        np.random.seed(number % 2**32)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def splitmix64(key: NDArray[np.uint64], place: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64, whose sequence can be entered at any place: integer arithmetic alone.

    G. Steele, D. Lea and C. Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014.

    Args:
        key: the seed, of shape ``(1,)``.
        place: in the sequence, from 0.
    """
    mixed: NDArray[np.uint64] = key + (place + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def _key(seed: int, variant: int) -> NDArray[np.uint64]:
    return np.random.SeedSequence([seed % 2**64, variant]).generate_state(1, np.uint64).astype(np.uint64)
