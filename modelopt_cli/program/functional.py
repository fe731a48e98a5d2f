"""Making a graph pure: no call changes a tensor that something else can see.

    y = relu_(x); z = x + y      becomes      y = relu(x); z = y + y

A value that was changed is read as its new content from then on, and so is every other value that shares
its memory: what is a view of it is taken again from the new content, and what it is a view of gets the new
content put into its place (``allowlist.set_item``). ``torch.func.functionalize`` does that while a
network runs; here it is done once, to the graph. Which values share memory is seen by running the graph on
the meta device.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from modelopt_cli.errors import CaptureError
from modelopt_cli.program.allowlist import ASSIGNING, is_in_place
from modelopt_cli.program.calls import arguments, call, operation, owner_of, source
from modelopt_cli.program.input_batch import Inputs
from modelopt_cli.program.shapes import infer
from modelopt_cli.program.spelling import rewrite
from modelopt_cli.program.views import ViewError, put, put_part

_HINT = "write it without the in-place operation: y = f(x) in place of f_(x)"


def make_functional(
    graph: fx.Graph, root: nn.Module, inputs: Inputs, constants: Mapping[str, Tensor] | None = None
) -> None:
    """Turn every in-place call of a graph into a pure one, and let later readers read its result.

    Layers that work in place are told apart by their flag, which whoever copies them has to clear
    (``allocating``). A buffer that is changed has in every call the content that it has now: a counter that
    nobody reads goes, and what carries over to the next call is found when both are compared.

    Args:
        graph: changed in place; nodes that changed something keep their names.
        root: where its layers and tensors are; not changed.
        inputs: a batch on the meta device.
        constants: fetched tensors that the forward pass makes again at each call.

    Raises:
        CaptureError: a change that cannot be written so, with the layer's name: of a parameter, or through a
            view that has no inverse.
    """
    layers = dict(root.named_modules(remove_duplicate=False))
    if any(is_in_place(node, layers) for node in graph.nodes):
        parameters = {name for name, _ in root.named_parameters(remove_duplicate=False)}
        _Functional(graph, layers, infer(graph, root, inputs, constants), parameters).run()


def allocating(layer: nn.Module) -> nn.Module:
    """The layer itself, told to allocate its results."""
    if getattr(layer, "inplace", False):
        layer.inplace = False  # type: ignore[assignment]
    return layer


@dataclass(frozen=True)
class _Write:
    """One change: ``result`` is the content that ``target`` has from then on."""

    result: fx.Node
    target: fx.Node


class _Functional:
    """The graph while it is rewritten.

    A value's content is asked for by how many of the changes of its memory came before. The nodes of the
    original graph stand for memory, whatever has become of them.
    """

    def __init__(
        self,
        graph: fx.Graph,
        layers: Mapping[str, nn.Module],
        values: dict[fx.Node, Any],
        parameters: Collection[str],
    ) -> None:
        self.graph, self.layers, self.values, self.parameters = graph, layers, values, parameters
        self.writes: dict[int, list[_Write]] = {}
        self.born: dict[fx.Node, int] = {}
        self.above: dict[fx.Node, fx.Node | None] = {}
        self.read: dict[fx.Node, dict[fx.Node, fx.Node]] = {}
        self.target_of: dict[fx.Node, fx.Node] = {}
        self.contents: dict[tuple[fx.Node, int], fx.Node] = {}
        self.reader: fx.Node = next(iter(graph.nodes))

    def run(self) -> None:
        for node in list(self.graph.nodes):
            self.reader = node
            self.above[node] = above = self._view_of(node)
            picked = (
                node.op != "output" and above is not None and isinstance(self.values[above], tuple | list)
            )
            self.born[node] = self.born[above] if picked and above else self._count(node)
            if is_in_place(node, self.layers):
                self._write(node)
            elif not picked:  # a part of a tuple is the part it had when the tuple was made
                self._update(node)

    def _update(self, node: fx.Node) -> None:
        """Let a node read what its arguments hold now."""
        self.read[node] = now = {a: self._current(a, node) for a in node.all_input_nodes}
        node.args = fx.node.map_arg(node.args, now.__getitem__)
        node.kwargs = fx.node.map_arg(node.kwargs, now.__getitem__)

    def _write(self, node: fx.Node) -> None:
        target = node.kwargs.get("out", source(node))
        value = self.values[target] if isinstance(target, fx.Node) else None
        if isinstance(value, Tensor):
            first = self._path(target)[-1]
            if str(first.target) in self.parameters:
                raise self._refused(node, f"changes {first.target} in place")
        pure = None if node.op == "call_module" else self._purified(node)
        self._update(node)
        result = node if pure is None else self._typed(node, pure)
        if isinstance(value, Tensor):
            written = self.writes.setdefault(_storage(value), [])
            written.append(_Write(result, target))
            self.born[node] = len(written)
            self.target_of[node] = target
            self.contents[node, len(written)] = result

    def _purified(self, node: fx.Node) -> Any:
        """Make the call an allocating one; returns its value on the meta device."""
        node.kwargs = {key: value for key, value in node.kwargs.items() if key not in ("inplace", "out")}
        named = {key: value for key, value in arguments(node).items() if key not in ("inplace", "out")}
        if node.op == "call_method" and node.target in ASSIGNING:
            value = named.get("src", named.get("value", 0))
            rewrite(node, "set_item", {"input": named["input"], "index": ..., "value": value})
        else:
            rewrite(node, operation(node), named)

        def read(argument: fx.Node) -> Any:
            return self.values[argument]

        return call(node, fx.node.map_arg(node.args, read), fx.node.map_arg(node.kwargs, read))

    def _typed(self, node: fx.Node, pure: Any) -> fx.Node:
        """The node, or its value in the type of what it changed."""
        before = self.values[node]
        if not isinstance(before, Tensor) or before.dtype == pure.dtype:
            return node
        with self.graph.inserting_after(node):
            return self.graph.call_method("to", (node,), {"dtype": before.dtype})

    def _view_of(self, node: fx.Node) -> fx.Node | None:
        """The argument whose memory this value shares."""
        mine = {_storage(tensor) for tensor in _tensors(self.values[node])}
        for argument in node.all_input_nodes:
            if mine & {_storage(tensor) for tensor in _tensors(self.values[argument])}:
                return argument
        return None

    def _count(self, node: fx.Node) -> int:
        """Number of changes of a value's memory so far."""
        counts = {len(self.writes.get(_storage(t), ())) for t in _tensors(self.values[node])}
        return max(counts, default=0)

    def _current(self, node: fx.Node, reader: fx.Node) -> fx.Node:
        if node.op == "output":
            return node
        storages = {_storage(tensor) for tensor in _tensors(self.values[node])}
        changed = [storage for storage in storages if storage in self.writes]
        if not changed:
            return node
        if len(storages) > 1:
            raise self._refused(reader, f"reads {node.name}, part of which was changed in place")
        return self._content(node, len(self.writes[changed[0]]))

    def _content(self, node: fx.Node, count: int) -> fx.Node:
        """The node that holds the content of a value after the first ``count`` changes of its memory."""
        if count <= self.born[node]:
            return self.contents.get((node, count), node)
        if node in self.target_of:
            return self._content(self._itself(node), count)
        if (node, count) not in self.contents:
            self.contents[node, count] = self._changed(node, count)
        return self.contents[node, count]

    def _changed(self, node: fx.Node, count: int) -> fx.Node:
        """The content after the last of these changes, from that before or from the change itself."""
        (storage,) = {_storage(tensor) for tensor in _tensors(self.values[node])}
        write = self.writes[storage][count - 1]
        mine, theirs = self.values[node], self.values[write.target]
        if isinstance(mine, Tensor) and _geometry(mine) == _geometry(theirs):
            return write.result
        if not any(_overlap(tensor, theirs) for tensor in _tensors(mine)):
            return self._content(node, count - 1)
        path = self._path(write.target)
        if isinstance(mine, Tensor) and node in path:
            return self._put(node, path[: path.index(node)], count)
        above = self.above[node]
        if above is None:
            raise self._refused(write.result, f"changes what {node.name} reads in place")
        return self._again(node, above, count)

    def _again(self, node: fx.Node, above: fx.Node, count: int) -> fx.Node:
        """The same view of what it is a view of, after a change."""
        content = self._content(above, count)
        before = self.read.get(node, {}).get(above, above)
        with self.graph.inserting_before(self.reader):
            return self.graph.node_copy(node, lambda a: content if a is before else a)

    def _put(self, node: fx.Node, below: list[fx.Node], count: int) -> fx.Node:
        """A value with the new content of one of its views in its place."""
        child = below[-1]
        split = None
        if isinstance(self.values[child], tuple | list):  # the parts of a split, one of which was changed
            split, child = child, below[-2]
        content = self._content(child, count)
        mine = self.values[node]
        if _geometry(mine) == _geometry(self.values[child]):
            return content
        base = self._content(node, count - 1)
        kind = type(self.layers[str(child.target)]).__name__ if child.op == "call_module" else ""
        try:
            with self.graph.inserting_before(self.reader):
                if split is None:
                    return put(self.graph, base, content, child, mine.dim(), kind)
                place = arguments(child)["index"]
                return put_part(self.graph, base, content, split, self.values[split], place)
        except ViewError as error:
            raise self._refused(child, f"a value is changed in place through {error}") from error

    def _path(self, node: fx.Node) -> list[fx.Node]:
        """A value and what it is a view of, up to the one that has the memory, each tensor once.

        The result of a change is no view of what it changed but that itself.
        """
        path = [self._itself(node)]
        while (above := self.above[path[-1]]) is not None:
            path.append(self._itself(above))
        return path

    def _itself(self, node: fx.Node) -> fx.Node:
        """The tensor that a call returned, under the name that it had before it was first changed."""
        while node in self.target_of:
            node = self.target_of[node]
        return node

    def _refused(self, node: fx.Node, problem: str) -> CaptureError:
        return CaptureError(problem, where=owner_of(node), hint=_HINT)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for part in value for t in _tensors(part)] if isinstance(value, tuple | list) else []


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _geometry(tensor: Tensor) -> Any:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype


def _overlap(a: Tensor, b: Tensor) -> bool:
    """True if two tensors of one storage have an element in common."""
    if not a.numel() or not b.numel():
        return False
    places = [_places(tensor) for tensor in (a, b)]
    if places[0][-1] < places[1][0] or places[1][-1] < places[0][0]:
        return False
    return bool(torch.isin(places[0], places[1]).any())


def _places(tensor: Tensor) -> Tensor:
    """The offsets of all elements, in order."""
    places: Tensor = torch.tensor([tensor.storage_offset()])
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        places = (places[:, None] + torch.arange(size) * stride).flatten()
    ordered: Tensor = places.unique()
    return ordered
