"""Targets: figures of a network as fractions of the original's, and the search for what reaches one.

Every target is expressed as the fraction that is left, 1 for the original. A search goes over plans that
remove more and more, so that the figure falls; it needs about log2 of their number of evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelopt_cli.errors import GateNotMet

if TYPE_CHECKING:
    from modelopt_cli.methods.context import Reached
    from modelopt_cli.methods.prune.pruner import Pruner
    from modelopt_cli.program import Program

TOLERANCE = 0.01
"""How far the figure reached may lie from the target, as a fraction of the original's."""
CLOSE = 1e-3
"""Where a search stops looking for something nearer."""
CLOSE_LATENCY = 0.004
"""The same for a latency, which is not known any better."""
_PROBES = 24
DRAFT = 0.1234
"""Stands for the figure reached while the bytes of the history are counted: as long as any other."""


class TargetNotReached(GateNotMet):
    """No plan comes within the tolerance of the target."""


@dataclass(frozen=True)
class Nonzeros:
    """Counts of weights, where what goes becomes zero.

    Attributes:
        kept: nonzeros among the weights that may be pruned.
        size: all of those weights.
        others: nonzeros among all other parameters.
        original: nonzeros of the network before it was pruned.
    """

    kept: int
    size: int
    others: int
    original: int


@dataclass(frozen=True)
class Target:
    """One figure that can be asked for.

    Attributes:
        help: one line.
        left: the fraction of it that a Program has left.
        counted: the same from counts alone, without making the network; None where that is not enough.
        of_units: a fraction of the weights, channels or blocks that may go: a plan is enough to know it.
        removed: the user says how much goes, not how much stays.
        measured: timed, so that it differs from run to run, and training does not change it.
        of_file: a figure of the file, of which the target reached is itself a part.
        close: where a search stops looking for something nearer.
        no_zeros: why zeros cannot reach it; empty where they can.
    """

    help: str
    left: Callable[[Pruner, Program], float]
    counted: Callable[[Nonzeros], float] | None = None
    of_units: bool = False
    removed: bool = False
    measured: bool = False
    of_file: bool = False
    close: float = CLOSE
    no_zeros: str = ""


def _flops(pruner: Pruner, program: Program) -> float:
    from modelopt_cli.methods.prune.figures import flops

    return pruner.share_of(flops, program)


SPARSITY = "sparsity"
"""The target that a structure such as N:M implies."""
_INSTEAD = "use --structure channels, or one of --sparsity, --params, --bytes"

TARGETS: dict[str, Target] = {
    SPARSITY: Target(
        "fraction removed, of the weights, channels or blocks that may be pruned",
        lambda pruner, program: pruner.units_left(program),
        counted=lambda count: count.kept / count.size,
        of_units=True,
        removed=True,
    ),
    "flops": Target(
        "fraction of the arithmetic that is left",
        _flops,
        no_zeros=f"zeros are multiplied like any number; {_INSTEAD}",
    ),
    "params": Target(
        "fraction of the parameters that is left; zeros that pruning puts do not count",
        lambda pruner, program: pruner.share_of(pruner.count_parameters, program),
        counted=lambda count: (count.others + count.kept) / count.original,
    ),
    "bytes": Target(
        "fraction of the file that is left", lambda pruner, program: pruner.file_share(program), of_file=True
    ),
    "latency": Target(
        "fraction of the latency that is left, measured",
        lambda pruner, program: pruner.timer.fraction(program),
        measured=True,
        close=CLOSE_LATENCY,
        no_zeros=f"zeros do not make it faster; {_INSTEAD}",
    ),
}
"""By the name of the option, which is that of the config's field."""


@dataclass(frozen=True)
class Found:
    """Where a search ended.

    Attributes:
        place: the step at which what is left is nearest to what was wanted; of two, the earlier.
        left: what is left there.
        above: the last step known to leave more than wanted, or 0.
    """

    place: int
    left: float
    above: int


def search_path(left: Callable[[int], float], steps: int, wanted: float, close: float = CLOSE) -> Found:
    """The step of a path at which what is left is nearest to ``wanted``.

    Steps are tried where a straight line through the nearest known ones meets the target, and halfway
    between them whenever that got stuck on one side.

    Args:
        left: what is left after so many steps; falls from step to step.
        steps: the last step.
        wanted: what should be left.
        close: how near is near enough.
    """
    seen: dict[int, float] = {}

    def at(step: int) -> float:
        if step not in seen:
            seen[step] = left(step)
        return seen[step]

    low, high, halve = 0, steps, False
    while high - low > 1 and at(low) > wanted > at(high):
        share = 0.5 if halve else (at(low) - wanted) / (at(low) - at(high))
        middle = min(max(round(low + share * (high - low)), low + 1), high - 1)
        if abs(at(middle) - wanted) <= close:
            return Found(middle, at(middle), low)
        before = high - low
        low, high = (low, middle) if at(middle) <= wanted else (middle, high)
        halve = high - low > before / 2
    best = min((low, high), key=lambda step: (abs(at(step) - wanted), step))
    return Found(best, at(best), low)


def search_ratio(
    left: Callable[[float], float], wanted: float, guess: float, low: float = 0.0, high: float = 1.0
) -> float:
    """The ratio between ``low`` and ``high`` at which what is left is ``wanted``, or as near as can be.

    Args:
        left: what is left at a ratio; falls, in small jumps.
        wanted: what should be left.
        guess: where to look first.
        low: the least that can be removed.
        high: the most.
    """
    ratio = min(max(guess, low), high)
    best, nearest = ratio, math.inf
    for _ in range(_PROBES):
        miss = left(ratio) - wanted
        if abs(miss) < nearest:
            best, nearest = ratio, abs(miss)
        if nearest <= CLOSE:
            break
        low, high = (ratio, high) if miss > 0 else (low, ratio)
        ratio = (low + high) / 2
    return best


def reached(metric: str, wanted: float, left: float) -> Reached:
    """The target as the user gave it, and what became of it, in the same terms."""
    from modelopt_cli.methods.context import Reached

    return Reached(metric, wanted, 1 - left if TARGETS[metric].removed else left)


def require(target: Reached, nearest: str = "") -> Reached:
    """Make sure that a target was reached.

    Args:
        target: what was wanted and what the result has.
        nearest: what could be reached, for the error.

    Raises:
        TargetNotReached: it was missed by more than ``TOLERANCE``.
    """
    # Half of a rounding error of the difference is no miss.
    if abs(target.reached - target.wanted) <= TOLERANCE + 1e-9:
        return target
    raise TargetNotReached(
        f"--{target.metric} {target.wanted:g} is not reached: the nearest found is {target.reached:.3f}",
        hint=nearest or "nothing was written; ask for that, allow more layers, or try another --allocation",
    )
