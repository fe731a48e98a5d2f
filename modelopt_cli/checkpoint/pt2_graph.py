"""The graph in a ``.pt2`` file: JSON to a graph of ATen operators, without ``torch.export.load``.

Only its values are believed, and each is checked: an operator is looked up in a table, a value must have been
made before, and no expression is evaluated. Symbolic sizes are computed by the graph's own nodes; of the
expressions next to shapes no more is read than that there is one.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from modelopt_cli.checkpoint.pt2_arguments import MAX_ITEMS, argument, name_in, pairs, single
from modelopt_cli.errors import ArtifactError, CaptureError
from modelopt_cli.program.aten_network import RANK
from modelopt_cli.program.aten_table import aten_callable
from modelopt_cli.program.metadata import MAX_NODES, listed, mapped
from modelopt_cli.program.safe_names import is_path, shown
from modelopt_cli.text import short

_NO_GRAD = "torch.ops.higher_order.wrap_with_set_grad_enabled"
_MODES = ("training", "train")
_MAX_DEPTH = 8


@dataclass
class ReadGraph:
    """A graph as it is read.

    Attributes:
        graph: placeholders, fetched tensors and calls; no output yet.
        values: its nodes by the file's names.
        training: it was exported in training mode, and is read as in evaluation mode.
        ranks: number of dimensions of tensors, by name.
    """

    graph: fx.Graph = field(default_factory=fx.Graph)
    values: dict[str, fx.Node] = field(default_factory=dict)
    training: bool = False
    ranks: dict[str, int] = field(default_factory=dict)

    def define(self, name: str, node: fx.Node) -> None:
        """Give a node the name by which later ones refer to it.

        Raises:
            ArtifactError: the name is taken.
        """
        if name in self.values:
            raise ArtifactError(f"defines {shown(name)} twice")
        self.values[name] = node

    def call_all(self, data: Mapping[str, Any], depth: int = 0) -> None:
        """Add all calls of a graph, or of a block of one.

        Raises:
            ArtifactError: the graph is malformed.
            CaptureError: it calls what a Program cannot hold.
        """
        if depth > _MAX_DEPTH:
            raise ArtifactError("its blocks are nested too deep")
        for name, meta in mapped(data["tensor_values"], "tensor_values").items():
            self.ranks[name] = len(listed(mapped(meta, "a tensor").get("sizes"), "sizes", 64))
        for entry in listed(data["nodes"], "nodes", MAX_NODES):
            node = mapped(entry, "a node")
            target = node.get("target")
            if not isinstance(target, str):
                raise ArtifactError("a node without a target")
            try:
                self._block(node, depth) if target == _NO_GRAD else self._call(target, node)
            except ArtifactError as error:
                called = error.where or short(shown_target(target))
                raise ArtifactError(error.message, where=called, hint=error.hint) from error
            except CaptureError as error:
                raise CaptureError(
                    error.message, where=error.where or _owner(node), hint=error.hint
                ) from error
        if len(self.graph.nodes) > MAX_NODES:
            raise ArtifactError(f"more than {MAX_NODES:,} nodes")

    def _call(self, target: str, node: Mapping[str, Any]) -> None:
        callee = aten_callable(target)
        if callee is None:
            raise CaptureError(f"calls {short(shown_target(target))}, which a Program cannot hold")
        by_place, by_name = self._arguments(callee, listed(node["inputs"], "inputs", 1000))
        called = self.graph.create_node("call_function", callee, by_place, by_name)
        called.meta["nn_module_stack"] = _modules(mapped(node["metadata"], "metadata").get("nn_module_stack"))
        self._outputs(called, listed(node["outputs"], "outputs", 1000))

    def _arguments(self, callee: Any, inputs: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments by place, as far as they are in order, and by name."""
        schema = getattr(callee, "_schema", None)
        names = [each.name for each in schema.arguments if not each.kwarg_only] if schema else None
        by_place: list[Any] = []
        by_name: dict[str, Any] = {}
        for each in inputs:
            entry = mapped(each, "an input")
            name, value = name_in(entry), argument(entry["arg"], self.values)
            if name in _MODES and value is True:
                self.training, value = True, False
            if names is None or (not by_name and names[len(by_place) : len(by_place) + 1] == [name]):
                by_place.append(value)
            elif name in by_name:
                raise ArtifactError(f"the argument {shown(name)} is given twice")
            else:
                by_name[name] = value
        return tuple(by_place), by_name

    def _outputs(self, called: fx.Node, outputs: list[Any]) -> None:
        """Name what a call returns: one value, or the parts of a tuple or list."""
        read = [single(output, "an output") for output in outputs]
        if len(read) == 1 and read[0][0] != "as_tensors":
            self._named(called, *read[0])
            return
        if len(read) == 1:
            read = [("as_tensor", each) for each in listed(read[0][1], "outputs", MAX_ITEMS)]
        for place, (kind, value) in enumerate(read):
            if kind == "as_tensor" and place == 0:
                called.meta[RANK] = self.ranks.get(name_in(value), 0)
            if kind != "as_none":
                part = self.graph.create_node("call_function", operator.getitem, (called, place), {})
                part.meta = dict(called.meta)
                self._named(part, kind, value)

    def _named(self, node: fx.Node, kind: str, value: Any) -> None:
        if kind == "as_none":
            return
        if kind not in ("as_tensor", "as_sym_int", "as_sym_float", "as_sym_bool"):
            raise CaptureError(f"returns values of the kind {short(kind.removeprefix('as_'))}")
        name = name_in(value, "name" if kind == "as_tensor" else "as_name")
        node.meta[RANK] = self.ranks.get(name, 0)
        self.define(name, node)

    def _block(self, node: Mapping[str, Any], depth: int) -> None:
        """The calls in ``with torch.no_grad():``, as if they stood outside of it."""
        _, graph, *given = [
            mapped(each, "an input")["arg"] for each in listed(node["inputs"], "inputs", 1000)
        ]
        kind, value = single(graph, "a block")
        if kind != "as_graph":
            raise ArtifactError("a block without a graph")
        block = mapped(mapped(value, "a block")["graph"], "a graph")
        places = [
            name_in(single(each, "an input")[1]) for each in listed(block["inputs"], "inputs", MAX_ITEMS)
        ]
        values = [argument(each, self.values) for each in given]
        inner = ReadGraph(self.graph, dict(pairs(places, values, "operands and inputs of a block")))
        inner.call_all(block, depth + 1)
        self.training |= inner.training
        results = [argument(each, inner.values) for each in listed(block["outputs"], "outputs", MAX_ITEMS)]
        outputs = [single(each, "an output") for each in listed(node["outputs"], "outputs", MAX_ITEMS)]
        if len(outputs) == 1 and outputs[0][0] == "as_tensors":
            outputs = [("as_tensor", each) for each in listed(outputs[0][1], "outputs", MAX_ITEMS)]
        for (_, each), result in pairs(outputs, results, "outputs of a block and of its call"):
            self.define(name_in(each), result)


def shown_target(target: str) -> str:
    """An operator as its users know it."""
    name = target.removeprefix("torch.ops.")
    space, _, bare = name.partition(".")
    return f"torch.{bare.partition('.')[0]}" if space == "aten" else f"torch.ops.{name}"


def _owner(node: Mapping[str, Any]) -> str | None:
    """The path of the layer whose forward pass made a call."""
    metadata = mapped(node["metadata"], "metadata")
    paths = [path for path, _ in _modules(metadata.get("nn_module_stack")).values() if path]
    return paths[-1] if paths else None


def _modules(stack: Any) -> dict[str, tuple[str, str]]:
    """The modules whose forward pass made a call, outermost first, in fx's terms."""
    entries = [entry.split(",") for entry in stack.split(";")] if isinstance(stack, str) else []
    paths = [entry[1].partition("@")[0] for entry in entries if len(entry) == 3]
    return {str(place): (path, "") for place, path in enumerate(paths) if path == "" or is_path(path)}
