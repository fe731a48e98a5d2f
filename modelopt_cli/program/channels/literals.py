"""Sizes written into a graph, once channels are gone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from modelopt_cli.errors import ModeloptError
from modelopt_cli.program.channels.calls import argument, arguments, compute, operation
from modelopt_cli.program.channels.remaining import Remaining
from modelopt_cli.program.channels.trace import Fetched, Trace

_SHAPE_ONLY = frozenset(
    [
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "permute",
        "transpose",
        "t",
        "movedim",
        "squeeze",
        "unsqueeze",
        "expand",
        "expand_as",
        "repeat",
        "repeat_interleave",
        "tile",
        "broadcast_to",
        "chunk",
        "split",
        "tensor_split",
        "unbind",
        "narrow",
        "select",
        "roll",
        "flip",
        "cat",
        "stack",
        "getitem",
        "index_select",
        "pad",
        "channel_shuffle",
    ]
)


class Rewriter:
    """Goes through a graph in order and makes every node do to what is left what it did to the whole.

    Operations that only move elements are tried on the labels that are left. Where that does not give
    the labels expected, the sizes they are called with are worked out anew.

    Attributes:
        values: labels that are left, and numbers, by node name.
        indices: new index tensors, by path.
    """

    def __init__(self, graph: fx.Graph, trace: Trace, left: Remaining, shapes: dict[str, Any]) -> None:
        self.graph, self.trace, self.left = graph, trace, left
        self.shapes = shapes
        self.values: dict[str, Any] = {}
        self.indices: dict[str, Tensor] = {}

    def run(self) -> None:
        """Rewrite all nodes."""
        for node in list(self.graph.nodes):
            self.values[node.name] = self._value(node)

    def _value(self, node: fx.Node) -> Any:
        dense = self.trace.values[node.name]
        if node.op in ("placeholder", "output"):
            return dense
        if node.op == "get_attr":
            return self._fetched(dense)
        if node.name in self.trace.selections:
            chosen = self.trace.selections[node.name]
            source = self.trace.values[chosen.source]
            if self.left.kept_along(source, chosen.dim) is not None:
                return self._select(node, chosen.source, chosen.dim, chosen.index)
        expected = self.left.restrict(dense)
        if node.op == "call_module":
            return self._shuffled_layer(node, expected)
        if not _holds_tensor(dense):
            return self._number(node, dense)
        if operation(node) not in _SHAPE_ONLY:
            self._keep_numbers(node)
            return expected
        if node.name not in self.trace.inside and not self._fits(node, expected):
            self._rewrite(node, expected)
        return expected

    def _dense(self, node: Any) -> Any:
        """The labels a value had before."""
        return self.trace.labels(self.trace.values[node.name])

    def _fetched(self, dense: Fetched) -> Any:
        labels = self.trace.labels(dense)
        restricted = self.left.restrict(labels)
        return restricted if dense.tensor.is_floating_point() else dense

    def _number(self, node: fx.Node, dense: Any) -> Any:
        args, kwargs = arguments(node, self.values)
        if any(value is None for value in args[:1]):
            return dense
        return compute(node, args, kwargs)

    def _keep_numbers(self, node: fx.Node) -> None:
        """A size that scales values, as in attention, keeps the value it had."""
        if operation(node) == "scaled_dot_product_attention":
            self._keep_scale(node)

        def literal(arg: Any) -> Any:
            if not isinstance(arg, fx.Node):
                return arg
            before, now = self.trace.values[arg.name], self.values[arg.name]
            number = isinstance(before, int | float) and not isinstance(before, bool)
            return before if number and before != now else arg

        node.args = fx.node.map_aggregate(node.args, literal)  # type: ignore[assignment]
        node.kwargs = fx.node.map_aggregate(node.kwargs, literal)  # type: ignore[assignment]
        if operation(node) in ("layer_norm", "rms_norm"):
            rank = len(argument(node.args, node.kwargs, 1, "normalized_shape"))
            shape = list(self.left.restrict(self.trace.values[node.name]).shape[-rank:])
            node.args, node.kwargs = _replaced(node, 1, "normalized_shape", shape)

    def _keep_scale(self, node: fx.Node) -> None:
        query = argument(node.args, node.kwargs, 0, "query")
        width = self.trace.values[query.name].shape[-1]
        if self.values[query.name].shape[-1] != width and node.kwargs.get("scale") is None:
            node.kwargs = {**node.kwargs, "scale": width**-0.5}

    def _fits(self, node: fx.Node, expected: Any) -> bool:
        """Whether the node, as it is, turns what is left of its arguments into what should be left."""
        args, kwargs = arguments(node, self.values)
        args, kwargs = _plain(self.trace, args), _plain(self.trace, kwargs)
        if operation(node) == "pad":
            return _unchanged_along(self.left, self.trace.values[node.name], _padded_dims(args, kwargs))
        looked_up = _looked_up_dim(node, args, kwargs)
        if looked_up is not None:
            return _unchanged_along(self.left, self._dense(node.args[0]), [looked_up])
        try:
            if operation(node) == "view":
                return _equal(args[0].reshape(*args[1:], **kwargs), expected)
            return _equal(compute(node, args, kwargs), expected)
        except (RuntimeError, IndexError, TypeError, ValueError):
            return False

    def _indexes_whole(self, node: fx.Node) -> bool:
        """Whether no dimension that a node picks positions of by a tensor, or bounds, loses any."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        dense = self.trace.labels(self.trace.values[source.name])
        args, kwargs = arguments(node, self.trace.values)
        if operation(node) == "index_select":
            return self.left.kept_along(dense, int(argument(args, kwargs, 1, "dim"))) is None
        if operation(node) != "getitem":
            return False
        parts = args[1] if isinstance(args[1], tuple) else (args[1],)
        if any(part is None or part is ... or isinstance(part, list) for part in parts):
            return False
        masks = [p for p in parts if isinstance(p, Fetched) and p.tensor.dtype == torch.bool]
        return not masks and all(self.left.kept_along(dense, d) is None for d in range(len(parts)))

    def _rewrite(self, node: fx.Node, expected: Any) -> None:
        rewrite = _REWRITES.get(operation(node), Rewriter._pick)
        rewrite(self, node, expected)
        checked = operation(node) not in ("index_select", "pad")
        if checked and not self._fits(node, expected):
            raise ModeloptError(f"cannot write {operation(node)} anew for fewer channels", where=node.name)

    def _sizes(self, node: fx.Node, expected: Any) -> None:
        """``view``, ``reshape``, ``expand``, ``unflatten`` and the like."""
        first = 2 if operation(node) == "unflatten" else 1
        given = list(node.args[first:]) or [v for k, v in node.kwargs.items() if k in _SIZE_NAMES]
        if len(given) == 1 and isinstance(given[0], list | tuple):
            given = list(given[0])
        rank = expected.dim() - len(given) + 1  # of what is unflattened
        start = int(argument(node.args, node.kwargs, 1, "dim")) % rank if first == 2 else 0
        sizes = [self._one_size(node, size, start + i, expected) for i, size in enumerate(given)]
        kept = {k: v for k, v in node.kwargs.items() if k not in _SIZE_NAMES}
        node.args, node.kwargs = (*node.args[:first], tuple(sizes)), kept

    def _one_size(self, node: fx.Node, size: Any, dim: int, expected: Tensor) -> Any:
        now = self.values[size.name] if isinstance(size, fx.Node) else size
        by_batch = self.shapes[node.name][dim] != self.trace.shapes[node.name][dim]
        if now == expected.shape[dim] and (isinstance(size, fx.Node) or not by_batch):
            return size
        return -1 if by_batch or (operation(node) == "expand" and now == -1) else expected.shape[dim]

    def _parts(self, node: fx.Node, expected: Any) -> None:
        """``chunk`` and ``split`` into parts that need no longer be equal."""
        dim = argument(node.args, node.kwargs, 2, "dim", 0)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        sizes = [part.shape[dim] for part in expected]
        node.op, node.target = "call_function", torch.split
        node.args, node.kwargs = (source, sizes, dim), {}

    def _padding(self, node: fx.Node, expected: Any) -> None:
        dense = self.trace.values[node.name]
        pads = list(argument(node.args, node.kwargs, 1, "pad"))
        for i in range(len(pads) // 2):
            dim = dense.dim() - 1 - i
            kept = self.left.kept_along(dense, dim)
            if kept is not None:
                before, after = pads[2 * i], dense.shape[dim] - pads[2 * i + 1]
                pads[2 * i], pads[2 * i + 1] = int((kept < before).sum()), int((kept >= after).sum())
        node.args, node.kwargs = _replaced(node, 1, "pad", pads)

    def _slices(self, node: fx.Node, expected: Any) -> None:
        """``x[:, a:b]`` and ``x[:, i]``: bounds among the places that are left."""
        source, index = node.args
        assert isinstance(source, fx.Node)
        dense = self._dense(source)
        parts = list(index) if isinstance(index, tuple) else [index]
        known = fx.node.map_aggregate(
            parts, lambda a: self.trace.values[a.name] if isinstance(a, fx.Node) else a
        )
        dim = 0
        for place, part in enumerate(list(known)):  # type: ignore[arg-type]
            if part is None:
                continue
            if part is ...:
                dim = dense.dim() - sum(p is not None and p is not ... for p in parts[place + 1 :])
                continue
            kept = self.left.kept_along(dense, dim)
            if kept is not None:
                found = _among(part, kept, dense.shape[dim])
                if found is None:
                    return self._pick(node, expected)
                parts[place] = found
            dim += 1
        node.args = (source, tuple(parts) if isinstance(index, tuple) else parts[0])
        return None

    def _narrow(self, node: fx.Node, expected: Any) -> None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        dense = self._dense(source)
        args, kwargs = arguments(node, self.trace.values)
        dim = argument(args, kwargs, 1, "dim") % dense.dim()
        kept = self.left.kept_along(dense, dim)
        assert kept is not None
        if operation(node) == "select":
            found = _among(argument(args, kwargs, 2, "index"), kept, dense.shape[dim])
            node.args, node.kwargs = (source, dim, found), {}
            return
        start = argument(args, kwargs, 2, "start")
        found = _among(slice(start, start + argument(args, kwargs, 3, "length")), kept, dense.shape[dim])
        assert isinstance(found, slice)
        node.args, node.kwargs = (source, dim, found.start, found.stop - found.start), {}

    def _pick(self, node: fx.Node, expected: Any) -> None:
        """Whatever reorders or picks channels becomes an ``index_select``."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        dense = self._dense(source)
        dims = [d for d in range(dense.dim()) if self.left.kept_along(dense, d) is not None]
        if len(dims) != 1 or not isinstance(expected, Tensor):
            raise ModeloptError(f"cannot write {operation(node)} anew for fewer channels", where=node.name)
        (dim,) = dims
        self._select(node, source.name, dim, self._picked(node, dense, dim))

    def _picked(self, node: fx.Node, dense: Tensor, dim: int) -> Tensor:
        """The positions along ``dim`` that the node reads, in its order."""
        args, kwargs = arguments(node, self.trace.values)
        place = torch.arange(dense.shape[dim])
        line = place.view([-1 if d == dim else 1 for d in range(dense.dim())]).expand(dense.shape)
        real = fx.node.map_aggregate((args[1:], kwargs), lambda a: a.tensor if isinstance(a, Fetched) else a)
        picked = compute(node, (line.contiguous(), *real[0]), real[1])  # type: ignore[index, arg-type, call-overload]
        return picked.movedim(dim, 0).flatten(1)[:, 0]  # type: ignore[no-any-return]

    def _select(self, node: fx.Node, source: str, dim: int, index: Tensor) -> Tensor:
        """Make a node an ``index_select`` of an earlier one, with an index into what is left of that."""
        earlier = next(n for n in self.graph.nodes if n.name == source)
        kept = self.left.kept_along(self._dense(earlier), dim)
        assert kept is not None
        place = torch.full((self._dense(earlier).shape[dim],), -1)
        place[kept] = torch.arange(len(kept))
        left = place[index]
        path = f"{node.name}_channels"
        self.indices[path] = left[left >= 0]
        with self.graph.inserting_before(node):
            fetched = self.graph.create_node("get_attr", path, (), {})
        node.op, node.target = "call_function", torch.index_select
        node.args, node.kwargs = (earlier, dim, fetched), {}
        self.values[fetched.name] = Fetched(path, self.indices[path])
        return self.left.restrict(self.trace.values[node.name])  # type: ignore[no-any-return]

    def _shuffled_layer(self, node: fx.Node, expected: Any) -> Any:
        layer = self.trace.program.get_submodule(str(node.target))
        if type(layer) is torch.nn.ChannelShuffle:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            dense = self._dense(source)
            if self.left.kept_along(dense, 1) is not None:
                order = layer(torch.arange(dense.shape[1]).view(1, -1, 1, 1)).flatten()
                return self._select(node, source.name, 1, order)
        return expected


_SIZE_NAMES = ("size", "shape", "sizes")
_REWRITES: dict[str, Callable[[Rewriter, fx.Node, Any], None]] = {
    **dict.fromkeys(("view", "reshape", "expand", "unflatten", "broadcast_to"), Rewriter._sizes),
    **dict.fromkeys(("chunk", "split", "tensor_split"), Rewriter._parts),
    **dict.fromkeys(("narrow", "select"), Rewriter._narrow),
    "getitem": Rewriter._slices,
    "pad": Rewriter._padding,
}


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


def _replaced(node: fx.Node, place: int, name: str, value: Any) -> Any:
    """Arguments with one of them replaced."""
    if len(node.args) > place:
        return (*node.args[:place], value, *node.args[place + 1 :]), dict(node.kwargs)
    return node.args, {**node.kwargs, name: value}


def _plain(trace: Trace, values: Any) -> Any:
    return fx.node.map_aggregate(values, lambda a: trace.labels(a) if isinstance(a, Fetched) else a)


def _looked_up_dim(node: fx.Node, args: Any, kwargs: Any) -> int | None:
    """The dimension along which a node reads places that an index tensor names."""
    if operation(node) == "index_select":
        return int(argument(args, kwargs, 1, "dim"))
    if operation(node) != "getitem" or not isinstance(args[0], Tensor):
        return None
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return next((d for d, part in enumerate(index) if isinstance(part, Tensor | list)), None)


def _padded_dims(args: Any, kwargs: Any) -> list[int]:
    pads = argument(args, kwargs, 1, "pad")
    return [args[0].dim() - 1 - i // 2 for i, amount in enumerate(pads) if amount]


def _unchanged_along(left: Remaining, dense: Tensor, dims: list[int]) -> bool:
    return all(left.kept_along(dense, dim) is None for dim in dims)


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(_holds_tensor(part) for part in value)
    return isinstance(value, Tensor | Fetched)


def _equal(now: Any, expected: Any) -> bool:
    if isinstance(expected, tuple | list):
        return len(now) == len(expected) and all(map(_equal, now, expected))
    return isinstance(now, Tensor) and now.shape == expected.shape and torch.equal(now, expected)
