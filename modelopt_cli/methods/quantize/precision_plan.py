"""Deciding, before anything is changed, which values of a graph become uint8.

A **unit** is a run of nodes that becomes one int8 operation: a convolution or linear layer with the
activation after it, or an addition with the activation after it. A value becomes uint8 where its
producer can make it so (*natural*) and an int8 layer further on wants it (*demanded*). So no value
is quantized for nothing, and precision changes only where it has to.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from modelopt_cli.methods.quantize.layer_forms import LAYER_FORMS
from modelopt_cli.methods.quantize.roles import ADD_ACTIVATIONS, Role, role_of
from modelopt_cli.methods.quantize.widths import Widths
from modelopt_cli.program import Program
from modelopt_cli.program.calls import operation, source
from modelopt_cli.program.patterns import activation_of, sole_user
from modelopt_cli.program.quantization import ACTIVATIONS, BITS
from modelopt_cli.program.shapes import program_values


@dataclass
class Unit:
    """Nodes that become one int8 operation.

    Attributes:
        head: the layer's or the addition's node.
        output: the last node, the activation's where there is one.
        activation: its name, or "none".
        residual: the other operand, where the addition that follows a convolution is part of it.
    """

    head: fx.Node
    output: fx.Node
    activation: str = "none"
    residual: fx.Node | None = None


@dataclass
class PrecisionPlan:
    """The values and operations of a graph that become int8.

    Attributes:
        layers: units of quantized layers, by output node.
        adds: units of int8 additions, by output node.
        stored: calls of layers that read float32 and have int8 weights.
        calibrated: those of them whose input has a scale that calibration finds.
        roles: the role of every node outside units.
        int8: values that are uint8.
        inside: nodes that live on inside a unit and are no values of their own any more.
        sharing: each uint8 value's representative; values with one representative share QParams.
        values: shape and type of every value, as ``program.shapes.program_values`` gives them.
        widths: bits of weights and activations, by the name of the layer.
        bits: of uint8 values and of those that are rounded for an int8 operation, by representative.
    """

    layers: dict[fx.Node, Unit] = field(default_factory=dict)
    adds: dict[fx.Node, Unit] = field(default_factory=dict)
    stored: set[fx.Node] = field(default_factory=set)
    calibrated: set[fx.Node] = field(default_factory=set)
    roles: dict[fx.Node, Role] = field(default_factory=dict)
    int8: set[fx.Node] = field(default_factory=set)
    inside: set[fx.Node] = field(default_factory=set)
    sharing: dict[fx.Node, fx.Node] = field(default_factory=dict)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    widths: Mapping[str, Widths] = field(default_factory=dict)
    bits: dict[fx.Node, int] = field(default_factory=dict)

    def bits_of(self, node: fx.Node) -> int:
        """Bits of a value as integers: the most that a layer that reads it asks for."""
        return self.bits.get(self.representative(node), BITS)

    def representative(self, node: fx.Node) -> fx.Node:
        """The value whose QParams a value uses."""
        while (parent := self.sharing.get(node, node)) is not node:
            node = parent
        return node

    def share(self, a: fx.Node, b: fx.Node) -> None:
        """Make two values use the same QParams."""
        a, b = self.representative(a), self.representative(b)
        if a is not b:
            self.sharing[b] = a

    def derived(self, node: fx.Node) -> bool:
        """True if the value only rearranges others, so that there is nothing new to observe."""
        return node in self.int8 and self.roles.get(node) in (Role.PASS, Role.CAT)


def make_plan(program: Program, widths: Mapping[str, Widths]) -> PrecisionPlan:
    """Plan the int8 form of a Program.

    Args:
        program: a float Program with batch norms folded.
        widths: of each layer to quantize, by its name; each is of a kind in ``LAYER_FORMS``. A layer whose
            activations stay float is none that the plan makes integers of.
    """
    selected = {name for name, each in widths.items() if each.activation is not None}
    # An int8 addition costs no less than one in float, so that rounding its sum helps nobody where a float
    # operation reads that. An addition inside of a convolution does.
    values, in_float = program_values(program, 1), set[fx.Node]()
    while True:
        plan = _plan_without(in_float, program, selected, values)
        rounded = {output for output in plan.adds if _read_in_float(output, plan)}
        if not rounded:
            _share(plan)
            plan.widths = widths
            _choose_bits(plan, program.graph)
            return plan
        in_float |= rounded


def _plan_without(
    in_float: set[fx.Node], program: Program, selected: set[str], values: dict[fx.Node, Any]
) -> PrecisionPlan:
    """The plan in which these additions stay in float."""
    plan, modules = PrecisionPlan(values=values), dict(program.named_modules())
    for node in program.graph.nodes:
        if node.op == "call_module" and node.target in selected:
            if LAYER_FORMS[type(modules[str(node.target)])].multiplies:
                _add_unit(plan, plan.layers, node, modules)
            else:
                plan.stored.add(node)
    for node in plan.stored:
        again = any(stored is not node and stored.target == node.target for stored in plan.stored)
        if LAYER_FORMS[type(modules[str(node.target)])].calibrated and not again:
            plan.calibrated.add(node)
    for node in program.graph.nodes:
        if node not in plan.inside and node not in plan.layers and node not in plan.adds:
            plan.roles[node] = role_of(node, modules, plan.values)
            if plan.roles[node] is Role.ADD:
                _add_unit(plan, plan.adds, node, modules)
    _decide(plan, program.graph, in_float)
    _fuse_residuals(plan, program.graph, modules)
    return plan


def _read_in_float(node: fx.Node, plan: PrecisionPlan) -> bool:
    """True if something reads the real values of a uint8 value, or of what only rearranges it."""
    heads = {unit.head for unit in (*plan.layers.values(), *plan.adds.values())}
    return any(
        _read_in_float(user, plan) if plan.derived(user) else plan.roles.get(user) is Role.FLOAT
        for user in node.users
        if user not in heads and user not in plan.inside
    )


def _add_unit(
    plan: PrecisionPlan, units: dict[fx.Node, Unit], head: fx.Node, modules: Mapping[str, nn.Module]
) -> None:
    is_add = units is plan.adds
    fusable = ADD_ACTIVATIONS if is_add else LAYER_FORMS[type(modules[str(head.target)])].activations
    unit, user = Unit(head, head), sole_user(head)
    if user is not None and activation_of(user, modules) in fusable:
        unit = Unit(head, user, activation_of(user, modules) or "none")
        plan.inside.add(head)
    units[unit.output] = unit


def _sources(node: fx.Node) -> list[fx.Node]:
    """The tensors that a PASS, POOL or CAT node reads."""
    first = source(node)
    return [a for a in first if isinstance(a, fx.Node)] if isinstance(first, list | tuple) else [first]


def _decide(plan: PrecisionPlan, graph: fx.Graph, in_float: set[fx.Node]) -> None:
    natural: set[fx.Node] = set(plan.layers)
    for node in graph.nodes:
        if node in plan.adds:
            if node not in in_float and any(a in natural for a in plan.adds[node].head.all_input_nodes):
                natural.add(node)
        elif plan.roles.get(node) in (Role.PASS, Role.POOL, Role.CAT):
            sources = _sources(node)
            if sources and all(s in natural for s in sources):
                natural.add(node)
    heads = {unit.head: unit.output for unit in (*plan.layers.values(), *plan.adds.values())}
    for node in reversed(graph.nodes):
        if node in natural and _demanded(node, plan, heads):
            plan.int8.add(node)
    for node in graph.nodes:
        # What reads a value that stays float after all stays float too.
        if node in plan.int8 and plan.roles.get(node) in (Role.PASS, Role.CAT, Role.POOL):
            plan.int8 -= set() if plan.int8.issuperset(_sources(node)) else {node}
        # The parts of a split tensor are uint8 if the whole is, whoever reads them.
        if plan.roles.get(node) is Role.PASS and node.op == "call_function" and node in natural:
            source = _sources(node)[0]
            if source in plan.int8 and _is_split(source):
                plan.int8.add(node)
    for output in [o for o in plan.adds if o not in plan.int8]:
        # An addition that stays in float is two plain nodes again.
        unit = plan.adds.pop(output)
        plan.inside.discard(unit.head)
        plan.roles[unit.head] = plan.roles[output] = Role.FLOAT


def _is_split(node: fx.Node) -> bool:
    return operation(node) in ("chunk", "split", "unbind")


def _demanded(node: fx.Node, plan: PrecisionPlan, heads: Mapping[fx.Node, fx.Node]) -> bool:
    """True if an int8 operation wants this value as uint8.

    An average alone does not, where others read real values: it is cheaper to average in float
    than to turn the whole value back.
    """
    weak = False
    in_float = False
    for user in node.users:
        if user in heads:
            if heads[user] in plan.layers or heads[user] in plan.int8:
                return True
            in_float = True
        elif user in plan.int8 and plan.roles[user] is Role.POOL:
            weak = True
        elif user in plan.int8:
            return True
        elif plan.roles.get(user) is not Role.SHAPE:
            in_float = True
    return weak and not in_float


def _fuse_residuals(plan: PrecisionPlan, graph: fx.Graph, modules: Mapping[str, nn.Module]) -> None:
    """Move an addition into the convolution before it, where that is its only reader."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    for output, add in list(plan.adds.items()):
        for operand in sorted(add.head.all_input_nodes, key=position.__getitem__, reverse=True):
            second = next((a for a in add.head.all_input_nodes if a is not operand), None)
            conv = plan.layers.get(operand)
            fits = (
                second in plan.int8
                and conv is not None
                and ACTIVATIONS[conv.activation].idle
                and conv.residual is None
                and add.activation in LAYER_FORMS[type(modules[str(conv.head.target)])].after_adding
                and sole_user(operand) is add.head
                and plan.values[operand].shape == plan.values[second].shape
            )
            if fits and conv is not None:
                del plan.layers[operand], plan.adds[output]
                plan.int8.discard(operand)
                plan.inside.update({operand, add.head} - {output})
                plan.layers[output] = Unit(conv.head, output, add.activation, second)
                break


def _choose_bits(plan: PrecisionPlan, graph: fx.Graph) -> None:
    """Give each value the most bits that a reader asks for: a layer its own, a sum those of its result."""
    asked: dict[fx.Node, int] = {}

    def ask(value: fx.Node, bits: int) -> None:
        asked[value] = max(asked.get(value, 0), bits)

    def of_layer(head: fx.Node) -> int:
        return plan.widths[str(head.target)].activation or 0

    for node in reversed(graph.nodes):
        own = asked.get(node, 0)
        if node in plan.layers:
            unit = plan.layers[node]
            ask(source(unit.head), of_layer(unit.head))
            if unit.residual is not None:
                ask(unit.residual, own)
        elif node in plan.adds:
            for operand in plan.adds[node].head.all_input_nodes:
                ask(operand, own)
        elif node in plan.calibrated:
            ask(source(node), of_layer(node))
        elif node in plan.int8:
            for value in _sources(node):
                ask(value, own)
    for value, bits in asked.items():
        shared = plan.representative(value)
        plan.bits[shared] = max(plan.bits.get(shared, 0), bits)
    plan.bits = {value: bits for value, bits in plan.bits.items() if bits}


def _share(plan: PrecisionPlan) -> None:
    for node in plan.int8:
        if plan.derived(node):
            for source in _sources(node):
                plan.share(source, node)
