"""Writing an operation anew for fewer channels: sizes, bounds, parts, orders."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from modelopt_cli.errors import ModeloptError
from modelopt_cli.program.channels.calls import argument, arguments, compute, operation
from modelopt_cli.program.channels.trace import Fetched

if TYPE_CHECKING:
    from modelopt_cli.program.channels.replay import Replay

_SIZE_NAMES = ("size", "shape", "sizes")


def _sizes(r: "Replay", node: fx.Node, expected: Any) -> None:
    """``view``, ``reshape``, ``expand``, ``unflatten`` and the like."""
    first = 2 if operation(node) == "unflatten" else 1
    given = list(node.args[first:]) or [v for k, v in node.kwargs.items() if k in _SIZE_NAMES]
    if len(given) == 1 and isinstance(given[0], list | tuple):
        given = list(given[0])
    rank = expected.dim() - len(given) + 1  # of what is unflattened
    dim: Any = argument(node.args, node.kwargs, 1, "dim") if first == 2 else 0
    start = int(dim) % rank if first == 2 else 0
    sizes = [_one_size(r, node, size, start + i, expected) for i, size in enumerate(given)]
    kept = {k: v for k, v in node.kwargs.items() if k not in _SIZE_NAMES}
    node.args, node.kwargs = (*node.args[:first], tuple(sizes)), kept


def _one_size(r: "Replay", node: fx.Node, size: Any, dim: int, expected: Tensor) -> Any:
    now = r.values[size.name] if isinstance(size, fx.Node) else size
    by_batch = r.varies_with_batch(node, dim)
    if now == expected.shape[dim] and (isinstance(size, fx.Node) or not by_batch):
        return size
    return -1 if by_batch or (operation(node) == "expand" and now == -1) else expected.shape[dim]


def _parts(r: "Replay", node: fx.Node, expected: Any) -> None:
    """``chunk`` and ``split`` into parts that need no longer be equal."""
    dim: Any = argument(node.args, node.kwargs, 2, "dim", 0)
    sizes = [part.shape[dim] for part in expected]
    source = _source(node)
    node.op, node.target = "call_function", torch.split
    node.args, node.kwargs = (source, sizes, dim), {}


def _padding(r: "Replay", node: fx.Node, expected: Any) -> None:
    dense = r.whole(node)
    pads: list[int] = list(argument(node.args, node.kwargs, 1, "pad"))
    for i in range(len(pads) // 2):
        dim = dense.dim() - 1 - i
        kept = r.left.kept_along(dense, dim)
        if kept is not None:
            before, after = pads[2 * i], dense.shape[dim] - pads[2 * i + 1]
            pads[2 * i], pads[2 * i + 1] = int((kept < before).sum()), int((kept >= after).sum())
    node.args, node.kwargs = replaced(node, 1, "pad", pads)


def _slices(r: "Replay", node: fx.Node, expected: Any) -> None:
    """``x[:, a:b]`` and ``x[:, i]``: bounds among the places that are left."""
    source, index = _source(node), node.args[1]
    dense, known = r.whole(source), arguments(node, r.trace.values)[0][1]
    parts: list[Any] = list(index) if isinstance(index, tuple) else [index]
    dim = 0
    for place, part in enumerate(known if isinstance(known, tuple) else (known,)):
        if part is None:
            continue
        if part is ...:
            dim = dense.dim() - sum(p is not None for p in parts[place + 1 :])
            continue
        kept = r.left.kept_along(dense, dim)
        if kept is not None:
            found = _among(part, kept, dense.shape[dim])
            if found is None:
                pick(r, node, expected)
                return
            parts[place] = found
        dim += 1
    node.args = (source, tuple(parts) if isinstance(index, tuple) else parts[0])


def _narrow(r: "Replay", node: fx.Node, expected: Any) -> None:
    source = _source(node)
    dense = r.whole(source)
    args, kwargs = arguments(node, r.trace.values)
    dim = int(argument(args, kwargs, 1, "dim")) % dense.dim()
    kept = r.left.kept_along(dense, dim)
    if kept is None:
        raise _cannot(node)
    if operation(node) == "select":
        found = _among(argument(args, kwargs, 2, "index"), kept, dense.shape[dim])
        node.args, node.kwargs = (source, dim, found), {}
        return
    start = argument(args, kwargs, 2, "start") % dense.shape[dim]
    found = _among(slice(start, start + argument(args, kwargs, 3, "length")), kept, dense.shape[dim])
    node.args, node.kwargs = (source, dim, found.start, found.stop - found.start), {}


def pick(r: "Replay", node: fx.Node, expected: Any) -> None:
    """Whatever reorders or picks channels becomes an ``index_select``."""
    source = _source(node)
    dense = r.whole(source)
    dims = [d for d in range(dense.dim()) if r.left.kept_along(dense, d) is not None]
    if len(dims) != 1 or not isinstance(expected, Tensor) or expected.dim() != dense.dim():
        raise _cannot(node)
    select(r, node, source.name, dims[0], _picked(r, node, dense, dims[0]))


def _picked(r: "Replay", node: fx.Node, dense: Tensor, dim: int) -> Tensor:
    """The positions along ``dim`` that the node reads, in its order."""
    args, kwargs = arguments(node, r.trace.values)
    place = torch.arange(dense.shape[dim])
    line = place.view([-1 if d == dim else 1 for d in range(dense.dim())]).expand(dense.shape)
    rest: Any = fx.node.map_aggregate(
        (args[1:], kwargs), lambda a: a.tensor.cpu() if isinstance(a, Fetched) else a
    )
    picked: Tensor = compute(node, (line.contiguous(), *rest[0]), rest[1])
    line = picked.movedim(dim, 0).flatten(1)[:, :1]
    if not torch.equal(
        line.expand(len(line), picked.numel() // len(line)), picked.movedim(dim, 0).flatten(1)
    ):
        raise _cannot(node)
    return line[:, 0]


def select(r: "Replay", node: fx.Node, source: str, dim: int, index: Tensor) -> Tensor:
    """Make a node an ``index_select`` of an earlier one, with an index into what is left of that.

    Args:
        r: the replay; gets the index tensor.
        node: changed in place.
        source: the earlier node's name.
        dim: the dimension to pick along.
        index: positions in the whole.

    Returns:
        The node's labels that are left.
    """
    earlier = next(n for n in r.graph.nodes if n.name == source)
    dense = r.whole(earlier)
    kept = r.left.kept_along(dense, dim)
    assert kept is not None
    place = torch.full((dense.shape[dim],), -1)
    place[kept] = torch.arange(len(kept))
    left = place[index]
    path = f"{node.name}_channels"
    r.indices[path] = left[left >= 0]
    with r.graph.inserting_before(node):
        fetched = r.graph.create_node("get_attr", path, (), {})
    node.op, node.target = "call_function", torch.index_select
    node.args, node.kwargs = (earlier, dim, fetched), {}
    r.values[fetched.name] = Fetched(path, r.indices[path])
    return r.left.restrict(r.whole(node))  # type: ignore[no-any-return]


def replaced(node: fx.Node, place: int, name: str, value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A node's arguments with one of them replaced."""
    if len(node.args) > place:
        return (*node.args[:place], value, *node.args[place + 1 :]), dict(node.kwargs)
    return node.args, {**node.kwargs, name: value}


def _among(part: Any, kept: Tensor, size: int) -> Any:
    """A slice or a place of the whole, as one of what is left; None where it is no plain slice."""
    if isinstance(part, int):
        return int((kept == part % size).nonzero()[0])
    if not isinstance(part, slice):
        return None
    inside = torch.zeros(size, dtype=torch.bool)
    inside[part] = True
    places = inside[kept].nonzero().flatten()
    first, last = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)
    contiguous = last - first == len(places) and part.step in (None, 1)
    return slice(first, last) if contiguous else None


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(source, fx.Node):
        raise _cannot(node)
    return source


def _cannot(node: fx.Node) -> ModeloptError:
    return ModeloptError(f"cannot write {operation(node)} anew for fewer channels", where=node.name)


REWRITES: dict[str, Callable[["Replay", fx.Node, Any], None]] = {
    **dict.fromkeys(("view", "reshape", "expand", "unflatten", "broadcast_to"), _sizes),
    **dict.fromkeys(("chunk", "split", "tensor_split"), _parts),
    **dict.fromkeys(("narrow", "select"), _narrow),
    "getitem": _slices,
    "pad": _padding,
}
"""Bare name of an operation to what writes it anew; the others become an ``index_select``."""
