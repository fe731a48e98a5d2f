"""Channels that go from layers to layers through nothing but operations that scale with them.

Each channel may be divided there by a factor of its own if the weights that read it are multiplied by that:
the network computes the same. An activation scales with its input if f(c x) = c f(x) for every c > 0: ReLU,
leaky ReLU, PReLU and the identity do. ReLU6 does up to where it clips, which then is 6 times the factor.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from modelopt_cli.program import Program
from modelopt_cli.program.calls import arguments, operation, source
from modelopt_cli.program.patterns import activation_of, is_add
from modelopt_cli.program.shapes import program_values

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SCALING_LAYERS = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity, nn.Flatten)
_POOLS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)
_SCALING_OPERATIONS = frozenset(
    (
        *("relu", "leaky_relu", "flatten", "mean", "max_pool1d", "max_pool2d", "max_pool3d"),
        *("avg_pool1d", "avg_pool2d", "avg_pool3d"),
        *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    )
)
_LOOKING = frozenset({"size", "getattr"})
"""Operations that read shapes, which no factor changes."""


@dataclass(eq=False)
class Link:
    """Values that have the same channels, each with a factor of its own.

    Attributes:
        values: of the graph.
        writers: names of the layers that compute them: their rows are divided by the factors.
        readers: names of the layers that read them, with what they read: their columns are multiplied.
        size: number of channels; 0 where it is not known yet.
        clipped: outputs of a ReLU6 among them.
        fixed: something needs the values as they are.
    """

    values: list[fx.Node] = field(default_factory=list)
    writers: list[str] = field(default_factory=list)
    readers: list[tuple[str, fx.Node]] = field(default_factory=list)
    size: int = 0
    clipped: list[fx.Node] = field(default_factory=list)
    fixed: bool = False


def find_links(program: Program, shared: Collection[str] = ()) -> list[Link]:
    """The channels of a Program that may be scaled.

    Args:
        program: a float Program in inference form.
        shared: parameters whose equal values stay equal: their layers are left alone.
    """
    return _Links(program, shared).found()


class _Links:
    """A union-find over the values of a graph."""

    def __init__(self, program: Program, shared: Collection[str]) -> None:
        self.program, self.modules = program, dict(program.named_modules())
        self.values = program_values(program, 2)
        self.link_of: dict[fx.Node, Link] = {}
        calls = [str(node.target) for node in program.graph.find_nodes(op="call_module")]
        tensors = [id(tensor) for tensor in program.state_dict(keep_vars=True).values()]
        fetched = {str(node.target).rpartition(".")[0] for node in program.graph.find_nodes(op="get_attr")}
        self.free = {
            name
            for name in set(calls)
            if isinstance(layer := program.get_submodule(name), (*CONVOLUTIONS, nn.Linear))
            and calls.count(name) == 1
            and all(tensors.count(id(own)) == 1 for own in layer.parameters())
            and name not in fetched
            and not {f"{name}.weight", f"{name}.bias"} & set(shared)
            and getattr(layer, "padding_mode", "zeros") == "zeros"
        }
        for node in program.graph.nodes:
            self._visit(node)

    def found(self) -> list[Link]:
        links = {id(link): link for link in self.link_of.values()}.values()
        return [link for link in links if not link.fixed and link.writers and link.readers and link.size]

    def _visit(self, node: fx.Node) -> None:
        layer = self.program.get_submodule(str(node.target)) if node.op == "call_module" else None
        self.link_of[node] = Link([node])
        if layer is not None and str(node.target) in self.free and self._has_form(node, layer):
            self._visit_layer(node, layer)
        elif is_add(node) and len({self._shape(a) for a in (node, *node.all_input_nodes)}) == 1:
            for operand in node.all_input_nodes:
                self._join(node, operand)
        elif self._scales(node, layer):
            self._join(node, source(node))
            self.link_of[node].clipped += [node] if self._is_relu6(node) else []
        elif operation(node) not in _LOOKING:
            self._fix([node, *node.all_input_nodes])

    def _visit_layer(self, node: fx.Node, layer: Any) -> None:
        name, read = str(node.target), source(node)
        before, after = self.link_of[read], self.link_of[node]
        before.readers.append((name, read))
        after.writers.append(name)
        linear = isinstance(layer, nn.Linear)
        before.size = layer.in_features if linear else layer.in_channels
        after.size = layer.out_features if linear else layer.out_channels

    def _has_form(self, node: fx.Node, layer: Any) -> bool:
        """True if a layer's channels are where they are looked for: next to the samples, or of rows."""
        shape = self._shape(source(node))
        rank = 2 if isinstance(layer, nn.Linear) else layer.weight.dim()
        return len(shape) == rank

    def _scales(self, node: fx.Node, layer: nn.Module | None) -> bool:
        """True if channel by channel the node's output scales with its one input."""
        known = isinstance(layer, (*_SCALING_LAYERS, *_POOLS)) or operation(node) in _SCALING_OPERATIONS
        if not (known or self._is_relu6(node)) or len(node.all_input_nodes) != 1:
            return False
        if operation(node) == "mean" and not self._over_space(node):
            return False
        before, after = self._shape(source(node)), self._shape(node)
        # Maps of one pixel are flattened to features, channel by channel.
        return len(before) > 1 and len(after) > 1 and before[:2] == after[:2]

    def _over_space(self, node: fx.Node) -> bool:
        """True if a mean is over the dimensions behind the channels alone."""
        dims, rank = arguments(node).get("dim"), len(self._shape(source(node)))
        dims = dims if isinstance(dims, list | tuple) else [dims]
        return all(type(dim) is int and dim % rank > 1 for dim in dims) and bool(dims) and rank > 2

    def _is_relu6(self, node: fx.Node) -> bool:
        return activation_of(node, self.modules) == "relu6"

    def _shape(self, node: Any) -> tuple[int, ...]:
        value = self.values.get(node) if isinstance(node, fx.Node) else None
        return tuple(value.shape) if isinstance(value, Tensor) else ()

    def _fix(self, nodes: Iterable[fx.Node]) -> None:
        for node in nodes:
            self.link_of[node].fixed = True

    def _join(self, a: fx.Node, b: fx.Node) -> None:
        first, second = self.link_of[b], self.link_of[a]
        if first is second:
            return
        first.values += second.values
        first.writers += second.writers
        first.readers += second.readers
        first.size = first.size or second.size
        first.clipped += second.clipped
        first.fixed |= second.fixed
        for node in second.values:
            self.link_of[node] = first
