"""Structures: the form in which weights are removed, and the zeros that some of them leave."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from modelopt_cli.lazy_names import deferred

if TYPE_CHECKING:
    from torch import Size, Tensor

    from modelopt_cli.methods.context import Context
    from modelopt_cli.program import Program


@dataclass(frozen=True)
class Granularity:
    """The size of the parts that go: what a criterion ranks and an allocation counts.

    Attributes:
        name: plural, for messages.
        leaves_zeros: the weights stay in the network as zeros; else its tensors become smaller.
        pruner: makes the ``Pruner`` of a Program from a ``PruneConfig``.
    """

    name: str
    leaves_zeros: bool
    pruner: Callable[[Program, Any, Context], Any]

    def __str__(self) -> str:
        return self.name


_PRUNE = "modelopt_cli.methods.prune"
WEIGHTS = Granularity(
    "weights", leaves_zeros=True, pruner=deferred(f"{_PRUNE}.weight_pruner", "WeightPruner")
)
CHANNELS = Granularity(
    "channels", leaves_zeros=False, pruner=deferred(f"{_PRUNE}.channel_pruner", "ChannelPruner")
)
LAYERS = Granularity("layers", leaves_zeros=False, pruner=deferred(f"{_PRUNE}.layer_pruner", "LayerPruner"))


@dataclass(frozen=True)
class SparsityPattern:
    """The zeros that a structure may put into a weight.

    Attributes:
        unit: neighbouring weights of a row that go together.
        keep: nonzeros that may stay in every ``group``.
        group: neighbouring input channels of which at most ``keep`` stay; 0 limits nothing.
    """

    unit: int = 1
    keep: int = 0
    group: int = 0

    @property
    def fixed(self) -> bool:
        """True if the pattern itself says how many weights go."""
        return self.group > 0

    @property
    def sparsity(self) -> float:
        """The fraction that a fixed pattern removes."""
        return 1 - self.keep / self.group

    @property
    def label(self) -> str | None:
        """The spelling that the codec ``sparse`` knows: ``N:M``, ``block:B``, or None for single weights."""
        if self.fixed:
            return f"{self.keep}:{self.group}"
        return f"block:{self.unit}" if self.unit > 1 else None

    def rows(self, weight: Tensor) -> Tensor:
        """A weight, or anything of its shape, with the direction in which neighbours are counted last.

        For N:M these are the input channels (dimension 1), separately for each kernel position, as
        sparse matrix kernels read them. For blocks it is the row of one output, in memory order.
        """
        return weight.movedim(1, -1) if self.fixed else weight.flatten(1)

    def unrows(self, rows: Tensor, shape: Size) -> Tensor:
        """The inverse of ``rows``."""
        return rows.movedim(-1, 1) if self.fixed else rows.reshape(shape)

    def grouped(self, rows: Tensor) -> Tensor:
        """``rows`` as ``(..., groups, members)``, the members being a block's or an N:M group's.

        The remainder at the end of a row, too short for a group, is left out.
        """
        size = self.group or self.unit
        count = rows.shape[-1] // size
        groups: Tensor = rows[..., : count * size].unflatten(-1, (count, size))
        return groups

    def units(self, scores: Tensor) -> Tensor:
        """The scores of what can be removed by itself, in a row; a block's is the sum of its weights'.

        Weights that are gone already score ``-inf``; a block of such weights only does so too.
        """
        if self.unit == 1:
            return scores.flatten()
        blocks = self.grouped(self.rows(scores))
        gone = blocks.isneginf()
        return blocks.masked_fill(gone, 0).sum(-1).masked_fill(gone.all(-1), float("-inf")).flatten()

    def obstacle(self, shape: Iterable[int]) -> str | None:
        """The reason why a weight of this shape can have no such zeros; None where it can."""
        _, *row = shape
        length, least = (row[0], self.group) if self.fixed else (prod(row), self.unit)
        if length >= least:
            return None
        return f"{length} {'input channels' if self.fixed else 'weights in a row'}, fewer than {least}"


@dataclass(frozen=True)
class Structure:
    """One form in which weights go.

    Attributes:
        help: one line.
        granularity: the size of the parts that go.
        pattern: the zeros that are left, from the config; None where the parts are really removed.
        spelling: of a structure with numbers in its name, what matches that.
        allocation: the one that it implies; None lets the user and the criterion choose.
        settings: fields of the config that have a meaning for it alone.
    """

    help: str
    granularity: Granularity
    pattern: Callable[[Any], SparsityPattern] | None = None
    spelling: re.Pattern[str] | None = None
    allocation: str | None = None
    settings: tuple[str, ...] = ()


_N_OF_M = re.compile(r"([1-9]\d?):([1-9]\d?)", re.ASCII)


def _n_of_m(config: Any) -> SparsityPattern:
    keep, group = map(int, config.structure.split(":"))
    return SparsityPattern(keep=keep, group=group)


STRUCTURES: dict[str, Structure] = {
    "unstructured": Structure(
        "single weights; the file shrinks, the speed stays", WEIGHTS, lambda config: SparsityPattern()
    ),
    "N:M": Structure(
        "at most N of every M neighbouring input weights stay, e.g. 2:4",
        WEIGHTS,
        _n_of_m,
        spelling=_N_OF_M,
        allocation="uniform",
    ),
    "block": Structure(
        "rows of --block neighbouring input weights",
        WEIGHTS,
        lambda config: SparsityPattern(unit=config.block),
        settings=("block",),
    ),
    "channels": Structure(
        "channels, units of linear layers and attention heads, really removed",
        CHANNELS,
        settings=("round_to",),
    ),
    "layers": Structure("residual blocks, and layers that keep the shape of their input", LAYERS),
}
"""By the name used on the command line."""

ACCELERATED = SparsityPattern(keep=2, group=4)
"""The zeros that CUDA's sparse matrix kernels leave out."""
