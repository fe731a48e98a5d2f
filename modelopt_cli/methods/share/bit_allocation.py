"""Bit allocation: as many bits for each weight as it needs, which is what ``--bits auto`` does.

Values are put onto evenly spaced levels, which is as good as any codebook where indices are coded down to
their entropy (Gish and Pierce, "Asymptotically efficient quantizing", 1968), and takes one number to store.
One price, ``mu``, that of a bit in nats of the outputs' divergence, decides everything: a layer whose
outputs' squared error costs ``s`` nats may spend ``mu / s`` of it on a bit, which gives the distance of its
levels and which level each weight takes.
"""

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt_cli.artifact.codecs.affine import Affine
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.layer_pass import evaluation_copy
from modelopt_cli.methods.matrices import DECONVS
from modelopt_cli.methods.prune.masks import Masks
from modelopt_cli.methods.reference_outputs import ReferenceOutputs
from modelopt_cli.methods.share.compensation import (
    CalibratedLayer,
    Levels,
    calibrated_layers,
    set_values,
    watchable,
)
from modelopt_cli.program import Encoding, Program

LARGEST_LEVEL = 127
"""Levels on either side of zero, at most."""
BIT_IN_STEPS = 0.01
"""Squared error, in squared distances of the levels, that a bit is worth.

In theory 0.115: a bit more takes three quarters of a twelfth away. But errors that all point towards the
frequent levels add up in a layer's outputs: of a resnet8 on Fashion-MNIST at 23.5 kB the outputs diverge by
0.0033 nats at 0.08, by 0.0020 at 0.02 and by 0.0018 at 0.01; smaller values change nothing.
"""
PASSES = 2
"""The first pass tells how frequent the levels are, the last chooses by that."""
PROBE_LEVELS = 3
"""Levels to a standard deviation at which the sensitivity of a layer is measured at first."""
SMALL_DIVERGENCE = 0.05
"""Divergence, in nats, up to which it is taken to grow with the squared error."""
MIN_SAMPLES = 64
"""Samples from which on a layer's inputs are looked at.

Compensation that is right for a few samples is wrong for others: on EfficientNet-Lite0 at 2.4 MB, ten images
for calibration leave a divergence of 0.07 nats on other ten, and 0.03 without looking at inputs.
"""
BIAS_GROUP = 8
"""Values of a bias that have their levels in common: with those of a whole bias small ones would be lost."""
COMPARED_SAMPLES = 256
"""Samples on which outputs are compared, at most, once for each layer."""
_TINY = 1e-30
"""Smallest step and squared error, so that weights that are all zero divide by something."""


@dataclass(frozen=True)
class LevelWeight:
    """A weight on evenly spaced levels.

    Attributes:
        levels: int64 of the weight's shape, each from ``-LARGEST_LEVEL`` to ``LARGEST_LEVEL``.
        step: distance of the levels, ``()``, or ``(O,)`` where it differs between output channels.
    """

    levels: Tensor
    step: Tensor

    def values(self) -> Tensor:
        """The weight as codec ``affine`` decodes it, float32."""
        return self.levels.to(torch.float32) * _broadcast(self.step.float(), self.levels)

    def encoding(self) -> Encoding:
        """The encoding that stores the values."""
        axis = 0 if self.step.dim() else None
        return Encoding(Affine.name, {"bits": 8, "axis": axis, "group": None}, {"scale": self.step})


def _broadcast(step: Tensor, weight: Tensor) -> Tensor:
    """Steps of output channels in a shape that broadcasts against the weight."""
    return step.view(-1, *[1] * (weight.dim() - 1)) if step.dim() else step


def _rounded_up(step: Tensor) -> Tensor:
    """Steps in two bytes each, rounded up so that the largest value still has a level."""
    return step.mul(1 + 2**-7).to(torch.bfloat16)


def rounded_bias(bias: Tensor) -> tuple[Tensor, Encoding]:
    """A bias ``(O,)`` in about ten bits a value, and its encoding: every few neighbours have a step."""
    padded = torch.nn.functional.pad(bias.float(), (0, -len(bias) % BIAS_GROUP)).view(-1, BIAS_GROUP)
    step = _rounded_up(padded.abs().amax(1).div(LARGEST_LEVEL).clamp(min=_TINY))
    levels = (padded / step.float().unsqueeze(1)).round()
    values = (levels * step.float().unsqueeze(1)).flatten()[: len(bias)]
    return values, Encoding(Affine.name, {"bits": 8, "axis": None, "group": BIAS_GROUP}, {"scale": step})


def round_biases(network: Program, names: Iterable[str]) -> Program:
    """The network itself, the biases of layers with these weights on few levels: ten bits each, not 32."""
    for name in names:
        bias = network.get_submodule(name.rpartition(".")[0])._parameters.get("bias")
        if name.endswith(".weight") and isinstance(bias, Tensor) and bias.dtype == torch.float32:
            values, encoding = rounded_bias(bias.detach())
            with torch.no_grad():
                bias.copy_(values)
            network.encodings[f"{name.removesuffix('weight')}bias"] = encoding
    return network


class BitAllocation:
    """Sensitivities of a network's weights, and the levels that a price of a bit gives each of them.

    Args:
        program: in the form to be clustered; it is not changed.
        names: labels of the weights, by parameter name.
        context: data, or none; seed, batch size, progress.
        samples: most samples to look at.

    Attributes:
        sensitivities: nats for each unit of squared error, by parameter name.
        watched: weights whose inputs are looked at.
    """

    def __init__(self, program: Program, names: Mapping[str, str], context: Context, samples: int) -> None:
        self.program, self.names, self.context, self.samples = program, names, context, samples
        self.unpruned = {name: mask for name, mask in Masks.of(program).masks.items() if name in names}
        enough = context.data is not None and (context.data.size or samples) >= MIN_SAMPLES
        self.watched = watchable(program, names) if enough else []
        self.sensitivities: dict[str, float] = {}
        self._mean_importances = dict.fromkeys(names, 1.0)
        if context.data is None:
            self._assume_sensitivities()
        else:
            self._measure_sensitivities()

    def _assume_sensitivities(self) -> None:
        """Without data: a relative error costs the same in every layer."""
        for name in self.names:
            energy = float(self.program.get_parameter(name).detach().double().square().sum())
            self.sensitivities[name] = 1 / max(energy, _TINY)

    def _measure_sensitivities(self) -> None:
        """Round one layer at a time, and see how far the outputs move."""
        assert self.context.data is not None
        outputs = ReferenceOutputs.of(self.program, self.context.data, self.context, COMPARED_SAMPLES)
        for layer in self._layers(evaluation_copy(self.program, self.context.device)):
            name = layer.parameter
            self.sensitivities[name] = self._sensitivity(name, outputs, layer)
            importance = layer.curvature().importance(layer.weight.shape[-1])
            self._mean_importances[name] = float(importance.mean())
        for name in self.names:
            if name not in self.sensitivities:
                self.sensitivities[name] = self._sensitivity(name, outputs, None)

    def _layers(self, network: Program) -> Iterable[CalibratedLayer]:
        """The watched layers in call order, on inputs through the layers as they are by then."""
        return calibrated_layers(network, self.watched, self.context, self.samples) if self.watched else []

    def _sensitivity(self, name: str, outputs: ReferenceOutputs, layer: CalibratedLayer | None) -> float:
        """Divergence of the outputs for each unit of squared error, where they move little.

        Far away they move less and less: a weight of a few large values, on coarse levels, is lost anyway.
        So the levels get four times closer until the divergence is small enough to be proportional.
        """
        weight = self.program.get_parameter(name).detach().float()
        step = float(weight.std(correction=0)) / PROBE_LEVELS
        while step:
            change = (weight / step).round() * step - weight
            variant = copy.deepcopy(self.program)
            with torch.no_grad():
                variant.get_parameter(name).add_(change)
                # The final network's biases make up for the mean error, so the probe's must, too.
                if layer is not None and (shift := layer.bias_shift(change)) is not None:
                    variant.get_submodule(name.rpartition(".")[0]).get_parameter("bias").add_(shift)
            divergence, _ = outputs.compare(variant)
            if divergence <= SMALL_DIVERGENCE:
                error = float(change.double().square().sum()) if layer is None else layer.error(change)
                return max(divergence, 1e-12) / max(error, _TINY)
            step /= 4
        return 1.0  # of a weight whose values are all the same

    @property
    def count(self) -> int:
        """Number of weights to cluster."""
        return sum(self.program.get_parameter(name).numel() for name in self.names)

    def bits(self, price: float) -> float:
        """Bits of a weight, on average, by the entropy of its nearest levels."""
        total = 0.0
        for name in self.names:
            weight = self.program.get_parameter(name).detach().float()
            levels = _nearest_levels(weight, self._step(name, price, weight))
            counts = torch.bincount(levels.flatten() + LARGEST_LEVEL).double()
            counts = counts[counts > 0]
            total += float((counts * (counts.sum() / counts).log2()).sum())
        return total / self.count

    def at(self, price: float) -> tuple[Program, dict[str, LevelWeight]]:
        """The network with each weight on the levels that a price of a bit, in nats, gives it."""
        network = evaluation_copy(self.program, self.context.device)
        weights: dict[str, LevelWeight] = {}
        for layer in self._layers(network):
            name = layer.parameter
            weights[name], bias = self._compensated(layer, price)
            set_values(layer.module, weights[name].values(), bias)
        for name in self.names:
            if name not in weights:
                weights[name] = self._rounded(name, price)
                with torch.no_grad():
                    network.get_parameter(name).copy_(weights[name].values())
        return network.cpu(), {name: weights[name] for name in self.names}

    def _step(self, name: str, price: float, weight: Tensor) -> Tensor:
        """The distance of levels; larger for output channels that would need too many of them."""
        # Squared error that a bit is worth, and from it the step at which rounding makes that much.
        worth = price / self.sensitivities[name] / self._mean_importances[name]
        step = torch.tensor(max(math.sqrt(worth / BIT_IN_STEPS), _TINY))
        least = weight.flatten(1).abs().amax(1) / LARGEST_LEVEL
        if float(least.max()) <= float(step):
            return step
        if isinstance(self.program.get_submodule(name.rpartition(".")[0]), DECONVS):
            return least.max()  # its weight does not begin with the output channels
        return _rounded_up(torch.maximum(step, least))

    def _compensated(self, layer: CalibratedLayer, price: float) -> tuple[LevelWeight, Tensor | None]:
        """Levels by their error in the layer's outputs and their bits, and the bias that goes with them."""
        name, weight = layer.parameter, layer.module.weight.detach().float().cpu()
        curvature = layer.curvature()
        step = self._step(name, price, weight)
        levels = _nearest_levels(weight, step)
        bias = None
        for _ in range(PASSES):
            # A level costs bits by how frequent it is, and is frequent by what it costs: hence two passes.
            used, bits = _level_bits(levels)
            if step.dim():
                rows = step.double().view(getattr(layer.module, "groups", 1), -1, 1)
                values = rows * used.double()
            else:
                values = used.double() * step.double()
            costs = bits * price / self.sensitivities[name]
            zero = (used == 0).long().argmax()
            index, bias = layer.choose(curvature, Levels(values, costs, zero), self.unpruned.get(name))
            levels = used[index]
        return LevelWeight(levels, step), bias

    def _rounded(self, name: str, price: float) -> LevelWeight:
        """Nearest levels, where the layer's inputs are not looked at."""
        weight = self.program.get_parameter(name).detach().float()
        step = self._step(name, price, weight)
        levels = _nearest_levels(weight, step)
        unpruned = self.unpruned.get(name)
        return LevelWeight(levels if unpruned is None else levels.masked_fill(~unpruned, 0), step)


def _nearest_levels(weight: Tensor, step: Tensor) -> Tensor:
    return (weight / _broadcast(step.float(), weight)).round().long().clamp(-LARGEST_LEVEL, LARGEST_LEVEL)


def _level_bits(levels: Tensor) -> tuple[Tensor, Tensor]:
    """The levels that may be taken, from the first to the last in use and zero, and the bits of each.

    Half a weight is counted to every level, so that one that nothing takes yet still can be taken.
    """
    low, high = min(int(levels.min()), 0), max(int(levels.max()), 0)
    counts = torch.bincount(levels.flatten() - low, minlength=high - low + 1).double() + 0.5
    return torch.arange(low, high + 1), -(counts / counts.sum()).log2()
