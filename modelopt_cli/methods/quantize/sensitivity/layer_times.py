"""Time of each layer in int8 and in float, where it stands in the network, conversions included.

Networks are run node by node with their kernels, in turn: the int8 one, the fastest float32 form that torch
has without compiling (``kernels.fp32``), which float layers have next to int8 ones, too, and one of bfloat16
where the CPU computes in it. The conversion of a value to uint8 counts for the layer that reads it, that back
to float for the layer that made it. The fastest of the runs counts, so that what else runs on the machine
does not.
"""

import copy
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from modelopt_cli.kernels import half_layers, prepare
from modelopt_cli.kernels.fp32 import packed, prepack
from modelopt_cli.measure.latency import sample_input
from modelopt_cli.methods.quantize.conversion import convert
from modelopt_cli.methods.quantize.schemes import SCHEMES
from modelopt_cli.methods.quantize.static import Calibrated
from modelopt_cli.methods.quantize.weight_only import cast_layers
from modelopt_cli.program import Program
from modelopt_cli.program.input_batch import call, tensors_of
from modelopt_cli.program.parted import graph_input, joined
from modelopt_cli.program.quantized_operations import Dequantize, Quantize
from modelopt_cli.program.weighted import further_calls

ROUNDS = 15
"""Timed runs of each network."""
WARMUP = 3
HALF_TYPES = tuple(row.float_type for row in SCHEMES.values() if row.float_type and row.of_layers)
"""Half-precision types that single layers may have."""


@dataclass(frozen=True)
class LayerTime:
    """Milliseconds of a layer for one sample.

    Attributes:
        float32: with the activation that follows it.
        int8: the same, with the conversions that it alone makes necessary.
        half: the same as ``float32``, with its weights stored in a half-precision type, by type.
    """

    float32: float
    int8: float
    half: Mapping[str, float]


def layer_times(ready: Calibrated, rounds: int = ROUNDS) -> dict[str, LayerTime]:
    """Measure all layers of a network in each precision.

    Args:
        ready: the float network with its scales.
        rounds: timed runs of each network.

    Returns:
        By name of the layer, the least of the rounds.
    """
    inputs = tensors_of(sample_input(graph_input(ready.program), 1))
    int8 = joined(prepare(convert(ready.program, ready.plan, ready.qparams, ready.shared), "cpu"))
    single = joined(ready.program)
    assert isinstance(single, Program)
    assert isinstance(int8, Program)
    real, integer = _Timed(prepack(single).program), _Timed(int8)
    halves = {each: _Timed(form) for each in HALF_TYPES if (form := _in_half(single, ready.selected, each))}
    networks = [real, integer, *halves.values()]
    with torch.inference_mode():
        for done in range(WARMUP + rounds):
            for network in networks:
                network.run_timed(inputs, record=done >= WARMUP)
    float32, int8_times = real.of(_nodes_in_float(ready, real)), integer.of(_nodes_in_int8(ready, integer))
    # Where the CPU has no units for a type, layers stored in it compute in float32.
    types = {
        each: halves[each].of(_nodes_in_float(ready, halves[each])) if each in halves else float32
        for each in HALF_TYPES
    }
    return {
        name: LayerTime(float32[name], int8_times[name], {each: of[name] for each, of in types.items()})
        for name in ready.selected
    }


def _in_half(program: Program, names: Iterable[str], float_type: str) -> Program | None:
    """The network with these layers in a half-precision type; None where this CPU does not compute in it."""
    half = copy.copy(program)
    cast_layers(half, dict.fromkeys(names, float_type))
    return packed(half) if half_layers.computed_in_half(prepare(half, "cpu")) else None


class _Timed(fx.Interpreter):
    """Runs a graph node by node and takes the time of each."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.times: dict[fx.Node, list[float]] = defaultdict(list)
        self._record = False
        self._node: fx.Node
        self._now = clock()

    def run_timed(self, inputs: tuple[Any, ...], *, record: bool) -> None:
        self._record = record
        self.run(*inputs)

    def run_node(self, n: fx.Node) -> Any:
        self._node = n
        return super().run_node(n)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._timed(super().call_module, target, args, kwargs)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._timed(super().call_function, target, args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._timed(super().call_method, target, args, kwargs)

    def _timed(self, called: Callable[..., Any], *given: Any) -> Any:
        start = self._now()
        value = called(*given)
        if self._record:
            self.times[self._node].append((self._now() - start) / 1e6)
        return value

    def of(self, layers: Mapping[str, Sequence[fx.Node]]) -> dict[str, float]:
        """Least times of layers, by their nodes."""
        least = {node: min(times) for node, times in self.times.items()}
        return {name: sum(least.get(node, 0.0) for node in nodes) for name, nodes in layers.items()}


def _nodes_in_float(ready: Calibrated, network: _Timed) -> dict[str, list[fx.Node]]:
    """The nodes of each layer, with the activation after it, in a float graph."""
    after: dict[str, set[str]] = defaultdict(set)  # names of what follows a layer inside its unit
    for unit in ready.plan.layers.values():
        after[str(unit.head.target)].update({unit.output.name} | _between(unit.head, unit.output))
    return {
        name: [node for node in network.graph.nodes if node.target == name or node.name in after[name]]
        for name in ready.selected
    }


def _nodes_in_int8(ready: Calibrated, network: _Timed) -> dict[str, list[fx.Node]]:
    """The nodes of each layer, with the conversions for its sake, in the int8 graph."""
    int8 = network.module
    assert isinstance(int8, Program)
    layers = {name: name for name in ready.selected} | further_calls(int8)
    owners = {node: _owner(node, int8, layers) for node in network.graph.nodes}
    return {name: [node for node, owner in owners.items() if owner == name] for name in ready.selected}


def _between(head: fx.Node, output: fx.Node) -> set[str]:
    """Names of the nodes from a layer to the end of its unit, which follow each other."""
    names, node = set[str](), head
    while node is not output:
        names.add(node.name)
        node = next(iter(node.users))
    return names - {head.name}


def _owner(node: fx.Node, int8: Program, layers: Mapping[str, str]) -> str | None:
    """The layer that a node of the int8 graph belongs to: its call, or a conversion for its sake.

    Args:
        node: of the graph.
        int8: the network.
        layers: layers by the targets of their calls.
    """
    if node.op != "call_module":
        return None
    if str(node.target) in layers:
        return layers[str(node.target)]
    module = int8.get_submodule(str(node.target))
    if not isinstance(module, Quantize | Dequantize):
        return None
    seen, waiting = {node}, [node]
    while waiting:
        current = waiting.pop(0)
        for near in current.users if isinstance(module, Quantize) else current.all_input_nodes:
            if near.op == "call_module" and str(near.target) in layers:
                return layers[str(near.target)]
            if near not in seen:
                seen.add(near)
                waiting.append(near)
    return None


def network_times(ready: Calibrated, networks: Sequence[Program], rounds: int = ROUNDS) -> list[float]:
    """Least milliseconds for one sample: of the fastest float32 form, and of each network.

    Args:
        ready: the float network.
        networks: made from it, with their kernels.
        rounds: timed runs of each, in turn.
    """
    inputs = sample_input(graph_input(ready.program), 1)
    single = joined(ready.program)
    assert isinstance(single, Program)
    calls: list[Callable[..., Any]] = [prepack(single), *map(joined, networks)]
    least, now = [math.inf] * len(calls), clock()
    with torch.inference_mode():
        for done in range(WARMUP + rounds):
            for number, network in enumerate(calls):
                start = now()
                call(network, inputs)
                if done >= WARMUP:
                    least[number] = min(least[number], (now() - start) / 1e6)
    return least


def clock() -> Callable[[], int]:
    """Nanoseconds of work: of one thread that does it all, the time that it waits for others is none."""
    return time.thread_time_ns if torch.get_num_threads() == 1 else time.perf_counter_ns
