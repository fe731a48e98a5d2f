"""Labels that are left once some atoms are removed."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from modelopt_cli.errors import UsageError
from modelopt_cli.program.channels.dependencies import Dependencies, Group
from modelopt_cli.program.channels.ties import Ties
from modelopt_cli.program.channels.trace import Trace


class Remaining:
    """Channels that stay.

    Args:
        dependencies: the groups.
        keep: group name to the units that stay; all units of a group that is not named.

    Raises:
        UsageError: no such group or unit, or no unit left.
    """

    def __init__(self, dependencies: Dependencies, keep: Mapping[str, Sequence[int]]) -> None:
        self._ties: Ties = dependencies.trace.ties
        self._gone = torch.zeros(len(self._ties), dtype=torch.bool)
        groups = {group.name: group for group in dependencies.groups}
        for name, units in keep.items():
            if name not in groups:
                raise UsageError("no channels can be removed here", where=name)
            stays = _stays(groups[name], units)
            self._gone[dependencies.classes[name][~stays]] = True

    def alive(self, labels: Tensor) -> Tensor:
        """A mask of the labels that stay; what is no channel does."""
        if not len(self._ties):
            return torch.ones_like(labels, dtype=torch.bool)
        return (labels < 0) | ~self._gone[self._ties.find(labels).clamp(min=0)]

    def kept(self, line: Tensor) -> Tensor:
        """The positions along a line that stay."""
        return self.alive(line).nonzero().flatten()

    def count(self, line: Tensor) -> int:
        """Number of positions along a line that stay."""
        return int(self.alive(line).sum())

    def kept_along(self, labels: Tensor, dim: int) -> Tensor | None:
        """The positions that stay along a dimension; None where nothing goes.

        A position goes when everything at it does.
        """
        moved = labels.movedim(dim, 0)
        small = moved[(slice(None), *[slice(0, 1) if s == 0 else slice(None) for s in moved.stride()[1:]])]
        if labels.dim() == 0 or (labels.stride(dim) == 0 or labels.shape[dim] < 2):
            return None
        stays = self.alive(small).reshape(len(small), -1).any(1)
        return None if bool(stays.all()) else stays.nonzero().flatten()

    def restrict(self, value: Any) -> Any:
        """The labels that stay, as a smaller tensor; tuples part by part, numbers as they are."""
        if isinstance(value, tuple) and not isinstance(value, torch.Size):
            parts = [self.restrict(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if not isinstance(value, Tensor):
            return value
        result = value
        for dim in range(value.dim()):
            kept = self.kept_along(value, dim)
            if kept is not None:
                result = _take(result, dim, kept)
        return result


class SmallerGraph:
    """A graph on its way to fewer channels, and what is known of it so far.

    Args:
        graph: a copy of the traced one; changed in place.
        trace: labels of the whole graph.
        remaining: which channels stay.

    Attributes:
        values: labels that are left, and numbers, by node name, for the nodes that were rewritten.
        indices: new index tensors, by path.
    """

    def __init__(self, graph: fx.Graph, trace: Trace, remaining: Remaining) -> None:
        self.graph, self.trace, self.remaining = graph, trace, remaining
        self.values: dict[str, Any] = {}
        self.indices: dict[str, Tensor] = {}

    def labels_before(self, node: Any) -> Tensor:
        """The labels a tensor value had before."""
        return self.trace.labels(self.trace.values[node.name])

    def varies_with_batch(self, node: fx.Node, dim: int) -> bool:
        """True if this dimension of a node's value depends on the batch size."""
        return bool(self.trace.batched[node.name][dim] != self.trace.shapes[node.name][dim])


def _take(labels: Tensor, dim: int, kept: Tensor) -> Tensor:
    """``index_select`` that leaves dimensions of stride 0 as they are."""
    small = labels[tuple(slice(0, 1) if s == 0 else slice(None) for s in labels.stride())]
    shape = [len(kept) if d == dim else n for d, n in enumerate(labels.shape)]
    return small.index_select(dim, kept).expand(shape)


def _stays(group: Group, units: Sequence[int]) -> Tensor:
    chosen = torch.as_tensor(list(units), dtype=torch.int64)
    if not len(chosen):
        raise UsageError("all channels would go", where=group.name, hint="keep at least one")
    if int(chosen.min()) < 0 or int(chosen.max()) >= group.units or len(chosen.unique()) < len(chosen):
        raise UsageError(f"units to keep are distinct and 0 to {group.units - 1}", where=group.name)
    if len(chosen) % group.step:
        raise UsageError(f"the units kept must be a multiple of {group.step}", where=group.name)
    stays = torch.zeros(group.units, dtype=torch.bool)
    stays[chosen] = True
    return stays
