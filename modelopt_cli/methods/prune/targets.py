"""How far to prune: figures of a network as fractions of the original's, and the search for a target.

Every target is expressed as what is left, 1 for the original. A search walks over plans that remove more
and more, so that the figure falls; it needs about log2 of their number of evaluations.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from modelopt_cli.artifact import predicted_bytes
from modelopt_cli.artifact.coding import Code
from modelopt_cli.errors import GateNotMet
from modelopt_cli.measure.flops import count_macs
from modelopt_cli.measure.size import logical_parameters
from modelopt_cli.methods.context import Reached
from modelopt_cli.program import Program
from modelopt_cli.program.rewrite import meta_copy

TOLERANCE = 0.01
"""How far the figure reached may lie from the target, as a fraction of the original's."""
CLOSE = 1e-3
"""Where a search stops looking for something nearer."""
_PROBES = 24
DRAFT = 0.1234
"""Stands for the figure reached while the bytes of the history are counted: as long as any other."""

Entry = Callable[[Program], dict[str, Any]]
"""The history entry that a Program would be written with."""


class TargetNotReached(GateNotMet):
    """No plan comes within the tolerance of the target."""


@dataclass(frozen=True)
class Figures:
    """What is counted of a network, without running it on data.

    Attributes:
        entry: makes the history entry, whose bytes are part of the file.
        params: counts parameters: those that are not zero where zeros are what pruning leaves.
        code: how the file will be written.
    """

    entry: Entry
    params: Callable[[Program], float]
    code: Code = "plain"

    def of(self, metric: str, program: Program) -> float:
        """``flops``, ``params`` or ``bytes`` of a Program that has not been pruned in this run."""
        if metric == "flops":
            return flops(program)
        return self.params(program) if metric == "params" else float(predicted_bytes(program))

    def pruned(self, metric: str, program: Program) -> float:
        """The same of a candidate, which will be written with its history entry."""
        if metric != "bytes":
            return self.of(metric, program)
        before = program.history
        program.history = (*before, self.entry(program))
        try:
            return float(predicted_bytes(program, code=self.code))
        finally:
            program.history = before


def flops(program: Program) -> float:
    """Multiply-accumulates of one sample, counted on shapes alone."""
    return float(count_macs(meta_copy(program), program.input.shape, program.input.dtype).total)


def parameters(program: Program) -> float:
    """All parameters."""
    return float(sum(tensor.numel() for tensor in logical_parameters(program)))


def nonzeros(program: Program) -> float:
    """Parameters that are not zero."""
    return float(sum(int(torch.count_nonzero(tensor)) for tensor in logical_parameters(program)))


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
    """The target as the user gave it, and what became of it: a sparsity counts what is removed."""
    return Reached(metric, wanted, 1 - left if metric == "sparsity" else left)


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
