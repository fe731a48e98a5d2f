"""How much each layer minds being pruned: the network's answers with one layer pruned at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from modelopt_cli.data import Data
from modelopt_cli.errors import UsageError
from modelopt_cli.methods.answers import Answers
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.prune.allocation import Curve
from modelopt_cli.program import Program

SPARSITIES = (0.25, 0.5, 0.75, 0.9)
"""Of the table."""
STEEP = (0.25, 0.5, 0.75, 0.9, 0.97)
"""Of the curves an allocation follows, which may go further."""
SAMPLES = 128
"""That are looked at, at most: every sparsity of every layer is a pass over all of them."""


@dataclass(frozen=True)
class Variant:
    """A network with one part of it pruned.

    Attributes:
        name: of the part: a layer, a group of channels, a block.
        layers: the layers it consists of.
        sparsity: how much of the part is gone, 0 to 1.
        make: makes it.
    """

    name: str
    layers: tuple[str, ...]
    sparsity: float
    make: Callable[[], Program]


class Prunes(Protocol):
    """What can be asked for variants: a pruner of structures."""

    context: Context

    @property
    def samples(self) -> Data | None:
        """Calibration samples."""

    def variants(self, program: Program, sparsities: Sequence[float]) -> Iterator[Variant]:
        """Variants, those of one part one after another, at rising sparsities."""


@dataclass(frozen=True)
class Point:
    """The answers at one sparsity, against those of the whole network.

    Attributes:
        sparsity: of the one part.
        divergence: mean over the samples of KL(whole || pruned) of the softmax outputs, in nats.
        agreement: share of the samples on which both name the same class, 0 to 1.
    """

    sparsity: float
    divergence: float
    agreement: float


@dataclass(frozen=True)
class Sensitivity:
    """One part of a network: a layer, a group of coupled layers, or a block.

    Attributes:
        name: of the part.
        layers: its layers.
        points: by rising sparsity.
    """

    name: str
    layers: tuple[str, ...]
    points: tuple[Point, ...]


def measure(pruner: Prunes, program: Program, sparsities: Sequence[float]) -> tuple[Sensitivity, ...]:
    """Prune one part at a time and compare the answers; no labels are needed.

    Args:
        pruner: says which parts there are.
        program: the whole network.
        sparsities: rising.

    Raises:
        UsageError: there are no data.
        DataError: they are empty, or the answers are not finite.
    """
    if pruner.samples is None:
        raise UsageError("a sensitivity is measured on data", hint="give --calib or --data")
    answers = Answers.of(program, pruner.samples, pruner.context, SAMPLES)
    variants = list(pruner.variants(program, sparsities))
    points: dict[str, list[Point]] = {}
    for done, variant in enumerate(variants, 1):
        point = Point(variant.sparsity, *answers.compare(variant.make()))
        points.setdefault(variant.name, []).append(point)
        if pruner.context.progress is not None:
            pruner.context.progress(done, len(variants))
    layers = {variant.name: variant.layers for variant in variants}
    return tuple(Sensitivity(name, layers[name], tuple(found)) for name, found in points.items())


def curves(table: Sequence[Sensitivity]) -> dict[str, Curve]:
    """For the allocation ``sensitivity``: of each part the sparsities and the divergence there.

    What lies beyond the last point is taken to cost as much again and one nat more, so that it goes last.
    """
    found: dict[str, Curve] = {}
    for part in table:
        points = [(point.sparsity, point.divergence) for point in part.points if point.sparsity < 1]
        worst = max((error for _, error in points), default=0.0)
        found[part.name] = [*points, (1.0, 2 * worst + 1)]
    return found
