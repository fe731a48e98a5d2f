"""Latency of a pruned network as a fraction of the original's, measured side by side."""

import copy
import statistics
import time
from collections.abc import Sequence

from modelopt_cli.measure.forms import best_form
from modelopt_cli.measure.latency import Call, sample_input, time_interleaved
from modelopt_cli.measure.subject import Subject
from modelopt_cli.program import Program

PRECISION = 0.004
"""Half the width of the 95 % interval at which measuring stops."""
ROUNDS, MOST_ROUNDS, MOST_SECONDS = 15, 201, 10.0
"""Rounds between two looks at the interval, and when to give up."""


class Timer:
    """Times candidates against one original, in interleaved rounds, each in its fastest form.

    Args:
        original: what is 1.
        device: where to run.
        seed: of the input and of the order within the rounds.
    """

    def __init__(self, original: Program, device: str = "cpu", seed: int = 0) -> None:
        self.device, self.seed = device, seed
        self.images = sample_input(original.input, 1, seed=seed, device=device)
        self.original = self._form(original)

    def fraction(self, candidate: Program) -> float:
        """The median over rounds of the candidate's time over the original's, at batch size 1."""
        calls = [(self.original, self.images), (self._form(candidate), self.images)]
        ratios: list[float] = []
        start = time.monotonic()
        while True:
            times = time_interleaved(
                calls, warmup=0 if ratios else 3, runs=ROUNDS, seed=self.seed + len(ratios)
            )
            ratios += [mine / theirs for theirs, mine in zip(*times, strict=True)]
            spent = time.monotonic() - start
            if half_width(ratios) < PRECISION or len(ratios) >= MOST_ROUNDS or spent > MOST_SECONDS:
                return statistics.median(ratios)

    def _form(self, program: Program) -> Call:
        model = copy.deepcopy(program).to(self.device).eval()
        subject = Subject(path="", model=model, program=model, file_bytes=0)
        return best_form(subject, self.images, seed=self.seed)[0]


def half_width(values: Sequence[float]) -> float:
    """Half the width of the distribution-free 95 % interval of the median, from order statistics."""
    ordered, n = sorted(values), len(values)
    low = max(0, int(n / 2 - 0.98 * n**0.5))
    return (ordered[n - 1 - low] - ordered[low]) / 2
