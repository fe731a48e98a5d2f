"""Learning of one block: weights go up or down, and steps change, as its result comes near a target."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functional_call

from modelopt_cli.methods.quantize.weight_rounding.random_dropping import dropped
from modelopt_cli.methods.quantize.weight_rounding.reconstruction_blocks import Block
from modelopt_cli.methods.quantize.weight_rounding.rounding_problem import IntegerLayer
from modelopt_cli.methods.quantize.weight_rounding.simulation import StepRounding
from modelopt_cli.methods.quantize.weight_rounding.soft_rounding import (
    SoftRounding,
    annealed,
    cosine,
    undecided,
)


@dataclass(frozen=True)
class Learning:
    """Settings of a reconstruction.

    Attributes:
        batch_size: samples in a step.
        numbers: about as many numbers a step computes at most, by smaller batches.
        least_batch: samples in a step at least.
        way: how far a logit of a weight can go in all steps.
        step_way: how far the logarithm of an activation's step size can go in all steps; 0 where it stays.
        dropped: activations inside and before the block are left unrounded at random, half of them.
        pressure: weight of the regulariser, where the error is 1 at the beginning.
    """

    batch_size: int = 16
    numbers: int = 1 << 22
    least_batch: int = 2
    way: float = 6.0
    step_way: float = 0.0
    dropped: bool = False
    pressure: float = 3.0

    def samples_at_once(self, numbers: int, count: int) -> int:
        """Samples in a step.

        Args:
            numbers: that a block computes for one sample.
            count: samples that there are.
        """
        fitting = self.numbers // max(numbers, 1)
        return min(max(fitting, self.least_batch), self.batch_size, count)


@dataclass(frozen=True)
class BlockValues:
    """Values of a block for the calibration samples.

    Attributes:
        rounded: its inputs in the integer network, each ``(N, ...)``.
        real: its inputs in the float network.
        target: its result in the float network.
    """

    rounded: tuple[Tensor, ...]
    real: tuple[Tensor, ...]
    target: Tensor


class BlockRunner(fx.Interpreter):
    """Computes a block's result with other weights for some layers.

    Args:
        program: the simulated network.

    Attributes:
        weights: by layer, where they are not the layer's own.
    """

    def __init__(self, program: fx.GraphModule) -> None:
        super().__init__(program)
        self.weights: dict[str, Tensor] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        weight = self.weights.get(target)
        if weight is None:
            return super().call_module(target, args, kwargs)
        return functional_call(self.fetch_attr(target), {"weight": weight}, args, kwargs)

    def run_block(self, block: Block, inputs: Sequence[Tensor]) -> Tensor:
        """The result for inputs in the order of ``block.inputs``."""
        self.env = dict(zip(block.inputs, inputs, strict=True))
        for node in block.nodes:
            self.env[node] = self.run_node(node)
        result: Tensor = self.env[block.result]
        self.env = {}
        return result


class BlockLearner:
    """Learns one block.

    Args:
        runner: computes it.
        block: the block.
        layers: those whose weights learn, by name.
        roundings: what rounds activations in it and learns, too.
        learning: the settings.
        seed: of the samples of each step and of what is dropped.
    """

    def __init__(
        self,
        runner: BlockRunner,
        block: Block,
        layers: Mapping[str, IntegerLayer],
        roundings: Sequence[StepRounding],
        learning: Learning,
        seed: int,
    ) -> None:
        self.runner, self.block, self.layers, self.learning = runner, block, layers, learning
        self.roundings = roundings
        self.softs = {name: SoftRounding(layer.grid) for name, layer in layers.items()}
        self.generator = torch.Generator().manual_seed(seed)

    @torch.enable_grad()
    def learn(self, values: BlockValues, steps: int, batch_size: int) -> dict[str, Tensor]:
        """Take all steps.

        Args:
            values: of the block.
            steps: how many.
            batch_size: samples in a step.

        Returns:
            The integers of each layer's weight, float32, output channels first. The roundings have learned.
        """
        optimizer = self._optimizer(steps)
        rates = [group["lr"] for group in optimizer.param_groups]
        initial = self._initial_error(values, batch_size)
        for rounding in self.roundings:
            rounding.generator = self.generator if self.learning.dropped else None
        for step in range(steps):
            done = step / steps
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * cosine(done) if group["falls"] else rate
            optimizer.zero_grad(set_to_none=True)
            self._loss(values, batch_size, initial, annealed(done)).backward()
            optimizer.step()
        for rounding in self.roundings:
            rounding.generator = None
            rounding.growth.requires_grad_(False)
        self.runner.weights.clear()
        return {name: soft.settled() for name, soft in self.softs.items()}

    def _optimizer(self, steps: int) -> torch.optim.Adam:
        logits = [soft.logits for soft in self.softs.values()]
        groups: list[dict[str, Any]] = [{"params": logits, "lr": self.learning.way / steps, "falls": False}]
        for rounding in self.roundings if self.learning.step_way else ():
            rounding.growth.requires_grad_(True)
            groups.append({"params": [rounding.growth], "lr": self.learning.step_way / steps, "falls": True})
        return torch.optim.Adam(groups)

    def _loss(self, values: BlockValues, batch_size: int, initial: float, beta: float | None) -> Tensor:
        """Squared error as a fraction of that before, and the regulariser."""
        chosen = torch.randint(len(values.target), (batch_size,), generator=self.generator)
        inputs = [value[chosen] for value in values.rounded]
        if self.learning.dropped:
            real = (value[chosen] for value in values.real)
            inputs = [dropped(*pair, self.generator) for pair in zip(inputs, real, strict=True)]
        raised = {name: soft.raised() for name, soft in self.softs.items()}
        for name, soft in self.softs.items():
            self.runner.weights[name] = self.layers[name].real(soft.steps(raised[name]))
        loss = (self.runner.run_block(self.block, inputs) - values.target[chosen]).square().mean() / initial
        if beta is not None:
            for each in raised.values():
                loss = loss + self.learning.pressure * undecided(each, beta)
        return loss

    @torch.no_grad()
    def _initial_error(self, values: BlockValues, batch_size: int) -> float:
        """Mean squared error of the result with the nearest integers; never 0."""
        result = self.runner.run_block(self.block, [value[:batch_size] for value in values.rounded])
        error = float((result - values.target[:batch_size]).square().mean())
        return max(error, torch.finfo(torch.float32).tiny)
