"""A graph as plain values that pickle, and back: unlike a file's form it allows any layer and function.

fx pickles a graph as Python source, runs that when it is read and traces it again.
"""

from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx.node import map_aggregate

from modelopt_cli.program.allowlist import function_called, function_name


@dataclass(frozen=True)
class _Result:
    """Stands for the node at a position."""

    position: int


@dataclass(frozen=True)
class _Function:
    """Stands for a function of the allow-list: some of torch's do not pickle."""

    name: str


def plain_nodes(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """Each node's operation, name, target, arguments and keyword arguments, in order."""
    position = {node: i for i, node in enumerate(graph.nodes)}

    def plain(value: Any) -> Any:
        return _Result(position[value]) if isinstance(value, fx.Node) else value

    def target(node: fx.Node) -> Any:
        name = function_name(node.target) if callable(node.target) else None
        return node.target if name is None else _Function(name)

    return [
        (node.op, node.name, target(node), map_aggregate(node.args, plain), map_aggregate(node.kwargs, plain))
        for node in graph.nodes
    ]


def graph_of(nodes: list[tuple[Any, ...]]) -> fx.Graph:
    """The graph of what ``plain_nodes`` returned."""
    graph = fx.Graph()
    made: list[fx.Node] = []

    def node_of(value: Any) -> Any:
        return made[value.position] if isinstance(value, _Result) else value

    for op, name, target, args, kwargs in nodes:
        callee: Any = function_called(target.name) if isinstance(target, _Function) else target
        made.append(
            graph.create_node(op, callee, map_aggregate(args, node_of), map_aggregate(kwargs, node_of), name)
        )
    return graph
