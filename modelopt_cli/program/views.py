"""Inverses of views: putting the changed content of a view back into the tensor it is a view of."""

from operator import add
from typing import Any

import torch
from torch import fx

from modelopt_cli.program.allowlist import set_item
from modelopt_cli.program.calls import arguments, operation

_RESHAPES = (
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *("view_as", "reshape_as", "contiguous", "detach"),
)
_RESHAPING_LAYERS = ("Flatten", "Unflatten", "Identity")
_SPLITS = ("chunk", "split", "tensor_split", "unbind")


class ViewError(Exception):
    """A view that cannot be undone; the message names the operation."""


def put(graph: fx.Graph, base: fx.Node, content: fx.Node, view: fx.Node, rank: int, kind: str) -> fx.Node:
    """A value with new content in the place of one of its views.

    Args:
        graph: nodes are added at its insertion point.
        base: what the view is of.
        content: what the view holds now.
        view: the node that made it.
        rank: dimensions of ``base``.
        kind: class name of the layer that the node calls, or "".

    Raises:
        ViewError: the view is none of those that can be undone.
    """
    name = operation(view)
    if name in _RESHAPES or kind in _RESHAPING_LAYERS:
        return graph.call_method("reshape_as", (content, base))
    bound = arguments(view)
    if name == "permute":
        order = [d % rank for d in bound["dims"]]
        return graph.call_function(torch.permute, (content, tuple(order.index(d) for d in range(rank))))
    if name == "movedim":
        return graph.call_function(torch.movedim, (content, bound["destination"], bound["source"]))
    if name in ("transpose", "t") or view.target is getattr:  # each is its own inverse
        return graph.node_copy(view, lambda a: content)
    if name == "select":
        return _put_along(graph, base, content, bound["dim"] % rank, bound["index"])
    if name == "narrow":
        part = slice(bound["start"], _sum(graph, bound["start"], bound["length"]))
        return _put_along(graph, base, content, bound["dim"] % rank, part)
    if name == "getitem":
        return _put_item(graph, base, content, bound["index"])
    raise ViewError(name or kind or str(view.target))


def put_part(graph: fx.Graph, base: fx.Node, content: fx.Node, split: fx.Node, parts: Any, i: int) -> fx.Node:
    """A value with new content in the place of part ``i`` of a split of it; ``parts`` is what that gives.

    Raises:
        ViewError: the split is along the batch, or none that can be undone.
    """
    name = operation(split)
    if name not in _SPLITS:
        raise ViewError(name or str(split.target))
    i %= len(parts)
    dim = arguments(split)["dim"] % (parts[0].dim() + (name == "unbind"))
    if dim == 0:
        raise ViewError(f"{name} along the batch")
    start = sum(part.shape[dim] for part in parts[:i]) if name != "unbind" else i
    part = i if name == "unbind" else slice(start, start + parts[i].shape[dim])
    return _put_along(graph, base, content, dim, part)


def _sum(graph: fx.Graph, a: Any, b: Any) -> Any:
    symbolic = isinstance(a, fx.Node) or isinstance(b, fx.Node)
    return graph.call_function(add, (a, b)) if symbolic else a + b


def _put_along(graph: fx.Graph, base: fx.Node, content: fx.Node, dim: int, part: Any) -> fx.Node:
    return _put_item(graph, base, content, (*[slice(None)] * dim, part))


def _put_item(graph: fx.Graph, base: fx.Node, content: fx.Node, index: Any) -> fx.Node:
    return graph.call_function(set_item, (base, index, content))
