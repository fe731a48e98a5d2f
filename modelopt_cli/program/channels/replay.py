"""Going through a graph once more, with the channels that are left."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from modelopt_cli.errors import ModeloptError
from modelopt_cli.program.calls import arguments, compute, operation, source, values_of
from modelopt_cli.program.channels.literals import REWRITES, pick, select
from modelopt_cli.program.channels.remaining import Remaining, SmallerGraph
from modelopt_cli.program.channels.ties import compact, nothing
from modelopt_cli.program.channels.trace import MOVES_ONLY, PLACES, Fetched, Trace, tensors_in


class Replay(SmallerGraph):
    """Makes every node do to what is left what it did to the whole.

    Operations that only move elements are tried on the labels that are left. Where that does not give
    the labels expected, the sizes they are called with are worked out again.

    Args:
        graph: a copy of the traced one; changed in place.
        trace: what is known of the whole.
        remaining: which channels stay.
        kept: for each tensor that shrinks, the positions that stay along each dimension that does.

    Raises:
        ModeloptError: an operation cannot be written for fewer channels; the analysis should have seen it.
    """

    def __init__(
        self, graph: fx.Graph, trace: Trace, remaining: Remaining, kept: Mapping[str, Mapping[int, Tensor]]
    ) -> None:
        super().__init__(graph, trace, remaining)
        self.kept = kept
        for node in list(graph.nodes):
            self.values[node.name] = self._value(node)

    def _value(self, node: fx.Node) -> Any:
        dense = self.trace.values[node.name]
        if node.op in ("placeholder", "output"):
            return dense
        if node.op == "get_attr":
            return self.remaining.restrict(self.labels_before(node)) if self.trace.is_loose(dense) else dense
        if node.name in self.trace.selections:
            chosen = self.trace.selections[node.name]
            if self.remaining.kept_along(self.trace.values[chosen.source], chosen.dim) is not None:
                return select(self, node, chosen.source, chosen.dim, chosen.index)
        expected = self.remaining.restrict(dense)
        if node.op == "call_module":
            return self._shuffled_layer(node, expected)
        if not tensors_in(dense):
            return compute(node, self._labelled(node))
        if operation(node) not in MOVES_ONLY or operation(node) in PLACES:
            self._keep_numbers(node)
        for name, line in self.trace.counted.get(node.name, {}).items():
            node.kwargs = {**node.kwargs, name: self.remaining.count(line)}
        if node.name in self.trace.sized:
            REWRITES[operation(node)](self, node, expected)
        if operation(node) not in MOVES_ONLY:
            return expected
        if isinstance(dense, Tensor) and not dense.numel():  # no labels say how large its other sides are
            return compute(node, self._labelled(node))
        as_it_is = node.name in self.trace.inside or self._reads_the_same(node)
        if not as_it_is and not self._fits(node, expected):
            self._rewrite(node, expected)
        return expected

    def _reads_the_same(self, node: fx.Node) -> bool:
        """True if nothing that goes into a node has changed."""
        names = [read.name for read in node.all_input_nodes]
        return all(self.values[name] is self.trace.values[name] for name in names)

    def _labelled(self, node: fx.Node) -> dict[str, Any]:
        """A node's inputs; fetched tensors without labels are such as to give the facts there will be."""
        read = {}
        for argument in node.all_input_nodes:
            value = self.values[argument.name]
            if isinstance(value, Fetched):
                value = self._without_labels(value, facts=not tensors_in(self.trace.values[node.name]))
            read[argument.name] = value
        return read

    def _without_labels(self, fetched: Fetched, *, facts: bool) -> Tensor:
        """A tensor with the shape that is left of a fetched one; for facts, with its type and device, too."""
        shape = list(fetched.tensor.shape)
        for dim, positions in self.kept.get(self.trace.name_of(fetched), {}).items():
            shape[dim] = len(positions)
        return fetched.tensor.detach().new_empty(()).expand(shape) if facts else nothing(shape)

    def _keep_numbers(self, node: fx.Node) -> None:
        """A size that scales values, as in attention, keeps the value it had."""
        if operation(node) == "scaled_dot_product_attention":
            self._keep_scale(node)

        def literal(arg: Any) -> Any:
            if not isinstance(arg, fx.Node):
                return arg
            before, now = self.trace.values[arg.name], self.values[arg.name]
            return before if isinstance(before, int | float) and before != now else arg

        node.args = fx.node.map_aggregate(node.args, literal)
        node.kwargs = fx.node.map_aggregate(node.kwargs, literal)
        if operation(node) in ("layer_norm", "rms_norm"):
            rank = len(values_of(arguments(node), self.trace.values)["normalized_shape"])
            shape = list(self.remaining.restrict(self.labels_before(node)).shape[-rank:])
            node.kwargs = {**node.kwargs, "normalized_shape": shape}

    def _keep_scale(self, node: fx.Node) -> None:
        bound = arguments(node)
        query = bound["query"]
        width = self.labels_before(query).shape[-1]
        if self.values[query.name].shape[-1] != width and bound["scale"] is None:
            node.kwargs = {**node.kwargs, "scale": width**-0.5}

    def _fits(self, node: fx.Node, expected: Any) -> bool:
        """True if the node, as it is, turns the labels left of its arguments into those expected."""
        values = self._labelled(node)
        bound = values_of(arguments(node), values)
        if operation(node) == "pad":
            return self._stays_whole(self.labels_before(node), _padded_dims(bound))
        looked_up = _looked_up_dim(node, bound)
        if looked_up is not None:
            return self._stays_whole(self.labels_before(source(node)), [looked_up])
        try:
            return self._equal(compute(node, values), expected)
        except (RuntimeError, IndexError, TypeError, ValueError):
            return False

    def _stays_whole(self, dense: Tensor, dims: Iterable[int]) -> bool:
        return all(self.remaining.kept_along(dense, dim) is None for dim in dims)

    def _equal(self, now: Any, expected: Any) -> bool:
        """True if two values have the same shape and the same classes in the same places."""
        if isinstance(expected, tuple | list):
            return len(now) == len(expected) and all(map(self._equal, now, expected))
        if not isinstance(now, Tensor) or now.shape != expected.shape:
            return False
        return torch.equal(*map(self.trace.ties.find, compact(now, expected)))

    def _rewrite(self, node: fx.Node, expected: Any) -> None:
        if operation(node) in PLACES and self._loses_nothing(source(node)):
            return  # frozen here, so that labels do not say what it does
        REWRITES.get(operation(node), pick)(self, node, expected)
        checked = operation(node) not in ("index_select", "pad")
        if checked and not self._fits(node, expected):
            raise ModeloptError(f"cannot write {operation(node)} for fewer channels", where=node.name)

    def _loses_nothing(self, node: Any) -> bool:
        dense = self.labels_before(node) if isinstance(node, fx.Node) else None
        return isinstance(dense, Tensor) and self._stays_whole(dense, range(dense.dim()))

    def _shuffled_layer(self, node: fx.Node, expected: Any) -> Any:
        layer = self.trace.program.get_submodule(str(node.target))
        if type(layer) is not nn.ChannelShuffle:
            return expected
        dense = self.labels_before(source(node))
        if self.remaining.kept_along(dense, 1) is None:
            return expected
        order = layer(torch.arange(dense.shape[1]).view(1, -1, 1, 1)).flatten()
        return select(self, node, source(node).name, 1, order)


def _looked_up_dim(node: fx.Node, bound: Mapping[str, Any]) -> int | None:
    """The dimension along which a node reads places that an index tensor names."""
    if operation(node) == "index_select":
        return int(bound["dim"])
    if operation(node) != "getitem" or not isinstance(bound["input"], Tensor):
        return None
    index = bound["index"] if isinstance(bound["index"], tuple) else (bound["index"],)
    return next((d for d, part in enumerate(index) if isinstance(part, Tensor | list)), None)


def _padded_dims(bound: Mapping[str, Any]) -> list[int]:
    return [bound["input"].dim() - 1 - i // 2 for i, amount in enumerate(bound["pad"]) if amount]
