"""Cuts of a graph: one value takes the place of a later one, and the nodes between them are removed."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn

from modelopt_cli.program.layer_kinds import row_of
from modelopt_cli.program.patterns import activation_of, is_add, is_relu, sole_user
from modelopt_cli.program.program import Program
from modelopt_cli.program.shapes import value_shapes
from modelopt_cli.program.weighted import WEIGHTED_KINDS

Shapes = dict[str, tuple[int, ...]]

_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


@dataclass(frozen=True)
class Cut:
    """``source`` can take the place of ``result``; then nobody reads the values in ``dead``."""

    source: fx.Node
    result: fx.Node
    dead: frozenset[fx.Node]

    @property
    def gone(self) -> frozenset[fx.Node]:
        """All nodes that go."""
        return self.dead | {self.result}


def shapes_of(program: Program) -> Shapes:
    """Shapes of all tensor values for a batch of two, by node name."""
    shapes = value_shapes(program, 2)
    return {name: tuple(shape) for name, shape in shapes.items() if isinstance(shape, torch.Size)}


def find_cuts(program: Program, shapes: Shapes) -> list[Cut]:
    """All of them, in the order of their results: residual branches, and lone layers outside of those."""
    finder = _Finder(program, shapes)
    nodes = list(program.graph.nodes)
    residual = [cut for node in nodes for cut in finder.shortcuts(node)]
    inside = frozenset[fx.Node]().union(*(cut.dead for cut in residual))
    lone = (finder.lone_layer(node) for node in nodes if node not in inside)
    place = {node: i for i, node in enumerate(nodes)}
    return sorted([*residual, *filter(None, lone)], key=lambda cut: place[cut.result])


class _Finder:
    """A graph and what must be known of it."""

    def __init__(self, program: Program, shapes: Shapes) -> None:
        self.program, self.shapes = program, shapes
        self.modules = dict(program.named_modules())

    def shortcuts(self, node: fx.Node) -> Iterator[Cut]:
        """The residual branch that ends in this sum, if it is one."""
        if not is_add(node):
            return
        for source, branch in (node.all_input_nodes, node.all_input_nodes[::-1]):
            if self._same_shape(source, branch) and not self._terms(source).isdisjoint(_ancestors(branch)):
                cut = Cut(source, node, frozenset(dead_without(node, source)))
                if self._loses_layers(cut):
                    yield cut

    def lone_layer(self, node: fx.Node) -> Cut | None:
        """The layer this node calls, with norm and activation, if it keeps its input's shape."""
        if not isinstance(self._called(node), _PLAIN):
            return None
        source = node.all_input_nodes[0]
        if source.op == "placeholder" or not self._same_shape(source, node):
            return None
        result, user = node, sole_user(node)
        if user is not None and isinstance(self._called(user), _NORMS):
            result, user = user, sole_user(user)
        if user is not None and activation_of(user, self.modules) is not None:
            result = user
        cut = Cut(source, result, frozenset(chain_between(source, result)))
        return cut if self._loses_layers(cut) else None

    def _called(self, node: fx.Node) -> nn.Module | None:
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def _is_idle(self, node: fx.Node) -> bool:
        layer = self._called(node)
        return layer is not None and row_of(layer).idle

    def _terms(self, node: fx.Node) -> set[fx.Node]:
        """A value, what it is the sum of, and what it was before identities: x + f(x) + g(x) is all of x."""
        terms, queue = {node}, [node]
        while queue:
            term = queue.pop()
            if is_add(term) or self._is_idle(term):
                queue += [n for n in term.all_input_nodes if n not in terms]
                terms.update(term.all_input_nodes)
        return terms

    def _same_shape(self, a: fx.Node, b: fx.Node) -> bool:
        shape = self.shapes.get(a.name)
        return shape is not None and shape == self.shapes.get(b.name)

    def _loses_layers(self, cut: Cut) -> bool:
        """True if a weight-carrying layer goes with the cut and is not called elsewhere."""
        weighted = {layer_of(node) for node in cut.gone if is_weighted(node, self.modules)}
        if not weighted:
            return False
        remaining = (node for node in self.program.graph.nodes if node not in cut.gone)
        return not weighted <= {layer_of(node) for node in remaining if is_weighted(node, self.modules)}


def layer_of(node: fx.Node) -> str:
    """The path of the layer that a node calls, or whose weight it fetches."""
    path = str(node.target)
    return path if node.op == "call_module" else path.rpartition(".")[0]


def is_weighted(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """True if a node calls a weight-carrying layer, or fetches such a weight for a function."""
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], WEIGHTED_KINDS)
    return node.op == "get_attr" and str(node.target).endswith(".weight")


def is_rectified(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """True if a value is what a ReLU gave, or a pool of that."""
    while not is_relu(node, modules):
        if node.op != "call_module" or not isinstance(modules[str(node.target)], _POOLS):
            return False
        node = node.all_input_nodes[0]
    return True


def dead_without(result: fx.Node, source: fx.Node) -> set[fx.Node]:
    """Nodes that nobody reads any more once ``source`` takes the place of ``result``, a sum."""
    dead: set[fx.Node] = set()
    queue = [node for node in result.all_input_nodes if node is not source]
    while queue:
        node = queue.pop()
        if node is source or node in dead or node.op == "placeholder":
            continue
        if all(user in dead or user is result for user in node.users):
            dead.add(node)
            queue += node.all_input_nodes
    return dead


def chain_between(source: fx.Node, result: fx.Node) -> set[fx.Node]:
    """The nodes of a chain after ``source`` and before ``result``."""
    chain: set[fx.Node] = set()
    while (result := result.all_input_nodes[0]) is not source:
        chain.add(result)
    return chain


def _ancestors(node: fx.Node) -> set[fx.Node]:
    ancestors: set[fx.Node] = set()
    queue = [node]
    while queue:
        new = [n for n in queue.pop().all_input_nodes if n not in ancestors]
        ancestors.update(new)
        queue += new
    return ancestors
