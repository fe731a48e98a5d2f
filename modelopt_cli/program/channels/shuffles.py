"""Reshapes that only reorder channels, such as ShuffleNet's channel shuffle."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from modelopt_cli.program.calls import compute, operation, source

CHAIN = ("reshape", "flatten", "unflatten", "permute", "transpose", "contiguous", "clone")
_MOST_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Selection:
    """A value that is ``source.index_select(dim, index)`` of an earlier one, by node name."""

    source: str
    dim: int
    index: Tensor


def find_shuffles(
    graph: fx.Graph, values: Mapping[str, Any], shapes: Mapping[str, Any]
) -> tuple[dict[str, Selection], frozenset[str]]:
    """Chains of reshape, transpose, reshape after which only the order along one dimension has changed.

    A chain is run on the positions of its elements, so what counts is what it does, not how it is
    written (channel shuffle: Zhang et al., CVPR 2018, section 3.1).

    Args:
        graph: the Program's.
        values: numbers and labels of its values at batch size 1.
        shapes: of its values.

    Returns:
        The selections by node name, and the nodes that lead only to them.
    """
    selections: dict[str, Selection] = {}
    inside: set[str] = set()
    for node in graph.nodes:
        chain = _chain(node, shapes)
        if chain is None:
            continue
        selection = _selection(source(chain[0]), chain, values, shapes)
        if selection is not None:
            selections[node.name] = selection
            inside.update(link.name for link in chain[:-1])
    return selections, frozenset(_leading_nowhere_else(graph, inside, selections))


def _chain(node: fx.Node, shapes: Mapping[str, Any]) -> list[fx.Node] | None:
    """The nodes from a value of the same shape to this node, if they split, swap and join again."""
    chain: list[fx.Node] = []
    swapped = False
    while operation(node) in CHAIN and isinstance(before := source(node), fx.Node):
        chain.insert(0, node)
        swapped |= operation(node) in ("permute", "transpose")
        if swapped and len(chain) > 2 and shapes[before.name] == shapes[chain[-1].name]:
            return chain
        node = before
    return None


def _selection(
    start: fx.Node, chain: list[fx.Node], values: Mapping[str, Any], shapes: Mapping[str, Any]
) -> Selection | None:
    shape = shapes[start.name]
    if not isinstance(shape, torch.Size) or math.prod(shape) > _MOST_ELEMENTS:
        return None
    before = torch.arange(math.prod(shape)).view(shape)
    local = dict(values)
    local[start.name] = after = before
    for link in chain:
        after = local[link.name] = compute(link, local)
    moved = [d for d in range(before.dim()) if not _same_along(before, after, d)]
    if len(moved) != 1:
        return None
    (dim,) = moved
    stride = before.stride(dim)
    index = after.movedim(dim, 0).flatten(1)[:, 0] // stride if after.dim() > 1 else after
    same = torch.equal(before.index_select(dim, index), after) if bool((index < shape[dim]).all()) else False
    return Selection(start.name, dim, index) if same else None


def _same_along(before: Tensor, after: Tensor, dim: int) -> bool:
    """True if every element kept its coordinate along a dimension."""
    stride, size = before.stride(dim), before.shape[dim]
    return torch.equal(before // stride % size, after // stride % size)


def _leading_nowhere_else(graph: fx.Graph, inside: set[str], selections: Mapping[str, Selection]) -> set[str]:
    """The nodes that nothing reads but one another and the selections."""
    kept = {node for node in graph.nodes if node.name in inside and node.name not in selections}
    while True:
        leaking = {
            node for node in kept if any(u not in kept and u.name not in selections for u in node.users)
        }
        if not leaking:
            return {node.name for node in kept}
        kept -= leaking
