"""Blocks that a network still runs without: residual branches, and layers that keep their input's shape.

Taking one out leaves the identity: of y = x + f(x) only x, of a layer only its input. That is the network
with the branch zeroed, and what the branch needed is gone (Veit et al., NeurIPS 2016, show how little a
residual network minds).
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import fx

from modelopt_cli.errors import UsageError
from modelopt_cli.program.cuts import (
    Cut,
    chain_between,
    dead_without,
    find_cuts,
    is_rectified,
    is_weighted,
    layer_of,
    shapes_of,
)
from modelopt_cli.program.patterns import is_add, is_relu, sole_user
from modelopt_cli.program.program import Program
from modelopt_cli.program.rewrite import copy_graph, rebuild


@dataclass(frozen=True)
class Block:
    """A part of a network that the identity can stand in for.

    Attributes:
        name: what the paths of its layers have in common, or else the path of its first layer.
        layers: its weight-carrying layers, in graph order.
        parameters: full names of all parameters that go with it.
        source: the node whose value goes in, and comes out once the block is gone.
        result: the node whose value came out.
    """

    name: str
    layers: tuple[str, ...]
    parameters: tuple[str, ...]
    source: str
    result: str


def find_blocks(program: Program) -> tuple[Block, ...]:
    """Every residual branch y = x + f(x), and every lone layer that keeps its input's shape, in graph order.

    A lone layer is a convolution or linear with the norm and the activation that follow it. Layers inside
    a residual branch are not listed for themselves. Where shortcuts are nested a block holds others.
    """
    return tuple(_described(find_cuts(program, shapes_of(program)), program))


def remove_blocks(program: Program, names: Iterable[str]) -> Program:
    """A Program without these blocks, sharing all other tensors; the one given is not changed.

    Raises:
        UsageError: there is no block of such a name.
    """
    known = {block.name: block for block in find_blocks(program)}
    wanted = list(dict.fromkeys(names))
    for name in wanted:
        if name not in known:
            raise UsageError("is not a block that can be removed", where=name)
    return without(program, [known[name] for name in wanted])


def without(program: Program, blocks: Iterable[Block]) -> Program:
    """Remove, as ``remove_blocks`` does, blocks that ``find_blocks`` gave for this very Program."""
    graph = copy_graph(program.graph)
    names = [node.name for node in program.graph.nodes]
    nodes = dict(zip(names, graph.nodes, strict=True))
    for block in sorted(set(blocks), key=lambda block: names.index(block.result)):
        source, result = nodes[block.source], nodes[block.result]
        dead = dead_without(result, source) if is_add(result) else chain_between(source, result)
        for node, replacement in _bypass(source, result, program).items():
            nodes[node] = replacement
        for node in reversed([node for node in graph.nodes if node in dead or node is result]):
            graph.erase_node(node)
    return rebuild(program, graph)


def obstacles(program: Program, blocks: Iterable[Block]) -> dict[str, str]:
    """Reasons, by path, why weight-carrying layers outside of the blocks cannot become the identity."""
    inside = {layer for block in blocks for layer in block.layers}
    modules, shapes = dict(program.named_modules()), shapes_of(program)
    weighted = [node for node in program.graph.nodes if is_weighted(node, modules)]
    calls = Counter(layer_of(node) for node in weighted if node.op == "call_module")
    reasons: dict[str, str] = {}
    for node in weighted:
        if (layer := layer_of(node)) in inside:
            continue
        before = shapes.get(node.all_input_nodes[0].name) if node.op == "call_module" else None
        after = shapes.get(node.name)
        if calls[layer] > 1:
            reasons[layer] = "called more than once"
        elif before and after and before != after:
            reasons[layer] = f"makes {_sides(after)} of {_sides(before)}, and no shortcut leads around it"
        else:
            reasons[layer] = "no shortcut leads around it"
    return reasons


def _bypass(source: fx.Node, result: fx.Node, program: Program) -> dict[str, fx.Node]:
    """Let the readers of ``result`` read ``source``; what was replaced, by name, and by what.

    A ReLU of what a ReLU gave is left out.
    """
    modules = dict(program.named_modules())
    user = sole_user(result)
    if user is not None and is_relu(user, modules) and is_rectified(source, modules):
        user.replace_all_uses_with(source)
        user.graph.erase_node(user)
        return {result.name: source, user.name: source}
    result.replace_all_uses_with(source)
    return {result.name: source}


def _described(cuts: list[Cut], program: Program) -> Iterator[Block]:
    modules, users = dict(program.named_modules()), _users(program)
    layers: list[tuple[str, ...]] = []
    for cut in cuts:
        weighted = (n for n in program.graph.nodes if n in cut.gone and is_weighted(n, modules))
        layers.append(tuple(dict.fromkeys(map(layer_of, weighted))))
    common = [_common(paths) for paths in layers]
    for cut, own, name in zip(cuts, layers, common, strict=True):
        parameters = tuple(path for path, nodes in users.items() if nodes <= cut.gone)
        unique = name and common.count(name) == 1
        yield Block(name if unique else own[0], own, parameters, cut.source.name, cut.result.name)


def _users(program: Program) -> dict[str, set[fx.Node]]:
    """The nodes that use each parameter, by its full name."""
    users: dict[str, set[fx.Node]] = {}
    parameters = dict(program.named_parameters())
    for node in program.graph.nodes:
        if node.op == "call_module":
            for name, _ in program.get_submodule(str(node.target)).named_parameters():
                users.setdefault(f"{node.target}.{name}", set()).add(node)
        elif node.op == "get_attr" and str(node.target) in parameters:
            users.setdefault(str(node.target), set()).add(node)
    return users


def _common(paths: tuple[str, ...]) -> str:
    """The longest path that all of these lie in, themselves included."""
    split = [path.split(".") for path in paths]
    depth = 0
    while all(len(parts) > depth and parts[depth] == split[0][depth] for parts in split):
        depth += 1
    return ".".join(split[0][:depth])


def _sides(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape[1:]))
