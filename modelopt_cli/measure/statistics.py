"""Statistics of the difference of two accuracies on the same samples.

Both models see the same samples, so only the samples where exactly one of them is right say
anything about the difference. Two classical results are used:

- the exact McNemar test (McNemar, 1947, Psychometrika 12:153): under no difference, each of those
  samples is a fair coin;
- Tango's score interval for a difference of paired proportions (Tango, 1998, Statistics in Medicine
  17:891). A bootstrap would report an interval of width zero when the two models never disagree,
  which with 20 samples would be a lie; the score interval then still says z^2 / (n + z^2).
"""

import bisect
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_MOST = 1 << 62  # samples that nobody has
Z_95 = 1.959963984540054  # the normal distribution's 97.5 % point

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Interval:
    """Paired difference of a metric, in its own unit; of accuracies, in percentage points.

    Attributes:
        drop: what the baseline has more, or of an error what it has less; positive means the other is worse.
        low: lower end of the 95 % interval.
        high: upper end of the 95 % interval.
        samples: number of samples, which are drawn, or whatever else is.
        p_value: exact two-sided McNemar p-value of "no difference"; None where no sample is right or wrong.
        lost: samples that only the baseline gets right; None as well.
        gained: samples that only the other gets right; None as well.
    """

    drop: float
    low: float
    high: float
    samples: int
    p_value: float | None = None
    lost: int | None = None
    gained: int | None = None

    @property
    def drop_pp(self) -> float:
        """The drop of what is in percent."""
        return self.drop


def paired_difference(base_correct: BoolArray, other_correct: BoolArray) -> Interval:
    """Compare two models on the same samples.

    Args:
        base_correct: ``(N,)``, whether the baseline is right on each sample.
        other_correct: ``(N,)``, the same for the other model, in the same order.

    Raises:
        ValueError: the two do not describe the same, non-empty set of samples.
    """
    if base_correct.shape != other_correct.shape or base_correct.ndim != 1 or base_correct.size == 0:
        raise ValueError("the two models must have seen the same, non-empty list of samples")
    lost = int(np.count_nonzero(base_correct & ~other_correct))
    gained = int(np.count_nonzero(~base_correct & other_correct))
    return paired_difference_from_counts(lost, gained, int(base_correct.size))


def paired_difference_from_counts(lost: int, gained: int, samples: int) -> Interval:
    """Compare two models by the two counts of discordant pairs and the number of pairs."""
    low, high = tango_interval(lost, gained, samples)
    return Interval(
        drop=100.0 * (lost - gained) / samples,
        low=100.0 * low,
        high=100.0 * high,
        p_value=mcnemar_exact(lost, gained),
        samples=samples,
        lost=lost,
        gained=gained,
    )


def mcnemar_exact(lost: int, gained: int) -> float:
    """Two-sided exact McNemar p-value, ``min(1, 2 P(Binomial(lost + gained, 1/2) <= min))``.

    Computed in integers, so it is exact up to the final division.
    """
    trials, smaller = lost + gained, min(lost, gained)
    term = total = 1
    for k in range(smaller):
        term = term * (trials - k) // (k + 1)
        total += term
    return min(1.0, (2 * total) / (1 << trials))


def tango_interval(lost: int, gained: int, samples: int, z: float = Z_95) -> tuple[float, float]:
    """Tango's score interval for ``(lost - gained) / samples``.

    Args:
        lost: pairs where only the first model is right.
        gained: pairs where only the second model is right.
        samples: all pairs.
        z: normal quantile of the wanted confidence.

    Returns:
        Lower and upper limit of the difference of proportions, within -1 to 1.
    """
    if not (samples > 0 and lost >= 0 and gained >= 0 and lost + gained <= samples):
        raise ValueError("counts do not describe a set of pairs")
    # The lower limit is the mirrored upper limit of the mirrored table.
    return -_upper_limit(gained, lost, samples, z), _upper_limit(lost, gained, samples, z)


def samples_needed(difference: Interval, margin_pp: float) -> int:
    """Samples with which the interval would end at most ``margin_pp`` above the drop.

    Both kinds of disagreement are taken to stay as frequent as they were; an interval of anything else, to
    narrow with the square root of the samples.

    Args:
        difference: what was found on fewer samples.
        margin_pp: wanted distance in the unit of the drop, above 0; the number ends at some 10^18.
    """
    if difference.lost is None or difference.gained is None:
        wide = difference.high - difference.drop
        return math.ceil(difference.samples * (wide / margin_pp) ** 2)
    lost, gained = difference.lost / difference.samples, difference.gained / difference.samples

    def is_enough(samples: int) -> bool:
        upper = _upper_limit(lost * samples, gained * samples, samples, Z_95)
        return 100 * (upper - (lost - gained)) <= margin_pp

    enough = 1
    while enough < _MOST and not is_enough(enough):
        enough *= 2
    return bisect.bisect_left(range(enough), True, lo=enough // 2, key=is_enough)


def _upper_limit(lost: float, gained: float, samples: float, z: float) -> float:
    """Largest difference that the score test does not reject, by bisection (the score falls with it)."""
    if lost == samples:
        return 1.0
    low, high = (lost - gained) / samples, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if _score(lost, gained, samples, middle) >= -z:
            low = middle
        else:
            high = middle
    return low


def _score(lost: float, gained: float, samples: float, difference: float) -> float:
    """Tango's score statistic of the hypothesis that the true difference is ``difference``."""
    variance = samples * (
        2 * _constrained_gained(lost, gained, samples, difference) + difference * (1 - difference)
    )
    distance = lost - gained - samples * difference
    if variance <= 0:
        return math.copysign(math.inf, distance) if distance else 0.0
    return distance / math.sqrt(variance)


def _constrained_gained(lost: float, gained: float, samples: float, difference: float) -> float:
    """Maximum-likelihood P(only the second is right), given the difference (Tango, section 3)."""
    a = 2 * samples
    b = (2 * samples - lost + gained) * difference - lost - gained
    c = -gained * difference * (1 - difference)
    return (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)


def proportion_interval(right: int, samples: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval for a proportion (Wilson, 1927, JASA 22:209).

    Args:
        right: successes.
        samples: trials, at least one.
        z: normal quantile of the wanted confidence.

    Returns:
        Lower and upper limit, within 0 to 1.
    """
    if not 0 <= right <= samples or not samples:
        raise ValueError("counts do not describe a proportion")
    share, square = right / samples, z * z / samples
    middle = share + square / 2
    half = z * math.sqrt(share * (1 - share) / samples + square / (4 * samples))
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))
