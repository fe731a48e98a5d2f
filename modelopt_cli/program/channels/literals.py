"""Rewriting an operation for fewer channels: sizes, bounds, parts, orders."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from modelopt_cli.errors import ModeloptError
from modelopt_cli.program.calls import arguments, compute, operation, source, values_of
from modelopt_cli.program.channels.remaining import SmallerGraph
from modelopt_cli.program.channels.trace import CONSTANTS, Fetched
from modelopt_cli.program.spelling import rewrite


def _sizes(r: SmallerGraph, node: fx.Node, expected: Any) -> None:
    """``reshape``, ``expand``, ``unflatten`` and the like."""
    bound = arguments(node)
    name = next(name for name in ("size", "shape", "sizes") if name in bound)
    sizes = bound[name]
    if isinstance(sizes, fx.Node):  # another value's shape, which no longer fits
        sizes = [-1 if r.varies_with_batch(node, d) else size for d, size in enumerate(expected.shape)]
    rank = expected.dim() - len(sizes) + 1  # of what is unflattened
    start = int(bound["dim"]) % rank if "dim" in bound else 0
    sizes = [_one_size(r, node, size, start + i, expected) for i, size in enumerate(sizes)]
    node.kwargs = {**node.kwargs, name: tuple(sizes)}


def _one_size(r: SmallerGraph, node: fx.Node, size: Any, dim: int, expected: Tensor) -> Any:
    now = r.values[size.name] if isinstance(size, fx.Node) else size
    by_batch = r.varies_with_batch(node, dim)
    if now == expected.shape[dim] and (isinstance(size, fx.Node) or not by_batch):
        return size
    return -1 if by_batch or (operation(node) == "expand" and now == -1) else expected.shape[dim]


def _parts(r: SmallerGraph, node: fx.Node, expected: Any) -> None:
    """``chunk`` and ``split`` into parts that need no longer be equal."""
    bound = arguments(node)
    sizes = [part.shape[bound["dim"]] for part in expected]
    rewrite(node, "split", {"input": bound["input"], "split_size_or_sections": sizes, "dim": bound["dim"]})


def _padding(r: SmallerGraph, node: fx.Node, expected: Any) -> None:
    dense = r.labels_before(node)
    pads: list[int] = list(arguments(node)["pad"])
    for i in range(len(pads) // 2):
        dim = dense.dim() - 1 - i
        kept = r.remaining.kept_along(dense, dim)
        if kept is not None:
            before, after = pads[2 * i], dense.shape[dim] - pads[2 * i + 1]
            pads[2 * i], pads[2 * i + 1] = int((kept < before).sum()), int((kept >= after).sum())
    node.kwargs = {**node.kwargs, "pad": pads}


def _slices(r: SmallerGraph, node: fx.Node, expected: Any) -> None:
    """``x[:, a:b]`` and ``x[:, i]``: bounds among the places that are left."""
    bound = arguments(node)
    index, known = bound["index"], values_of(bound, r.trace.values)["index"]
    dense = r.labels_before(bound["input"])
    parts: list[Any] = list(index) if isinstance(index, tuple) else [index]
    dim = 0
    for place, part in enumerate(known if isinstance(known, tuple) else (known,)):
        if part is None:
            continue
        if part is ...:
            dim = dense.dim() - sum(p is not None for p in parts[place + 1 :])
            continue
        kept = r.remaining.kept_along(dense, dim)
        if kept is not None:
            remaining = _among(part, kept, dense.shape[dim])
            if remaining is None:
                pick(r, node, expected)
                return
            parts[place] = remaining
        dim += 1
    node.args = (bound["input"], tuple(parts) if isinstance(index, tuple) else parts[0])


def _narrow(r: SmallerGraph, node: fx.Node, expected: Any) -> None:
    tensor = source(node)
    dense, bound = r.labels_before(tensor), values_of(arguments(node), r.trace.values)
    dim = int(bound["dim"]) % dense.dim()
    kept = r.remaining.kept_along(dense, dim)
    if kept is None:
        raise _cannot(node)
    if operation(node) == "select":
        place = _among(bound["index"], kept, dense.shape[dim])
        rewrite(node, "select", {"input": tensor, "dim": dim, "index": place})
        return
    start = bound["start"] % dense.shape[dim]
    part = _among(slice(start, start + bound["length"]), kept, dense.shape[dim])
    bounds = {"start": part.start, "length": part.stop - part.start}
    rewrite(node, "narrow", {"input": tensor, "dim": dim, **bounds})


def pick(r: SmallerGraph, node: fx.Node, expected: Any) -> None:
    """Whatever reorders or picks channels becomes an ``index_select``."""
    tensor = source(node)
    if not isinstance(tensor, fx.Node):
        raise _cannot(node)
    dense = r.labels_before(tensor)
    dims = [d for d in range(dense.dim()) if r.remaining.kept_along(dense, d) is not None]
    if len(dims) != 1 or not isinstance(expected, Tensor) or expected.dim() != dense.dim():
        raise _cannot(node)
    select(r, node, tensor.name, dims[0], _picked(r, node, dense, dims[0]))


def _picked(r: SmallerGraph, node: fx.Node, dense: Tensor, dim: int) -> Tensor:
    """The positions along ``dim`` that the node reads, in its order."""
    place = torch.arange(dense.shape[dim])
    line = place.view([-1 if d == dim else 1 for d in range(dense.dim())]).expand(dense.shape)
    values: dict[str, Any] = {}
    for read in node.all_input_nodes:
        value = r.trace.values[read.name]
        values[read.name] = value.tensor.cpu() if isinstance(value, Fetched) else value
    picked: Tensor = compute(node, {**values, source(node).name: line.contiguous()})
    line = picked.movedim(dim, 0).flatten(1)[:, :1]
    if not torch.equal(
        line.expand(len(line), picked.numel() // len(line)), picked.movedim(dim, 0).flatten(1)
    ):
        raise _cannot(node)
    return line[:, 0]


def select(r: SmallerGraph, node: fx.Node, name: str, dim: int, index: Tensor) -> Tensor:
    """Make a node an ``index_select`` of an earlier one, with an index into what is left of that.

    Args:
        r: the smaller graph; gets the index tensor.
        node: changed in place.
        name: of the earlier node.
        dim: the dimension to pick along.
        index: positions in the whole.

    Returns:
        The node's labels that are left.
    """
    earlier = next(n for n in r.graph.nodes if n.name == name)
    dense = r.labels_before(earlier)
    kept = r.remaining.kept_along(dense, dim)
    assert kept is not None
    place = torch.full((dense.shape[dim],), -1)
    place[kept] = torch.arange(len(kept))
    remaining = place[index]
    path = f"{node.name}_channels"
    r.indices[path] = remaining[remaining >= 0]
    with r.graph.inserting_before(node):
        fetched = r.graph.create_node("get_attr", path, (), {})
    rewrite(node, "index_select", {"input": earlier, "dim": dim, "index": fetched})
    r.values[fetched.name] = Fetched(path, r.indices[path])
    return r.remaining.restrict(r.labels_before(node))  # type: ignore[no-any-return]


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


def _cannot(node: fx.Node) -> ModeloptError:
    return ModeloptError(f"cannot write {operation(node)} for fewer channels", where=node.name)


REWRITES: dict[str, Callable[[SmallerGraph, fx.Node, Any], None]] = {
    **dict.fromkeys(("reshape", "expand", "unflatten", "broadcast_to", *CONSTANTS), _sizes),
    **dict.fromkeys(("chunk", "split", "tensor_split"), _parts),
    **dict.fromkeys(("narrow", "select"), _narrow),
    "getitem": _slices,
    "pad": _padding,
}
"""Bare name of an operation to what rewrites it; the others become an ``index_select``."""
