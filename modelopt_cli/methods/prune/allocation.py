"""Allocations: the fraction that each layer loses, so that all together lose the fraction asked for.

A layer consists of units (weights, blocks, channels) that all cost the same. It loses its units of the lowest
scores first; units that score ``-inf`` are gone already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING

from modelopt_cli.errors import UsageError
from modelopt_cli.lazy_names import deferred
from modelopt_cli.methods.prune.structures import CHANNELS, LAYERS, WEIGHTS, Granularity

if TYPE_CHECKING:
    from torch import Tensor

Curve = Sequence[tuple[float, float]]
"""Pairs of a layer's sparsity and the error that was measured there, by rising sparsity."""


@dataclass(frozen=True)
class Part:
    """One layer, or one group of coupled channels.

    Attributes:
        name: for errors.
        scores: one for each unit, flat.
        shape: of the weight, ``(out, in, *kernel)``.
        cost: of one unit.
        gone: number of units that are removed already.
        most: largest number of units that may be removed.
        curve: errors measured at some sparsities, for an allocation that needs them.
    """

    name: str
    scores: Tensor
    shape: tuple[int, ...]
    cost: float
    gone: int
    most: int
    curve: Curve = field(default=())

    @property
    def units(self) -> int:
        """Number of units, gone or not."""
        return self.scores.numel()

    def clip(self, count: float) -> float:
        """The nearest number of removed units that is allowed."""
        return min(max(count, self.gone), self.most)


def allocate(
    name: str,
    scores: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int]],
    sparsity: float,
    *,
    costs: Mapping[str, float] | None = None,
    curves: Mapping[str, Curve] | None = None,
    comparable: bool = True,
    least_kept: int = 1,
) -> dict[str, float]:
    """Divide an overall sparsity among layers or groups.

    Args:
        name: a key of ``ALLOCATIONS``.
        scores: of the units of each layer or group, any shape, by its name.
        shapes: of their weights, ``(out, in, *kernel)``.
        sparsity: fraction of the total cost to remove, 0 to 1.
        costs: of one unit of each; 1 by default.
        curves: errors of each, measured at some sparsities, for an allocation that needs them.
        comparable: scores of different layers mean the same; if not they are divided by their mean in
            each layer, so that every layer's average unit counts as 1.
        least_kept: units that every layer keeps at least, lest the network be cut in two.

    Returns:
        The sparsity of each, by name: an integer number of its units. The costs removed add up to the
        fraction asked for, to the nearest unit.

    Raises:
        UsageError: the sparsity cannot be reached, or curves are missing.
    """
    parts = [
        _part(
            key,
            score,
            tuple(shapes[key]),
            (costs or {}).get(key, 1.0),
            least_kept,
            (curves or {}).get(key, ()),
        )
        for key, score in scores.items()
    ]
    if not comparable:
        parts = [_normalised(part) for part in parts]
    total = sum(part.cost * part.units for part in parts)
    target = _checked(parts, sparsity * total, total)
    counts = _rounded(parts, ALLOCATIONS[name].choose(parts, target), target)
    return {part.name: count / part.units for part, count in zip(parts, counts, strict=True)}


def _part(
    name: str, scores: Tensor, shape: tuple[int, ...], cost: float, least_kept: int, curve: Curve
) -> Part:
    flat = scores.detach().flatten()
    gone = int(flat.isneginf().sum())
    return Part(name, flat, shape, cost, gone, max(gone, flat.numel() - least_kept), curve)


def _normalised(part: Part) -> Part:
    live = part.scores[~part.scores.isneginf()].double()
    mean = float(live.mean()) if live.numel() else 0.0
    return replace(part, scores=part.scores.double() / mean) if mean > 0 else part


def _checked(parts: Sequence[Part], target: float, total: float) -> float:
    gone, most = sum(part.cost * part.gone for part in parts), sum(part.cost * part.most for part in parts)
    unit = max((part.cost for part in parts), default=1.0)
    if target > most + unit / 2:
        raise UsageError(
            f"a sparsity of {target / total:.4g} cannot be reached: at most {most / total:.4g} can go",
            hint="ask for less, or exclude fewer layers",
        )
    if target < gone - unit / 2:
        raise UsageError(
            f"a sparsity of {target / total:.4g} is less than the {gone / total:.4g} already removed",
            hint="ask for more",
        )
    return target


def _rounded(parts: Sequence[Part], exact: Sequence[float], target: float) -> list[int]:
    """Integer numbers of units: rounded down, then by the largest remainder towards the target."""
    counts = [int(part.clip(int(count))) for part, count in zip(parts, exact, strict=True)]
    missing = target - sum(part.cost * n for part, n in zip(parts, counts, strict=True))
    step = 1 if missing > 0 else -1
    while True:
        order = sorted(range(len(parts)), key=lambda i: step * (counts[i] - exact[i]))
        before = missing
        for i in order:
            closer = abs(missing - step * parts[i].cost) < abs(missing)
            if closer and parts[i].gone <= counts[i] + step <= parts[i].most:
                counts[i] += step
                missing -= step * parts[i].cost
        if missing == before:
            return counts


def _uniform(parts: Sequence[Part], target: float) -> list[float]:
    return _solve(parts, target, lambda part, level: level * part.units)


def _erk(parts: Sequence[Part], target: float) -> list[float]:
    """density = level * (n_in + n_out + kh + kw) / (n_in * n_out * kh * kw), at most 1."""

    def removed(part: Part, level: float) -> float:
        # The level runs from dense to empty, as the search wants it.
        density = (1 / level - 1) * sum(part.shape) / prod(part.shape) if level > 0 else 1.0
        return part.units * (1 - min(1.0, density))

    return _solve(parts, target, removed)


def _solve(parts: Sequence[Part], target: float, removed: Callable[[Part, float], float]) -> list[float]:
    """Numbers at the level, between 0 and 1, at which the parts together lose the target, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(100):
        level = (low + high) / 2
        total = sum(part.cost * part.clip(removed(part, level)) for part in parts)
        low, high = (level, high) if total < target else (low, level)
    return [part.clip(removed(part, high)) for part in parts]


def _global(parts: Sequence[Part], target: float) -> list[float]:
    return _threshold(parts, [part.scores for part in parts], target)


def _lamp(parts: Sequence[Part], target: float) -> list[float]:
    return _threshold(parts, [lamp_scores(part.scores) for part in parts], target)


def lamp_scores(scores: Tensor) -> Tensor:
    """Each score divided by the sum of itself and all that are larger (Lee et al., eq. 5).

    Args:
        scores: flat; with squared weights (criterion ``l2``) this is the paper's own score.
    """
    ordered, order = scores.double().sort(stable=True)
    energy = ordered.clamp(min=0)
    remaining = energy.flip(0).cumsum(0).flip(0)
    lamp = (
        (energy / remaining).masked_fill(~(remaining > 0), 0).masked_fill(ordered.isneginf(), float("-inf"))
    )
    return lamp.new_empty(lamp.shape).scatter_(0, order, lamp)


def _threshold(parts: Sequence[Part], scores: Sequence[Tensor], target: float) -> list[float]:
    """Numbers of units below the one threshold at which all parts together lose the target."""
    import torch

    from modelopt_cli.methods.prune.masks import lowest

    pools = [score[lowest(score, part.most)].double() for part, score in zip(parts, scores, strict=True)]
    sizes = [len(pool) for pool in pools]
    costs = [part.cost for part in parts]
    if len(set(costs)) == 1:  # no sorting: finding the threshold takes a fraction of the time
        count = min(round(target / costs[0]), sum(sizes))
        taken = lowest(torch.cat(pools), count).split(sizes)
        return [float(marks.sum()) for marks in taken]
    # Units of different costs go one after another until the sum of their costs is nearest to the target.
    order = torch.cat(pools).sort(stable=True).indices
    owners = torch.repeat_interleave(torch.tensor(sizes))[order]
    running = torch.tensor(costs, dtype=torch.float64)[owners].cumsum(0)
    prefix = int((torch.cat((running.new_zeros(1), running)) - target).abs().argmin())
    return [float(n) for n in torch.bincount(owners[:prefix], minlength=len(parts)).tolist()]


@dataclass(frozen=True)
class Allocation:
    """One rule that divides an overall sparsity among layers.

    Attributes:
        help: one line.
        paper: where it was published.
        choose: numbers of units to remove, not rounded, from the parts and the cost to remove.
        granularities: of the parts that it can divide a sparsity among.
        compares_scores: it compares scores of different parts; else only their order within a part counts.
        needs_curves: it needs errors that are measured on data.
    """

    help: str
    paper: str
    choose: Callable[[Sequence[Part], float], list[float]]
    granularities: tuple[Granularity, ...] = (WEIGHTS, CHANNELS)
    compares_scores: bool = False
    needs_curves: bool = False


ALLOCATIONS: dict[str, Allocation] = {
    "uniform": Allocation("every layer the same fraction", "none", _uniform),
    "global": Allocation(
        "the least important of all layers together",
        "Han et al., Learning both Weights and Connections for Efficient Neural Networks, NIPS 2015",
        _global,
        (WEIGHTS, CHANNELS, LAYERS),
        compares_scores=True,
    ),
    "erk": Allocation(
        "layers with few weights for their size give less",
        "Evci et al., Rigging the Lottery: Making All Tickets Winners, ICML 2020",
        _erk,
    ),
    "lamp": Allocation(
        "the least important by their share of what is left in their layer",
        "Lee et al., Layer-adaptive Sparsity for Magnitude-based Pruning, ICLR 2021",
        _lamp,
        compares_scores=True,
    ),
    "sensitivity": Allocation(
        "what changes the outputs least, as measured on the data",
        "none",
        deferred("modelopt_cli.methods.prune.sensitivity", "follow_curves"),
        needs_curves=True,
    ),
}
"""By the name used on the command line."""
