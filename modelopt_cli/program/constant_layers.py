"""Functions of constant weights as layers: those whose weight or bias a network computes of its parameters.

A bias put together from those of queries and values, as in BEiT and Swin v2, or a weight that is standardized
at every call, as in NFNets, does not depend on the input. Worked out once, it is a layer's, under the name of
the layer that the weight belongs to; every method knows how to treat that. What functions fetch and use as it
is has become a layer when the network was captured (``recover``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from modelopt_cli.errors import ArtifactError
from modelopt_cli.program.calls import arguments, compute, operation, source
from modelopt_cli.program.layer_kinds import KINDS, build
from modelopt_cli.program.patterns import sole_user
from modelopt_cli.program.program import Program
from modelopt_cli.program.recover import described_layer
from modelopt_cli.program.rewrite import copy_graph, rebuild
from modelopt_cli.program.weighted import weight_label


@dataclass(frozen=True)
class _Call:
    """A function's call: its node, the layer it is one of, that layer's description, and its tensors.

    The layer gives the value of ``result``: the node itself, or the addition of a bias behind it.
    """

    node: fx.Node
    result: fx.Node
    layer: str
    kind: str
    config: dict[str, Any]
    tensors: dict[str, fx.Node]


def constant_layers(program: Program) -> Program:
    """Replace functions of constant weights by layers, where nothing else uses those.

    Args:
        program: in inference form; it is not changed.

    Returns:
        The Program itself where there is no such function.
    """
    constants = _Constants(program)
    layers: dict[str, list[_Call]] = {}
    for node in program.graph.nodes:
        call = _call(node, program, constants)
        if call is not None:
            layers.setdefault(call.layer, []).append(call)
    made = {name: module for name, calls in layers.items() if (module := _layer(calls, constants))}
    while taken := _taken({name: layers[name] for name in made}, program, constants):
        made = {name: module for name, module in made.items() if name not in taken}
    return _rewritten(program, {name: layers[name] for name in made}, made) if made else program


class _Constants:
    """Values of a graph that follow from its parameters and buffers alone."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.values: dict[str, Any] = {}
        self.nodes: set[fx.Node] = set()
        for node in program.graph.nodes:
            calls = node.op in ("call_function", "call_method")
            if node.op == "get_attr" or (calls and self.nodes.issuperset(node.all_input_nodes)):
                self.nodes.add(node)

    def value(self, node: fx.Node) -> Any:
        """The value of a constant node."""
        if node.name not in self.values:
            if node.op == "get_attr":
                self.values[node.name] = attrgetter(str(node.target))(self.program)
            else:
                for needed in node.all_input_nodes:
                    self.value(needed)
                with torch.no_grad():
                    self.values[node.name] = compute(node, self.values)
        return self.values[node.name]

    def sources(self, node: fx.Node) -> set[fx.Node]:
        """The parameters and buffers that a constant node is made of."""
        if node.op == "get_attr":
            return {node}
        return {origin for needed in node.all_input_nodes for origin in self.sources(needed)}

    def readers(self, node: fx.Node) -> set[fx.Node]:
        """The nodes that read a constant, or what is made of it, and are none themselves."""
        reading: set[fx.Node] = set()
        for user in node.users:
            reading |= self.readers(user) if user in self.nodes else {user}
        return reading


def _call(node: fx.Node, program: Program, constants: _Constants) -> _Call | None:
    if node.op != "call_function" or node in constants.nodes:
        return None
    given = {name: value for name, value in arguments(node).items() if isinstance(value, fx.Node)}
    tensors: dict[str, fx.Node] = {name: given[name] for name in given if name in ("weight", "bias")}
    if "weight" not in tensors or not constants.nodes.issuperset(tensors.values()):
        return None
    weight = constants.value(tensors["weight"])
    described = described_layer(node, weight)
    layer = _home(tensors["weight"], constants)
    if described is None or not KINDS[described[0]].weighted or layer is None:
        return None
    computed = tensors["weight"].op != "get_attr"
    if computed and any(_is_encoded(program, origin) for origin in constants.sources(tensors["weight"])):
        return None  # zeros or shared values would be lost
    kind, config = described
    addition = _addition(node, config, constants)
    if addition is None:
        return _Call(node, node, layer, kind, config, tensors)
    result, tensors["bias"] = addition
    return _Call(node, result, layer, kind, {**config, "bias": True}, tensors)


def _addition(node: fx.Node, config: dict[str, Any], constants: _Constants) -> tuple[fx.Node, fx.Node] | None:
    """The addition of a constant bias to the outputs of a linear without one, and that bias."""
    add = sole_user(node)
    if operation(node) != "linear" or config["bias"] or add is None or operation(add) != "add":
        return None
    operands = list(arguments(add).values())
    bias = next((operand for operand in operands if operand in constants.nodes), None)
    if bias is None or len(operands) != 2:
        return None
    value = constants.value(bias)
    fits = isinstance(value, Tensor) and value.shape == (config["out_features"],)
    return (add, bias) if fits else None


def _is_encoded(program: Program, node: fx.Node) -> bool:
    encoding = program.encodings.get(str(node.target))
    return encoding is not None and not encoding.is_plain


def _home(weight: fx.Node, constants: _Constants) -> str | None:
    """The path of the layer that a weight belongs to: its own, or that of the largest it is made of."""
    paths = [str(origin.target) for origin in constants.sources(weight)]
    weights = [path for path in paths if path.endswith(".weight")]
    sizes = {path: attrgetter(path)(constants.program).numel() for path in weights}
    return weight_label(max(weights, key=lambda path: (sizes[path], path))) if weights else None


def _layer(calls: Sequence[_Call], constants: _Constants) -> nn.Module | None:
    """The layer that all these calls are of; None where they differ."""
    first = calls[0]
    if any((c.kind, c.config, c.tensors) != (first.kind, first.config, first.tensors) for c in calls):
        return None
    try:
        module = build(first.kind, first.config)
    except ArtifactError:
        return None
    for name, node in first.tensors.items():
        value = constants.value(node)
        if not isinstance(value, Tensor) or value.shape != getattr(module, name).shape:
            return None
        trained = any(constants.value(origin).requires_grad for origin in constants.sources(node))
        is_parameter = isinstance(value, nn.Parameter)
        setattr(module, name, value if is_parameter else nn.Parameter(value.detach(), requires_grad=trained))
    return module


def _taken(layers: dict[str, list[_Call]], program: Program, constants: _Constants) -> set[str]:
    """Paths that cannot be those of layers: something else than the calls of all these uses what is below."""
    calls = {node for of_layer in layers.values() for call in of_layer for node in (call.node, call.result)}
    used = [str(node.target) for node in program.graph.find_nodes(op="call_module")]
    for node in program.graph.find_nodes(op="get_attr"):
        if not constants.readers(node) <= calls:
            used.append(str(node.target))
    return {layer for layer in layers if any(path == layer or path.startswith(f"{layer}.") for path in used)}


def _rewritten(program: Program, layers: dict[str, list[_Call]], made: dict[str, nn.Module]) -> Program:
    graph = copy_graph(program.graph)
    nodes = {node.name: node for node in graph.nodes}
    for name, calls in layers.items():
        for call in calls:
            node, result = nodes[call.node.name], nodes[call.result.name]
            with graph.inserting_before(node):
                called = graph.call_module(name, (source(node),))
            result.replace_all_uses_with(called)
            for replaced in dict.fromkeys((result, node)):
                graph.erase_node(replaced)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    rewritten = rebuild(program, graph, made)
    kept = rewritten.state_dict()
    rewritten.encodings = {name: encoding for name, encoding in program.encodings.items() if name in kept}
    return rewritten
