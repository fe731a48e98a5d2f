"""Speedup of one model over another, with its interval.

A round calls every model once, so the ratio of two times of the same round leaves out what slowed the round
as a whole. The speedup is the median of these ratios. Its 95 % interval reaches from one of the ordered
ratios to another, chosen by the binomial distribution: each ratio falls below the true median with
probability 1/2, whatever the distribution of the times (Conover, Practical Nonparametric Statistics, 3rd
edition, section 3.2; Hahn and Meeker, Statistical Intervals, section 5.2). It assumes independent rounds.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_TAIL = 20  # both tails together hold at most one part in so many


@dataclass(frozen=True)
class Speedup:
    """The median ratio of paired times, the baseline's over the other model's.

    Attributes:
        ratio: above 1 the other model is faster.
        low: lower end of the 95 % interval; 0 where there are too few rounds for one.
        high: upper end; infinite where there are too few.
        rounds: number of pairs.
    """

    ratio: float
    low: float
    high: float
    rounds: int

    @property
    def distinguishable(self) -> bool:
        """False where the interval holds 1, so that either model may be the faster one."""
        return not self.low <= 1 <= self.high


def paired_speedup(base: Sequence[float], other: Sequence[float]) -> Speedup:
    """Compare two models that were timed in the same rounds.

    Args:
        base: times of the baseline, in any unit, one for each round.
        other: times of the other model in the same rounds.

    Raises:
        ValueError: the two do not describe the same, non-empty list of rounds.
    """
    ratios = sorted(first / second for first, second in zip(base, other, strict=True))
    rank = interval_rank(len(ratios))
    low, high = (ratios[rank - 1], ratios[-rank]) if rank else (0.0, math.inf)
    return Speedup(statistics.median(ratios), low, high, len(ratios))


def interval_rank(count: int) -> int:
    """Rank, from either end of ``count`` ordered values, of the ends of the median's 95 % interval.

    The largest ``k`` with ``2 P(Binomial(count, 1/2) < k) <= 0.05``, in integers; 0 if there is none.
    """
    rank, term, below = 0, 1, 1
    while 2 * _TAIL * below <= 1 << count:
        rank += 1
        term = term * (count - rank + 1) // rank
        below += term
    return rank


def least_rounds() -> int:
    """Fewest rounds that give an interval."""
    return next(count for count in range(1, 100) if interval_rank(count))


def rounds_needed(speedup: Speedup, limit: float) -> int | None:
    """Rounds after which the interval would begin at ``limit``, if it narrows with their square root.

    None where the interval tells already, or where the ratio itself is at or below the limit.
    """
    if not speedup.low < limit < speedup.ratio:
        return None
    shrink = (speedup.ratio - speedup.low) / (speedup.ratio - limit)
    return max(math.ceil(speedup.rounds * shrink**2), least_rounds())
