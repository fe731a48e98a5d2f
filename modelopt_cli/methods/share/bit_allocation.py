"""As many bits for each weight as it needs: what ``--bits auto`` does.

Values are put onto evenly spaced levels, which is as good as any table where indices are coded down to
their entropy (Gish and Pierce, "Asymptotically efficient quantizing", 1968), and takes one number to store.
One price, ``mu``, that of a bit in nats of the answers' divergence, decides everything: a layer whose
outputs' squared error costs ``s`` nats may spend ``mu / s`` of it on a bit, which gives the distance of its
levels and which level each weight takes.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt_cli.methods.answers import Answers
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.layer_pass import evaluation_copy
from modelopt_cli.methods.matrices import DECONVS
from modelopt_cli.methods.prune.masks import Masks
from modelopt_cli.methods.share.compensation import Layer, Levels, layers, put, watchable
from modelopt_cli.program import Encoding, Program

LARGEST = 127
"""Levels on either side of zero, at most."""
BIT_IN_STEPS = 0.01
"""Squared error, in squared distances of the levels, that a bit is worth.

In theory 0.115: a bit more takes three quarters of a twelfth away. But errors that all point towards the
frequent levels add up in a layer's outputs: of a resnet8 on Fashion-MNIST at 23.5 kB the answers diverge by
0.0033 nats at 0.08, by 0.0020 at 0.02 and by 0.0018 at 0.01; smaller values change nothing.
"""
PASSES = 2
"""The first tells how frequent the levels are, the last chooses by that."""
COARSE = 3
"""Levels to a standard deviation at which the sensitivity of a layer is measured at first."""
LITTLE = 0.05
"""Divergence, in nats, up to which it is taken to grow with the squared error."""
ENOUGH = 64
"""Samples from which on a layer's inputs are looked at.

What makes up for errors on few samples does not do so on others: on EfficientNet-Lite0 at 2.4 MB, ten images
for calibration leave a divergence of 0.07 nats on other ten, and 0.03 without looking at inputs.
"""
BIAS_GROUP = 8
"""Values of a bias that have their levels in common: with those of a whole bias small ones would be lost."""
ANSWERS = 256
"""Samples whose answers are compared, at most, for each layer once."""


@dataclass(frozen=True)
class Scalar:
    """A weight on evenly spaced levels.

    Attributes:
        levels: int64 of the weight's shape, each from ``-LARGEST`` to ``LARGEST``.
        step: the distance of the levels, ``()``, or ``(O,)`` where it differs between output channels.
    """

    levels: Tensor
    step: Tensor

    def values(self) -> Tensor:
        """As codec ``affine`` computes them, float32."""
        return self.levels.to(torch.float32) * _by_row(self.step.float(), self.levels)

    def encoding(self) -> Encoding:
        """How the values are stored."""
        axis = 0 if self.step.dim() else None
        return Encoding("affine", {"bits": 8, "axis": axis, "group": None}, {"scale": self.step})


def _by_row(step: Tensor, weight: Tensor) -> Tensor:
    """Steps in a shape that broadcasts against the weight."""
    return step.view(-1, *[1] * (weight.dim() - 1)) if step.dim() else step


def rounded_bias(bias: Tensor) -> tuple[Tensor, Encoding]:
    """A bias in about ten bits a value, and its encoding: every few neighbours have levels of their own."""
    padded = torch.nn.functional.pad(bias.float(), (0, -len(bias) % BIAS_GROUP)).view(-1, BIAS_GROUP)
    step = padded.abs().amax(1).div(LARGEST).clamp(min=1e-30).mul(1 + 2**-7).to(torch.bfloat16)
    levels = (padded / step.float().unsqueeze(1)).round()
    values = (levels * step.float().unsqueeze(1)).flatten()[: len(bias)]
    return values, Encoding("affine", {"bits": 8, "axis": None, "group": BIAS_GROUP}, {"scale": step})


class Rated:
    """A network's weights, and how much the network minds errors in each.

    Args:
        program: in the form to be shared; it is not changed.
        names: weights to share.
        context: data, or none; seed, batch size, progress.
        samples: to look at, at most.

    Attributes:
        sensitivities: nats for each unit of squared error, by parameter name.
    """

    def __init__(self, program: Program, names: Mapping[str, str], context: Context, samples: int) -> None:
        self.program, self.names, self.context, self.samples = program, names, context, samples
        self.free = {name: mask for name, mask in Masks.of(program).masks.items() if name in names}
        enough = context.data is not None and (context.data.size or samples) >= ENOUGH
        self.watched = watchable(program, names) if enough else []
        self.sensitivities: dict[str, float] = {}
        self._means: dict[str, float] = {}
        if context.data is None:
            self._assume()
        else:
            self._measure()

    def _assume(self) -> None:
        """Without data: a relative error costs the same in every layer."""
        for name in self.names:
            energy = float(self.program.get_parameter(name).detach().double().square().sum())
            self.sensitivities[name] = 1 / max(energy, 1e-30)
            self._means[name] = 1.0

    def _measure(self) -> None:
        """Round one layer at a time, and see how far the answers move."""
        assert self.context.data is not None
        answers = Answers.of(self.program, self.context.data, self.context, ANSWERS)
        network = evaluation_copy(self.program, self.context.device)
        left = dict(self.names)
        for layer in layers(network, self.watched, self.context, self.samples) if self.watched else ():
            name = layer.parameter
            self.sensitivities[name] = self._sensitivity(name, answers, layer)
            curvature = layer.curvature()
            self._means[name] = float(curvature.importance(layer.weight.shape[-1]).mean())
            del left[name]
        for name in left:
            self.sensitivities[name] = self._sensitivity(name, answers, None)
            self._means[name] = 1.0

    def _sensitivity(self, name: str, answers: Answers, layer: Layer | None) -> float:
        """How far the answers move for each unit of squared error, where they move little.

        Far away they move less and less: a weight of a few large values, on coarse levels, is lost anyway.
        """
        weight = self.program.get_parameter(name).detach().float()
        step = float(weight.std(correction=0)) / COARSE
        while step:
            change = (weight / step).round() * step - weight
            variant = copy.deepcopy(self.program)
            with torch.no_grad():
                variant.get_parameter(name).add_(change)
                if layer is not None and (shift := layer.shift(change)) is not None:
                    variant.get_submodule(name.rpartition(".")[0]).get_parameter("bias").add_(shift)
            divergence, _ = answers.compare(variant)
            if divergence <= LITTLE:
                error = float(change.double().square().sum()) if layer is None else layer.error(change)
                return max(divergence, 1e-12) / max(error, 1e-30)
            step /= 4
        return 1.0  # of a weight whose values are all the same

    @property
    def count(self) -> int:
        """Weights that are to be shared."""
        return sum(self.program.get_parameter(name).numel() for name in self.names)

    def bits(self, price: float) -> float:
        """Bits of a weight, on average, by the entropy of its nearest levels."""
        total = 0.0
        for name in self.names:
            weight = self.program.get_parameter(name).detach().float()
            levels = _rounded(weight, self._step(name, price, weight))
            counts = torch.bincount(levels.flatten() + LARGEST).double()
            counts = counts[counts > 0]
            total += float((counts * (counts.sum() / counts).log2()).sum())
        return total / self.count

    def at(self, price: float) -> tuple[Program, dict[str, Scalar]]:
        """The network with each weight on the levels that a price of a bit, in nats, gives it."""
        network = evaluation_copy(self.program, self.context.device)
        found: dict[str, Scalar] = {}
        for layer in layers(network, self.watched, self.context, self.samples) if self.watched else ():
            found[layer.parameter], bias = self._compensated(layer, price)
            put(layer.module, found[layer.parameter].values(), bias)
        for name in self.names:
            if name not in found:
                found[name] = self._plain(name, price)
                with torch.no_grad():
                    network.get_parameter(name).copy_(found[name].values())
        return network.cpu(), {name: found[name] for name in self.names}

    def _step(self, name: str, price: float, weight: Tensor) -> Tensor:
        """The distance of levels; larger for output channels that would need too many of them."""
        worth = price / self.sensitivities[name] / self._means[name]
        step = torch.tensor(max(math.sqrt(worth / BIT_IN_STEPS), 1e-30))
        largest = weight.flatten(1).abs().amax(1) / LARGEST
        if float(largest.max()) <= float(step):
            return step
        if isinstance(self.program.get_submodule(name.rpartition(".")[0]), DECONVS):
            return largest.max()  # its weight does not begin with the output channels
        # Two bytes are enough for each; rounded up, so that the largest weight has a level.
        return torch.maximum(step, largest).mul(1 + 2**-7).to(torch.bfloat16)

    def _compensated(self, layer: Layer, price: float) -> tuple[Scalar, Tensor | None]:
        name, weight = layer.parameter, layer.module.weight.detach().float().cpu()
        free = self.free.get(name)
        curvature = layer.curvature()
        step = self._step(name, price, weight)
        index = _rounded(weight, step) + LARGEST
        bias = None
        for _ in range(PASSES):
            used, bits = _bits(index)
            table = (used - LARGEST).double()
            if step.dim():
                rows = step.double().view(getattr(layer.module, "groups", 1), -1, 1)
                table = rows * table
            else:
                table = table * step.double()
            rates = bits * price / self.sensitivities[name]
            zero = (used == LARGEST).long().argmax()
            chosen, bias = layer.choose(curvature, Levels(table, rates, zero), free)
            index = used[chosen]
        return Scalar(index - LARGEST, step), bias

    def _plain(self, name: str, price: float) -> Scalar:
        """Without knowing the inputs: each weight by itself."""
        weight = self.program.get_parameter(name).detach().float()
        step = self._step(name, price, weight)
        levels = _rounded(weight, step)
        free = self.free.get(name)
        return Scalar(levels if free is None else levels.masked_fill(~free, 0), step)


def _rounded(weight: Tensor, step: Tensor) -> Tensor:
    """The nearest levels."""
    return (weight / _by_row(step.float(), weight)).round().long().clamp(-LARGEST, LARGEST)


def _bits(index: Tensor) -> tuple[Tensor, Tensor]:
    """The levels that may be taken, from the first to the last in use and zero, and what each costs."""
    low, high = min(int(index.min()), LARGEST), max(int(index.max()), LARGEST)
    used = torch.arange(low, high + 1)
    counts = torch.bincount(index.flatten() - low, minlength=len(used)).double() + 0.5
    return used, -(counts / counts.sum()).log2()
