"""Runs a Program's graph on labels, again and again until no more of them are tied."""

import operator
from typing import Any

import torch
from torch import Tensor, fx

from modelopt_cli.program.calls import arguments, compute, operation, values_of
from modelopt_cli.program.channels.function_rules import RULES
from modelopt_cli.program.channels.indexing import indices_of, picked_dims
from modelopt_cli.program.channels.layer_rules import apply_layer
from modelopt_cli.program.channels.shuffles import find_shuffles
from modelopt_cli.program.channels.sizes import freeze_sizes
from modelopt_cli.program.channels.ties import compact, nothing
from modelopt_cli.program.channels.trace import MOVES_ONLY, PLACES, Fetched, Trace, blank, tensors_in
from modelopt_cli.program.program import Program
from modelopt_cli.program.shapes import value_shapes

_MOST_PASSES = 12


def run(program: Program) -> Trace:
    """Label all values of a Program, tied until nothing changes any more."""
    trace = Trace(program)
    trace.shapes = value_shapes(program, 1)
    classes = -1
    for attempt in range(_MOST_PASSES):
        _one_pass(trace)
        if attempt == 0:
            trace.selections, trace.inside = find_shuffles(program.graph, trace.values, trace.shapes)
        elif attempt > 1 and trace.ties.classes == classes:
            return trace
        trace.boxed = True
        classes = trace.ties.classes
    raise AssertionError("labels keep changing")


def _one_pass(trace: Trace) -> None:
    trace.slots.clear()
    trace.fields.clear()
    trace.counted.clear()
    trace.ties.frozen.clear()
    trace.read.clear()
    trace.loose.clear()
    trace.sole.clear()
    trace.unfollowed.clear()
    for node in trace.program.graph.nodes:
        value = _value(trace, node)
        if tensors_in(value) and operation(node) not in MOVES_ONLY - PLACES:
            freeze_sizes(trace, node)
        if trace.boxed and node.name not in trace.inside:
            value = _box(trace, node, value)
        trace.values[node.name] = value
    trace.loose_blocks()
    _tie_slots(trace)


def _value(trace: Trace, node: fx.Node) -> Any:
    if node.op == "placeholder":
        return nothing(trace.shapes[node.name])
    if node.op == "get_attr":
        return Fetched(str(node.target), operator.attrgetter(str(node.target))(trace.program))
    if node.op == "output":
        for result in node.all_input_nodes:
            for value in tensors_in(trace.values[result.name]):
                trace.ties.freeze(trace.labels(value), "feeds the network's output")
        return None
    if node.name in trace.selections:
        chosen = trace.selections[node.name]
        return trace.values[chosen.source].index_select(chosen.dim, chosen.index)
    if node.op == "call_module":
        return apply_layer(trace, node)
    bound = values_of(arguments(node), trace.values)
    if not tensors_in(bound):
        value = compute(node, trace.values)
        return blank(trace.shapes[node.name]) if tensors_in(value) else value
    rule = RULES.get(operation(node))
    return rule(trace, node, bound) if rule else trace.unsupported(node, bound)


def _box(trace: Trace, node: fx.Node, value: Any) -> Any:
    """Tie what would leave a hole in a value, and values whose parts are read one by one."""
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        for part in value:
            _note_single(trace, node, part)
    if not isinstance(value, Tensor):
        return value
    value = trace.ties.product(value, _indexed_dims(node, value.dim()))
    _note_single(trace, node, value)
    return value


def _note_single(trace: Trace, node: fx.Node, value: Any) -> None:
    """Note the class that is all there is of a value, which would be empty without it."""
    if not isinstance(value, Tensor):
        return
    (label,) = compact(trace.ties.expanded(value))
    if label.numel() == 1 and int(label) >= 0:
        trace.sole.append((label.flatten(), f"is all there is of {node.name}"))


def _indexed_dims(node: fx.Node, rank: int) -> list[int]:
    """The dimensions of which a reader takes single places."""
    dims = set()
    for user in node.users:
        name = operation(user)
        if name in ("unbind", "select"):
            dims.add(int(arguments(user)["dim"]) % rank)
        elif name == "getitem" and arguments(user)["input"] is node:
            dims.update(picked_dims(indices_of(user), rank))
    return sorted(dims)


def _tie_slots(trace: Trace) -> None:
    """A tensor used several times has one set of channels."""
    first: dict[tuple[str, int], Tensor] = {}
    for slot in trace.slots:
        trace.ties.same(first.setdefault((slot.tensor, slot.dim), slot.line), slot.line)
