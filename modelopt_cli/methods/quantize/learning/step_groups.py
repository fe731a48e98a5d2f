"""Values of an int8 Program that have one scale and zero point, and the layers that write and read them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx, nn

from modelopt_cli.methods.quantize.roles import SHAPE_OPERATIONS
from modelopt_cli.program import Program
from modelopt_cli.program.calls import operation
from modelopt_cli.program.quantization import QParams
from modelopt_cli.program.quantized import Quantized
from modelopt_cli.program.quantized_operations import QuantizedMaxPool

_SECOND = ("residual", "other")
"""Fields of layers for the scale of their second input."""


@dataclass
class StepGroup:
    """Values with one scale and zero point: those that are concatenated, rearranged or pooled by maximum.

    Attributes:
        writers: layers that round to them, by name.
        readers: layers that compute with them, and the field of each that says their scale.
    """

    writers: list[str] = field(default_factory=list)
    readers: list[tuple[str, str]] = field(default_factory=list)

    def agrees(self, layers: Mapping[str, nn.Module]) -> bool:
        """True if all layers have the same scale and zero point for the values."""
        places = [*((name, "output") for name in self.writers), *self.readers]
        return len({getattr(layers[name], place) for name, place in places}) == 1

    def put(self, layers: Mapping[str, nn.Module], q: QParams) -> None:
        """Give all layers this scale and zero point for the values."""
        for name, place in [*((name, "output") for name in self.writers), *self.readers]:
            setattr(layers[name], place, q)


def step_groups(program: Program) -> list[StepGroup]:
    """The groups of an int8 Program, in the order of its graph."""
    layers = dict(program.named_modules())
    groups: dict[fx.Node, StepGroup] = {}
    for node in program.graph.nodes:
        if node.op == "call_module":
            _read(node, layers, groups)
        if not is_uint8(node, layers):
            continue
        if node.op == "call_module" and not isinstance(layers[str(node.target)], QuantizedMaxPool):
            groups[node] = StepGroup([str(node.target)])
            continue
        first, *others = (groups[value] for value in node.all_input_nodes if value in groups)
        for other in others:
            _merge(first, other, groups)
        groups[node] = first
    return list({id(group): group for group in groups.values()}.values())


def is_uint8(node: fx.Node, layers: Mapping[str, nn.Module]) -> bool:
    """True if a value of an int8 Program is uint8: functions only pass that on."""
    while node.op in ("call_function", "call_method"):
        if operation(node) in SHAPE_OPERATIONS or not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
    if node.op != "call_module":
        return False
    layer = layers[str(node.target)]
    rounds = isinstance(layer, Quantized) and getattr(layer, "output", None) is not None
    return rounds or isinstance(layer, QuantizedMaxPool)


def _read(node: fx.Node, layers: Mapping[str, nn.Module], groups: Mapping[fx.Node, StepGroup]) -> None:
    """Note which scales a layer has for the values that it reads."""
    layer, inputs = layers[str(node.target)], [*node.args, *node.kwargs.values()]
    for value, places in zip(inputs, (("input",), _SECOND), strict=False):
        if not isinstance(layer, Quantized) or not isinstance(value, fx.Node) or value not in groups:
            continue
        place = next((name for name in places if isinstance(getattr(layer, name, None), QParams)), None)
        if place is not None:
            groups[value].readers.append((str(node.target), place))


def _merge(group: StepGroup, other: StepGroup, groups: dict[fx.Node, StepGroup]) -> None:
    if other is group:
        return
    group.writers += other.writers
    group.readers += other.readers
    for node, each in groups.items():
        if each is other:
            groups[node] = group
