"""The normal form of a graph, which every method sees.

    pure         no call changes what another can see (``functional``)
    one spelling every operation is called in one way, with its arguments by name (``spelling``)
    linear       a product with a fetched weight, ``torch.addmm`` say, is a call of ``linear``
    unpacked     a tuple of tensors is read part by part, so that each tensor is a value of its own
    live         nothing is computed that nobody reads

What is computed stays the same to the last bit.
"""

import operator
from collections.abc import Mapping
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from modelopt_cli.program.allowlist import is_in_place
from modelopt_cli.program.calls import arguments, call, operation
from modelopt_cli.program.functional import make_functional
from modelopt_cli.program.input_spec import InputSpec
from modelopt_cli.program.shapes import infer, meta_input
from modelopt_cli.program.spelling import canonicalize, rewrite

_TUPLES = ("chunk", "split", "tensor_split", "unbind")
_PRODUCTS = {
    "addmm": ("mat1", "mat2", "input"),
    "matmul": ("input", "other", ""),
    "mm": ("input", "mat2", ""),
}
"""Products of two values to their arguments: what is multiplied, with what, and what is added."""


def normalize(
    graph: fx.Graph, root: nn.Module, input_spec: InputSpec, constants: Mapping[str, Tensor] | None = None
) -> None:
    """Bring a graph into normal form.

    Args:
        graph: changed in place; its nodes keep their names.
        root: where its layers and tensors are; not changed.
        input_spec: what one sample looks like.
        constants: fetched tensors that the forward pass makes again at each call.

    Raises:
        CaptureError: a change in place that cannot be written without.
        ArtifactError: a call whose arguments cannot be told apart.
        Exception: whatever the graph raises on an input of this shape, if it has to be run to be understood.
    """
    make_functional(graph, root, meta_input(root, input_spec, 2), constants)
    canonicalize(graph, root)
    _use_linear(graph, root)
    if any(_is_read_whole(node) for node in graph.nodes):
        _unpack(graph, root, input_spec, constants)
    _spread_outputs(graph, root, input_spec, constants)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))


def _use_linear(graph: fx.Graph, root: nn.Module) -> None:
    """Write ``bias + x @ weight`` of a layer's weight, as GPT-2 has it, as ``linear``, transposed."""
    for node in graph.nodes:
        if operation(node) not in _PRODUCTS:
            continue
        x, weight, bias = (arguments(node).get(name) for name in _PRODUCTS[operation(node)])
        scaled = any(arguments(node).get(factor, 1) != 1 for factor in ("alpha", "beta"))
        if (
            scaled
            or not _is_fetched(weight, "weight", 2, root)
            or not isinstance(x, fx.Node)
            or x.op == "get_attr"
        ):
            continue
        if bias is None or _is_fetched(bias, "bias", 1, root):
            with graph.inserting_before(node):
                turned = graph.call_method("t", (weight,))
            rewrite(turned, "t", {"input": weight})
            rewrite(node, "linear", {"input": x, "weight": turned, "bias": bias})


def _is_fetched(value: Any, name: str, dimensions: int, root: nn.Module) -> bool:
    """True if a value is the weight, or the bias, of a layer."""
    if not isinstance(value, fx.Node) or value.op != "get_attr" or not str(value.target).endswith(f".{name}"):
        return False
    tensor = attrgetter(str(value.target))(root)
    return isinstance(tensor, nn.Parameter) and tensor.dim() == dimensions


def is_normal(graph: fx.Graph, layers: Mapping[str, nn.Module]) -> bool:
    """True if a graph needs nothing but one spelling to be in normal form; ``layers`` by path."""
    return not any(is_in_place(node, layers) or _is_read_whole(node) for node in graph.nodes)


def _is_read_whole(node: fx.Node) -> bool:
    """True if something but a part of a tuple of tensors is read."""
    return operation(node) in _TUPLES and not all(_picks(user, node) for user in node.users)


def _picks(user: fx.Node, value: fx.Node) -> bool:
    return user.target is operator.getitem and user.args[0] is value and type(user.args[1]) is int


def _unpack(
    graph: fx.Graph, root: nn.Module, input_spec: InputSpec, constants: Mapping[str, Tensor] | None
) -> None:
    """Let readers of a tuple read its parts; tuples whose length depends on the batch stay as they are."""
    values, others = (infer(graph, root, meta_input(root, input_spec, batch), constants) for batch in (2, 3))
    parts: dict[fx.Node, tuple[Any, ...]] = {}
    for node in list(graph.nodes):
        read = {a: parts[a] for a in node.all_input_nodes if a in parts}
        if operation(node) == "getitem" and node.args[0] in parts:
            _replace_part(node, parts)
            continue
        if read:
            node.args = fx.node.map_arg(node.args, partial(_replaced, read))
            node.kwargs = fx.node.map_arg(node.kwargs, partial(_replaced, read))
        if operation(node) in ("add", "mul") and read and isinstance(values[node], tuple | list):
            parts[node] = tuple(call(node, node.args, node.kwargs))  # of tuples: one after another
        if operation(node) in _TUPLES and len(values[node]) == len(others[node]):
            parts[node] = _parts(graph, node, len(values[node]))


def _spread_outputs(
    graph: fx.Graph, root: nn.Module, input_spec: InputSpec, constants: Mapping[str, Tensor] | None
) -> None:
    """Return a tuple of tensors part by part; a network that returns what a GRU does returns two values."""
    (output,) = graph.find_nodes(op="output")
    values = infer(graph, root, meta_input(root, input_spec, 2), constants)
    with graph.inserting_before(output):
        output.args = fx.node.map_arg(output.args, lambda node: _spread(graph, node, values[node]))


def _spread(graph: fx.Graph, node: fx.Node, value: Any) -> Any:
    """The parts of a value, if it has some."""
    if not isinstance(value, tuple | list) or isinstance(value, torch.Size):
        return node
    parts = [_spread(graph, graph.call_function(operator.getitem, (node, i)), v) for i, v in enumerate(value)]
    return parts if isinstance(value, list) else tuple(parts)


def _replace_part(node: fx.Node, parts: dict[fx.Node, tuple[Any, ...]]) -> None:
    """Let readers of a part of a tuple read that part; a slice of a tuple is its parts."""
    bound = arguments(node)
    part = parts[bound["input"]][bound["index"]]
    if isinstance(part, tuple):
        parts[node] = part
    else:
        node.replace_all_uses_with(part)


def _replaced(parts: Mapping[fx.Node, Any], node: fx.Node) -> Any:
    return parts.get(node, node)


def _parts(graph: fx.Graph, node: fx.Node, count: int) -> tuple[fx.Node, ...]:
    cursor, parts = node, []
    for place in range(count):
        with graph.inserting_after(cursor):
            cursor = graph.call_function(operator.getitem, (node, place))
        parts.append(cursor)
    return tuple(parts)
