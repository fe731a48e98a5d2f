"""The float network's graph with activations and weights rounded: an integer network before it is made.

It computes what the integer network will, up to how float32 sums are rounded. Unlike the graph of integer
layers it has every value of the float network, so that each can be compared.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from modelopt_cli.methods.quantize.conversion import values_to_observe
from modelopt_cli.methods.quantize.learning.fake_quantize import StepSize
from modelopt_cli.methods.quantize.weight_rounding.random_dropping import dropped
from modelopt_cli.methods.quantize.weight_rounding.rounding_problem import RoundingProblem
from modelopt_cli.program import Program
from modelopt_cli.program.layer_kinds import share
from modelopt_cli.program.quantization import QParams
from modelopt_cli.program.rewrite import parts_of


class StepRounding(StepSize):
    """Rounding of an activation, which can be dropped at random while a block is learned.

    Args:
        q: scale and zero point at the start.

    Attributes:
        generator: where rounding is dropped at random, as by ``dropped``; None where all is rounded.
    """

    def __init__(self, q: QParams) -> None:
        super().__init__(q)
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        rounded = super().forward(x)
        return rounded if self.generator is None else dropped(rounded, x, self.generator)


@dataclass(frozen=True)
class Simulation:
    """The rounded network, and the float network's values in it.

    Attributes:
        program: the graph with rounding, all weights the nearest integers' values.
        steps: what rounds activations, by representative.
        originals: the node of the float network whose value a node has, rounded or not.
        copies: the node that computes the value of one of the float network.
        rounded: the node that rounds the value of one of the float network.
    """

    program: Program
    steps: dict[fx.Node, StepRounding]
    originals: dict[fx.Node, fx.Node]
    copies: dict[fx.Node, fx.Node]
    rounded: dict[fx.Node, fx.Node]


def simulate(problem: RoundingProblem) -> Simulation:
    """The rounded network of a problem, weights rounded to the nearest."""
    program, plan = problem.program, problem.plan
    watched = values_to_observe(plan, program.graph)
    steps = {value: StepRounding(problem.qparams[value]) for value in watched}
    rounding_of = {node: value for value, nodes in watched.items() for node in nodes}
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    rounded: dict[fx.Node, fx.Node] = {}
    originals: dict[fx.Node, fx.Node] = {}
    modules: dict[str, nn.Module] = {}

    def round_value(node: fx.Node) -> None:
        name = f"{node.name}_rounded"
        while hasattr(program, name):
            name += "_"
        modules[name] = steps[rounding_of[node]]
        rounded[node] = graph.create_node("call_module", name, (copies[node],), {}, name=name)
        originals[rounded[node]] = node

    for node in program.graph.nodes:
        reads_rounded = node in problem.heads
        for value in node.all_input_nodes if reads_rounded else ():
            # A real value is rounded for the integer layers that read it alone, as late as can be.
            if value in rounding_of and value not in rounded:
                round_value(value)

        def form(value: fx.Node, reads_rounded: bool = reads_rounded) -> fx.Node:
            is_rounded = value in rounded and (reads_rounded or value in plan.int8)
            return rounded[value] if is_rounded else copies[value]

        copies[node] = graph.node_copy(node, form)
        originals[copies[node]] = node
        if node in plan.int8 and node in rounding_of:
            round_value(node)

    parts = parts_of(program, program.graph, lambda path: share(program.get_submodule(path)))
    simulated = program.with_graph({**parts, **modules}, graph).eval()
    for name, layer in problem.layers.items():
        set_weight(simulated.get_submodule(name), layer.real(layer.grid.nearest))
    return Simulation(simulated, steps, originals, copies, rounded)


def set_weight(layer: nn.Module, weight: Tensor) -> None:
    """Give a layer a weight of its own."""
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
