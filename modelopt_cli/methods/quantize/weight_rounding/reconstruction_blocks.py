"""Blocks of a network whose outputs are reconstructed at once: cut where one value is all that goes on.

A residual branch is a block, since its shortcut goes past every value inside. Layers in a chain are put
together as in an inverted residual: up to three of them, and not beyond one without an activation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from modelopt_cli.methods.quantize.weight_rounding.rounding_problem import RoundingProblem
from modelopt_cli.methods.quantize.weight_rounding.simulation import Simulation
from modelopt_cli.program.parted import parts_of_network

IN_CHAIN = 3
"""Most layers of a chain that make one block."""
LARGEST = 10
"""Most layers of a block; of a larger one each is taken alone."""


@dataclass(frozen=True)
class Block:
    """Nodes of a simulation whose result is reconstructed.

    Attributes:
        nodes: in graph order.
        inputs: values from outside that they read.
        result: the last value, rounded where it is rounded.
        layers: names of the integer layers in it.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    result: fx.Node
    layers: tuple[str, ...]


def find_blocks(problem: RoundingProblem, simulation: Simulation) -> list[Block]:
    """The blocks of a network in graph order; layers alone where it cannot be cut."""
    finder = _Finder(problem, simulation)
    blocks: list[Block] = []
    for segment in finder.joined(finder.segments()):
        block = finder.block(segment)
        if len(block.layers) <= LARGEST and finder.is_of_samples(block):
            blocks.append(block)
        else:
            blocks += finder.layers(segment)
    return [block for block in blocks if block.layers]


def layer_blocks(problem: RoundingProblem, simulation: Simulation) -> list[Block]:
    """Each layer with its activation as a block of its own, in graph order."""
    finder = _Finder(problem, simulation)
    return [block for block in finder.layers(finder.nodes) if block.layers]


class _Finder:
    """A simulated graph and what must be known of it."""

    def __init__(self, problem: RoundingProblem, simulation: Simulation) -> None:
        self.problem, self.simulation = problem, simulation
        graph = simulation.program.graph
        self.nodes = [node for node in graph.nodes if node.op != "output"]
        self.place = {node: place for place, node in enumerate(graph.nodes)}
        self.units = {unit.head: unit for unit in problem.plan.layers.values()}

    def segments(self) -> Iterator[list[fx.Node]]:
        """Runs of nodes between which one value is all that goes on."""
        live: set[fx.Node] = set()
        segment: list[fx.Node] = []
        for node in self.nodes:
            segment.append(node)
            if node.op != "get_attr":  # a parameter is nobody's result
                live.add(node)
            live = {value for value in live if self._last_reader(value) > self.place[node]}
            if len(live) == 1 and self._rows(*live) == 1:
                yield segment
                segment = []
        if segment:
            yield segment

    def joined(self, segments: Iterator[list[fx.Node]]) -> Iterator[list[fx.Node]]:
        """Segments without layers joined with the one before, and those of one layer with each other."""
        joined: list[fx.Node] = []
        for segment in segments:
            before, more = len(self._layers(joined)), len(self._layers(segment))
            chained = before + more <= IN_CHAIN and more == 1 and self._activated(joined)
            if not joined or not before or not more or chained:
                joined = joined + segment
            else:
                yield joined
                joined = segment
        if joined:
            yield joined

    def layers(self, nodes: Sequence[fx.Node]) -> list[Block]:
        """The layers among some nodes, each with its activation, as blocks."""
        blocks = []
        for node in nodes:
            unit = self.units.get(self.simulation.originals[node])
            if unit is None or self.simulation.copies[unit.head] is not node:
                continue
            own = [node]
            if unit.residual is None:  # else the sum and its activation are of another value as well
                copies = (self.simulation.copies[unit.output], self.simulation.rounded.get(unit.output))
                own += [copy for copy in copies if copy is not None and self._follows(copy, own[-1])]
            block = self.block(own)
            if len({self._rows(value) for value in (*block.inputs, block.result)}) == 1:
                blocks.append(block)
        return blocks

    def block(self, nodes: Sequence[fx.Node]) -> Block:
        """The block of some nodes."""
        own = [node for node in nodes if node.op != "placeholder"]
        inputs = dict.fromkeys(value for node in own for value in node.all_input_nodes if value not in own)
        return Block(tuple(own), tuple(inputs), own[-1], tuple(self._layers(own)))

    def is_of_samples(self, block: Block) -> bool:
        """True if the first dimension of all that goes in and comes out is that of the samples."""
        if len(block.inputs) > 1 and parts_of_network(self.problem.program) is not None:
            return False  # parts may see different numbers of rows
        return all(self._rows(value) == 1 for value in (*block.inputs, block.result))

    def _follows(self, node: fx.Node, before: fx.Node) -> bool:
        return self.place[node] == self.place[before] + 1

    def _last_reader(self, value: fx.Node) -> int:
        return max(map(self.place.__getitem__, value.users), default=-1)

    def _rows(self, node: fx.Node) -> int | None:
        """Size of the first dimension of the value for one sample; None where it is no tensor."""
        value = self.problem.plan.values.get(self.simulation.originals[node])
        return len(value) if isinstance(value, Tensor) and value.dim() > 1 else None

    def _layers(self, nodes: Sequence[fx.Node]) -> list[str]:
        """Integer layers that some nodes call and whose rounding is free."""
        called = dict.fromkeys(str(node.target) for node in nodes if node.op == "call_module")
        return [name for name in called if name in self.problem.layers and self.problem.layers[name].free]

    def _activated(self, nodes: Sequence[fx.Node]) -> bool:
        """True if the last layer among some nodes has an activation."""
        heads = [head for node in nodes if (head := self.simulation.originals[node]) in self.units]
        return bool(heads) and self.units[heads[-1]].activation != "none"
