"""Sensitivity of each layer to pruning: the change of the outputs with one layer pruned at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from modelopt_cli.errors import UsageError
from modelopt_cli.methods.prune.allocation import Curve, Part
from modelopt_cli.methods.prune.criteria import give_data
from modelopt_cli.methods.prune.pruner import Pruner
from modelopt_cli.methods.reference_outputs import ReferenceOutputs
from modelopt_cli.program import Program

SPARSITIES = (0.25, 0.5, 0.75, 0.9)
"""Sparsities of the table."""
STEEP = (0.25, 0.5, 0.75, 0.9, 0.97)
"""Sparsities of the curves that an allocation follows, which may go further."""
SAMPLES = 128
"""Largest number of samples: every sparsity of every layer is a pass over all of them."""


@dataclass(frozen=True)
class Point:
    """Comparison of the outputs at one sparsity with those of the original network.

    Attributes:
        sparsity: of the one part.
        divergence: mean over the samples of KL(original || pruned) of the softmax outputs, in nats.
        agreement: fraction of the samples for which both name the same class, 0 to 1.
    """

    sparsity: float
    divergence: float
    agreement: float


@dataclass(frozen=True)
class Sensitivity:
    """Sensitivity of one part of a network: a layer, a group of coupled layers, or a block.

    Attributes:
        name: of the part.
        layers: its layers.
        points: by rising sparsity.
    """

    name: str
    layers: tuple[str, ...]
    points: tuple[Point, ...]


def measure(pruner: Pruner, program: Program, sparsities: Sequence[float]) -> tuple[Sensitivity, ...]:
    """Prune one part at a time and compare the outputs; no labels are needed.

    Args:
        pruner: of the network; it says which parts there are.
        program: the network, unpruned or as an earlier round left it.
        sparsities: rising.

    Raises:
        UsageError: there are no data.
        DataError: they are empty, or the outputs are not finite.
    """
    if pruner.samples is None:
        raise UsageError("a sensitivity is measured on data", hint=give_data())
    outputs = ReferenceOutputs.of(program, pruner.samples, pruner.context, SAMPLES)
    variants = list(pruner.variants(program, sparsities))
    points: dict[str, list[Point]] = {}
    for done, variant in enumerate(variants, 1):
        point = Point(variant.sparsity, *outputs.compare(variant.make()))
        points.setdefault(variant.name, []).append(point)
        if pruner.context.progress is not None:
            pruner.context.progress(done, len(variants))
    layers = {variant.name: variant.layers for variant in variants}
    return tuple(Sensitivity(name, layers[name], tuple(own)) for name, own in points.items())


def curves(table: Sequence[Sensitivity]) -> dict[str, Curve]:
    """The sparsities and the divergences there, by part, for an allocation that follows them.

    Removing what lies beyond the last point is taken to cost as much again and one nat more, so that it
    goes last.
    """
    by_part: dict[str, Curve] = {}
    for part in table:
        points = [(point.sparsity, point.divergence) for point in part.points if point.sparsity < 1]
        worst = max((error for _, error in points), default=0.0)
        by_part[part.name] = [*points, (1.0, 2 * worst + 1)]
    return by_part


def follow_curves(parts: Sequence[Part], target: float) -> list[float]:
    """Allocation that removes units wherever the convex hull of the measured errors is flattest.

    Args:
        parts: layers or groups with their curves.
        target: cost to remove.

    Returns:
        The number of units to remove of each part, not rounded.

    Raises:
        UsageError: a part has no curve, or the curves end too early.
    """
    counts = [float(part.gone) for part in parts]
    missing = target - sum(part.cost * part.gone for part in parts)
    steps = [(*step, i) for i, part in enumerate(parts) for step in _steps(part)]
    # Within a part the hull rises ever more steeply, so that its steps come in their own order.
    for _, _, units, i in sorted(steps):
        taken = min(units, max(0.0, missing) / parts[i].cost)
        counts[i] += taken
        missing -= taken * parts[i].cost
    if missing > max(part.cost for part in parts) / 2:
        raise UsageError("the sensitivity curves end before this sparsity", hint="measure them further")
    return counts


def _steps(part: Part) -> list[tuple[float, float, float]]:
    """Edges of the hull where units may still go: error per cost, sparsity at the start, units."""
    corners = _hull(part)
    steps = []
    for (x0, y0), (x1, y1) in pairwise(corners):
        units = part.clip(x1 * part.units) - part.clip(x0 * part.units)
        if units > 0:
            steps.append(((y1 - y0) / ((x1 - x0) * part.units * part.cost), x0, units))
    return steps


def _hull(part: Part) -> list[tuple[float, float]]:
    """The lower convex hull of a part's curve, which starts where nothing is removed."""
    if not part.curve:
        raise UsageError("the allocation needs a measured curve", where=part.name)
    points = {0.0: 0.0} | dict(part.curve)
    corners: list[tuple[float, float]] = []
    for x, y in sorted(points.items()):
        while len(corners) > 1 and _above(corners[-2], corners[-1], (x, y)):
            corners.pop()
        corners.append((x, y))
    return corners


def _above(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """True if b is on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])
