"""Targets: figures of a network as fractions of the original's, and the search for one of them.

Every target is expressed as the fraction that is kept, 1 for the original. A search goes over plans that
remove more and more, so that the figure falls; it needs about log2 of their number of evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelopt_cli.errors import GateNotMet
from modelopt_cli.lazy_names import deferred
from modelopt_cli.settings import option

if TYPE_CHECKING:
    from modelopt_cli.methods.context import Reached
    from modelopt_cli.program import Program

TOLERANCE = 0.01
"""Largest distance between the figure reached and the target, as a fraction of the original's figure."""
CLOSE = 1e-3
"""Distance at which a search stops."""
CLOSE_LATENCY = 0.004
"""Distance at which a search for a latency stops; it cannot be measured any better."""
_PROBES = 24
DRAFT = 0.1234
"""Placeholder for the figure reached while the history's bytes are counted; as long as any other."""


class TargetNotReached(GateNotMet):
    """No plan comes within the tolerance of the target."""


@dataclass(frozen=True)
class Nonzeros:
    """Counts of parameters in a network whose pruned weights are zeros.

    Attributes:
        kept: nonzeros among the weights that may be pruned.
        size: the number of those weights.
        outside: nonzeros among all other parameters.
        original: nonzeros of the network before it was pruned.
    """

    kept: int
    size: int
    outside: int
    original: int


@dataclass(frozen=True)
class Target:
    """One figure that can be asked for.

    Attributes:
        help: one line.
        kept_fraction: the figure of a Program, for its ``Pruner``, as a fraction of the original's.
        counted: the same from counts alone, without making the network; None where they are not enough.
        of_units: a fraction of the weights, channels or blocks that may go: a plan is enough to know it.
        removed: the user gives the fraction that goes, not the one that is kept.
        measured: timed, so that it differs from run to run, and training does not change it.
        of_file: a figure of the file, whose history contains the figure itself.
        close: distance at which a search stops.
        obstacle: the reason why zeros cannot reach it; empty where they can.
    """

    help: str
    kept_fraction: Callable[[Any, Program], float]
    counted: Callable[[Nonzeros], float] | None = None
    of_units: bool = False
    removed: bool = False
    measured: bool = False
    of_file: bool = False
    close: float = CLOSE
    obstacle: str = ""


_flops = deferred("modelopt_cli.methods.prune.figures", "flops")

SPARSITY = "sparsity"
"""The target that a structure such as N:M implies."""

TARGETS: dict[str, Target] = {
    SPARSITY: Target(
        "fraction to remove of the weights, channels or blocks that may be pruned",
        lambda pruner, program: pruner.units_kept(program),
        counted=lambda count: count.kept / count.size,
        of_units=True,
        removed=True,
    ),
    "flops": Target(
        "fraction to keep of the arithmetic",
        lambda pruner, program: pruner.ratio_of(_flops, program),
        obstacle="zeros are multiplied like any number",
    ),
    "params": Target(
        "fraction to keep of the parameters; zeros that pruning makes do not count",
        lambda pruner, program: pruner.ratio_of(pruner.count_parameters, program),
        counted=lambda count: (count.outside + count.kept) / count.original,
    ),
    "bytes": Target(
        "fraction to keep of the file, written as an artifact",
        lambda pruner, program: pruner.file_ratio(program),
        of_file=True,
    ),
    "latency": Target(
        "fraction to keep of the latency, measured on this machine",
        lambda pruner, program: pruner.timer.fraction(program),
        measured=True,
        close=CLOSE_LATENCY,
        obstacle="zeros do not make it faster",
    ),
}
"""By the name of the option, which is that of the config's field."""


@dataclass(frozen=True)
class SearchResult:
    """Result of a search over the steps of a path.

    Attributes:
        place: the step whose kept fraction is nearest to the target; of two, the earlier.
        kept: the fraction that is kept there.
        above: the last step known to keep more than the target, or 0.
    """

    place: int
    kept: float
    above: int


def search_path(
    kept: Callable[[int], float], steps: int, target: float, close: float = CLOSE
) -> SearchResult:
    """The step of a path whose kept fraction is nearest to a target.

    Args:
        kept: the fraction that is kept after so many steps; falls from step to step.
        steps: the last step.
        target: the fraction to keep.
        close: distance at which the search stops.
    """
    known: dict[int, float] = {}

    def at(step: int) -> float:
        if step not in known:
            known[step] = kept(step)
        return known[step]

    # Regula falsi: a straight line through the two nearest known steps usually hits the target at once.
    # Where the curve bends, only one end moves by that, and slowly: then the middle is tried instead, so
    # that the interval at least halves every second time.
    low, high, halve = 0, steps, False
    while high - low > 1 and at(low) > target > at(high):
        share = 0.5 if halve else (at(low) - target) / (at(low) - at(high))
        middle = min(max(round(low + share * (high - low)), low + 1), high - 1)
        if abs(at(middle) - target) <= close:
            return SearchResult(middle, at(middle), low)
        before = high - low
        low, high = (low, middle) if at(middle) <= target else (middle, high)
        halve = high - low > before / 2
    best = min((low, high), key=lambda step: (abs(at(step) - target), step))
    return SearchResult(best, at(best), low)


def search_ratio(
    kept: Callable[[float], float], target: float, guess: float, low: float = 0.0, high: float = 1.0
) -> float:
    """The ratio of removed units at which the kept fraction is nearest to a target, by bisection.

    Args:
        kept: the fraction that is kept at a ratio; falls, in small jumps.
        target: the fraction to keep.
        guess: the ratio to try first.
        low: the least that can be removed.
        high: the most.
    """
    ratio = min(max(guess, low), high)
    best, nearest = ratio, math.inf
    for _ in range(_PROBES):
        miss = kept(ratio) - target
        if abs(miss) < nearest:
            best, nearest = ratio, abs(miss)
        if nearest <= CLOSE:
            break
        low, high = (ratio, high) if miss > 0 else (low, ratio)
        ratio = (low + high) / 2
    return best


def reached(metric: str, wanted: float, kept: float) -> Reached:
    """The target as the user gave it, and what was reached of it in the same terms.

    Args:
        metric: a key of ``TARGETS``.
        wanted: the fraction asked for.
        kept: the fraction of the original that is kept.
    """
    from modelopt_cli.methods.context import Reached

    return Reached(metric, wanted, 1 - kept if TARGETS[metric].removed else kept)


def require(target: Reached) -> Reached:
    """Make sure that a target was reached.

    Raises:
        TargetNotReached: it was missed by more than ``TOLERANCE``.
    """
    # Half of a rounding error of the difference is no miss.
    if abs(target.reached - target.wanted) <= TOLERANCE + 1e-9:
        return target
    figure = f"{option(target.metric)} {target.wanted:g}"
    raise TargetNotReached(
        f"{figure} is not reached: the nearest found is {target.reached:.3f}",
        hint=f"nothing was written; ask for that, allow more layers, or try another {option('allocation')}",
    )
