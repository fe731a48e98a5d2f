"""Time of each layer in int8 and in float, where it stands in the network, conversions included.

Networks are run node by node with their kernels, in turn: the int8 one, the fastest float32 form that torch
has without compiling (``kernels.fp32``), and float32 as it runs next to int8 layers. The conversion of a
value to uint8 counts for the layer that reads it, that back to float for the layer that made it. The fastest
of the runs counts, so that what else runs on the machine does not.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from modelopt_cli.kernels import prepare
from modelopt_cli.kernels.fp32 import Prepacked, prepack
from modelopt_cli.measure.latency import sample_input
from modelopt_cli.methods.quantize.conversion import convert
from modelopt_cli.methods.quantize.static import Calibrated
from modelopt_cli.program import Program
from modelopt_cli.program.input_batch import call, tensors_of
from modelopt_cli.program.parted import graph_input, joined
from modelopt_cli.program.quantized_operations import Dequantize, Quantize
from modelopt_cli.program.weighted import further_calls

ROUNDS = 15
"""Timed runs of each network."""
WARMUP = 3


@dataclass(frozen=True)
class LayerTime:
    """Milliseconds of a layer for one sample.

    Attributes:
        float32: with the activation that follows it.
        int8: the same, with the conversions that it alone makes necessary.
        mixed: in float32 next to int8 layers, where it is not packed, and its activation a step of its own.
    """

    float32: float
    int8: float
    mixed: float


def layer_times(ready: Calibrated, rounds: int = ROUNDS) -> dict[str, LayerTime]:
    """Measure all layers of a network in both precisions.

    Args:
        ready: the float network with its scales.
        rounds: timed runs of each of both networks.

    Returns:
        By name of the layer, the least of the rounds.
    """
    inputs = tensors_of(sample_input(graph_input(ready.program), 1))
    int8 = joined(prepare(convert(ready.program, ready.plan, ready.qparams, ready.shared), "cpu"))
    single = joined(ready.program)
    assert isinstance(single, Program)
    assert isinstance(int8, Program)
    packed = prepack(single)
    assert isinstance(packed, Prepacked)
    networks = [_Timed(packed.program), _Timed(int8), _Timed(single)]
    with torch.inference_mode():
        for done in range(WARMUP + rounds):
            for network in networks:
                network.run_timed(inputs, record=done >= WARMUP)
    packed_times, integers, plain = (network.least() for network in networks)
    return {
        name: LayerTime(_sum(packed_times, of_packed), _sum(integers, of_int8), _sum(plain, of_plain))
        for name, of_packed, of_int8, of_plain in _nodes_of_layers(ready, networks)
    }


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

    def least(self) -> dict[fx.Node, float]:
        return {node: min(times) for node, times in self.times.items()}


def _sum(times: Mapping[fx.Node, float], nodes: Iterable[fx.Node]) -> float:
    return sum(times.get(node, 0.0) for node in nodes)


def _nodes_of_layers(
    ready: Calibrated, networks: list[_Timed]
) -> Iterable[tuple[str, list[fx.Node], list[fx.Node], list[fx.Node]]]:
    """Each layer with its nodes in the packed graph, the int8 one and the plain one."""
    packed, integers, plain = (list(network.graph.nodes) for network in networks)
    after: dict[str, set[str]] = defaultdict(set)  # names of what follows a layer inside its unit
    for unit in ready.plan.layers.values():
        after[str(unit.head.target)].update({unit.output.name} | _between(unit.head, unit.output))
    int8 = networks[1].module
    assert isinstance(int8, Program)
    layers = {name: name for name in ready.selected} | further_calls(int8)
    owners = {node: _owner(node, int8, layers) for node in integers}
    for name in ready.selected:
        of_float = (
            [node for node in graph if node.target == name or node.name in after[name]]
            for graph in (packed, plain)
        )
        of_packed, of_plain = of_float
        yield name, of_packed, [node for node, owner in owners.items() if owner == name], of_plain


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
