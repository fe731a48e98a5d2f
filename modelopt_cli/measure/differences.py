"""The paired difference of a metric between two models, with its 95 % interval.

Where a metric says which samples are right the interval has a closed form (``statistics``). For all others it
is bootstrapped. A bootstrap of models that differ on no sample would have an interval of width zero, which
with few samples would be a lie: there at most the share ``z^2 / (n + z^2)`` of all samples differs, as in
Tango's interval, and each by no more than the metric's range. A metric without a range has none to say.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from modelopt_cli.measure.bootstrap import bootstrap
from modelopt_cli.measure.metrics import Metric
from modelopt_cli.measure.statistics import Z_95, Interval, paired_difference
from modelopt_cli.measure.tally import Predictions, is_right_or_wrong, value_of_all


def differences(base: Predictions, other: Predictions) -> dict[str, Interval]:
    """The difference of each metric that was measured of both models, on the same samples."""
    intervals = {
        name: difference(metric, base.scores[name], other.scores[name])
        for name, metric in base.rows.items()
        if name in base.scores and name in other.scores
    }
    return {name: each for name, each in intervals.items() if not math.isnan(each.drop)}


def difference(metric: Metric, base: Any, other: Any) -> Interval:
    """The difference of one metric; NaN where one of the two is not a number.

    Args:
        metric: its row.
        base: what the metric takes of the baseline.
        other: of the other model, on the same samples.
    """
    if is_right_or_wrong(base):
        return paired_difference(base, other)
    samples = metric.units(base)
    factor = metric.scale if metric.higher_is_better else -metric.scale
    drop = factor * (value_of_all(metric, base) - value_of_all(metric, other))
    if is_same(base, other):
        reach = (metric.largest or 0.0) * Z_95**2 / (samples + Z_95**2)
        return Interval(drop, -reach, reach, samples)
    spread = bootstrap(metric.value, base, other, samples)
    low, high = sorted((factor * spread.low, factor * spread.high))
    return Interval(drop, low, high, samples)


def is_same(base: Any, other: Any) -> bool:
    """True if all that a metric takes of two models is the same."""
    if isinstance(base, np.ndarray):
        return np.array_equal(base, other, equal_nan=base.dtype.kind == "f")
    if isinstance(base, Mapping):
        return all(is_same(base[name], other[name]) for name in base)
    if isinstance(base, list | tuple):
        return len(base) == len(other) and all(map(is_same, base, other))
    return bool(base == other)
