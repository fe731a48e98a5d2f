"""Figures that targets are fractions of: arithmetic, parameters, latency next to the original's."""

import copy
import statistics
import time
from collections.abc import Sequence

import torch

from modelopt_cli.measure.flops import count_macs
from modelopt_cli.measure.latency import Call, sample_input, time_interleaved
from modelopt_cli.measure.size import logical_parameters
from modelopt_cli.measure.variants import fastest_variant
from modelopt_cli.methods.prune.target_figures import CLOSE_LATENCY
from modelopt_cli.program import Program
from modelopt_cli.program.rewrite import meta_copy

ROUNDS, MOST_ROUNDS, MOST_SECONDS = 15, 201, 10.0
"""Rounds of timing between two looks at the interval, and when to give up."""


def flops(program: Program) -> float:
    """Multiply-accumulates of one sample, counted on shapes alone."""
    empty = meta_copy(program)
    return float(count_macs(empty, empty.input).total)


def parameters(program: Program) -> float:
    """All parameters."""
    return float(sum(tensor.numel() for tensor in logical_parameters(program)))


def nonzeros(program: Program) -> float:
    """Parameters that are not zero."""
    return float(sum(int(torch.count_nonzero(tensor)) for tensor in logical_parameters(program)))


class Timer:
    """Times candidates against one original, in interleaved rounds, each in its fastest variant.

    Args:
        original: what is 1.
        device: where to run.
        seed: of the input and of the order within the rounds.
    """

    def __init__(self, original: Program, device: str = "cpu", seed: int = 0) -> None:
        self.device, self.seed = device, seed
        self.images = sample_input(original.input, 1, seed=seed, device=device)
        self.original = self._fastest(original)

    def fraction(self, candidate: Program) -> float:
        """The median over rounds of the candidate's time over the original's, at batch size 1."""
        calls = [(self.original, self.images), (self._fastest(candidate), self.images)]
        ratios: list[float] = []
        start = time.monotonic()
        while True:
            times = time_interleaved(
                calls, warmup=0 if ratios else 3, runs=ROUNDS, seed=self.seed + len(ratios)
            )
            ratios += [mine / theirs for theirs, mine in zip(*times, strict=True)]
            spent = time.monotonic() - start
            if half_width(ratios) < CLOSE_LATENCY or len(ratios) >= MOST_ROUNDS or spent > MOST_SECONDS:
                return statistics.median(ratios)

    def _fastest(self, program: Program) -> Call:
        model = copy.deepcopy(program).to(self.device).eval()
        return fastest_variant(model, self.images, seed=self.seed)[0]


def half_width(values: Sequence[float]) -> float:
    """Half the width of the distribution-free 95 % interval of the median, from order statistics."""
    ordered, n = sorted(values), len(values)
    low = max(0, int(n / 2 - 0.98 * n**0.5))
    return (ordered[n - 1 - low] - ordered[low]) / 2
