"""Reconstruction of a network's values, block by block: integers are chosen by what they do to a result.

Blocks are taken in graph order. The inputs of a block have gone through the integer network as it is by then,
so that later blocks make up for the errors of earlier ones; its target is the result of the float network. Of
the activations only those of one block are held.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from modelopt_cli.methods.layer_pass import LayerPass
from modelopt_cli.methods.quantize.weight_rounding.block_learning import (
    BlockLearner,
    BlockRunner,
    BlockValues,
    Learning,
)
from modelopt_cli.methods.quantize.weight_rounding.reconstruction_blocks import Block
from modelopt_cli.methods.quantize.weight_rounding.rounding_problem import (
    Rounded,
    RoundedLayer,
    RoundingProblem,
)
from modelopt_cli.methods.quantize.weight_rounding.simulation import Simulation, StepRounding, set_weight

HELD_BYTES = 1 << 29
"""Bytes of a block's inputs and results that are held; of larger ones fewer samples."""


class Reconstruction:
    """Goes through a network once and learns its blocks.

    Args:
        problem: the float network and its plan.
        simulation: of it; its weights and steps become what was learned.
        learning: the settings.
    """

    def __init__(self, problem: RoundingProblem, simulation: Simulation, learning: Learning) -> None:
        self.problem, self.simulation, self.learning = problem, simulation, learning
        self.runner = BlockRunner(simulation.program)
        self.real, self.rounded = (
            LayerPass(program, problem.data, problem.context, calls_of=problem.program)
            for program in (problem.program, simulation.program)
        )
        self.known: dict[str, RoundedLayer] = {}
        self.settled: set[StepRounding] = set()

    def run(self, blocks: Sequence[Block]) -> Rounded:
        """Learn every block.

        Args:
            blocks: in graph order.

        Raises:
            DataError: there are no samples.
        """
        context = self.problem.context
        for number, block in enumerate(blocks):
            self._learn(block, context.seed + number)
            if context.progress is not None:
                context.progress(number + 1, len(blocks))
        learned = {value: step for value, step in self.simulation.steps.items() if step in self.settled}
        steps = {value: step.qparams for value, step in learned.items()}
        return Rounded(self.known, {**self.problem.qparams, **steps})

    def _learn(self, block: Block, seed: int) -> None:
        layers = {name: self.problem.layers[name] for name in block.layers if name not in self.known}
        if not layers:  # called before, in another block
            return
        values = self._values(block)
        at_once = self.learning.samples_at_once(self._numbers(block), len(values.target))
        roundings = self._roundings(block)
        learner = BlockLearner(self.runner, block, layers, roundings, self.learning, seed)
        for name, steps in learner.learn(values, self.problem.steps, at_once).items():
            set_weight(self.simulation.program.get_submodule(name), layers[name].real(steps))
            self.known[name] = RoundedLayer(steps.to(torch.int8), layers[name].grid.scale)
        self.settled.update(roundings)

    def _values(self, block: Block) -> BlockValues:
        """The block's values for as many samples as may be held."""
        originals, values = self.simulation.originals, self.problem.plan.values
        first = next(node for node in block.nodes if self.simulation.copies[originals[node]] is node)
        sources, result = [originals[value] for value in block.inputs], originals[block.result]
        after = self.real.nodes[self.real.nodes.index(result) + 1]
        held = 4 * (values[result].numel() + 2 * sum(values[each].numel() for each in sources))
        most = max(HELD_BYTES // (held * self.problem.context.batch_size), 1)
        return BlockValues(
            _gathered(self.rounded.values(block.nodes[0], block.inputs), most),
            _gathered(self.real.values(originals[first], sources), most),
            *_gathered(self.real.values(after, (result,)), most),
        )

    def _numbers(self, block: Block) -> int:
        """Numbers that a block computes for one sample."""
        known = self.problem.plan.values
        values = [known.get(self.simulation.originals[node]) for node in block.nodes]
        return sum(value.numel() for value in values if isinstance(value, Tensor))

    def _roundings(self, block: Block) -> list[StepRounding]:
        """Roundings of activations in a block, and in none before."""
        calls = [str(node.target) for node in block.nodes if node.op == "call_module"]
        called = dict.fromkeys(map(self.simulation.program.get_submodule, calls))
        return [each for each in called if isinstance(each, StepRounding) and each not in self.settled]


def _gathered(batches: Iterator[tuple[Any, ...]], most: int) -> tuple[Tensor, ...]:
    """The values of the first batches as one; the others go by."""
    kept = [tuple(value.clone() for value in values) for n, values in enumerate(batches) if n < most]
    return tuple(torch.cat(column) for column in zip(*kept, strict=True))
