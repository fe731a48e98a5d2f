"""A network to measure, with its inputs; weights and statistics that look as if it were trained."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelopt_cli.program import InputSpec
from modelopt_cli.program.input_batch import Inputs, call

SAMPLES = 4
"""Samples to measure on."""
STATISTICS = 16
"""Samples for the statistics of batch norms: what is pooled has one value of each."""
TRAINING = 3
"""Seed of the samples that stand for training data: they give batch norms their statistics, and calibrate."""
Make = Callable[[int, int], Inputs]


@dataclass(frozen=True)
class Network:
    """A network that is ready to be measured.

    Attributes:
        kind: its name in its library.
        model: in evaluation mode.
        input: one sample of each of its inputs.
        batch: makes a batch of a size from a seed.
        note: says how it is smaller than the published one; empty if it is not.
        calibration: samples for the ranges of int8.
    """

    kind: str
    model: nn.Module
    input: InputSpec
    batch: Make
    note: str = ""
    calibration: int = 16

    @property
    def shapes(self) -> str:
        """Shapes of one sample: ``3x64x64``, or ``input_ids 24, pixel_values 3x64x64``."""
        sizes = {each.name: "x".join(map(str, each.shape)) for each in self.input.tensors}
        return (
            ", ".join(f"{name} {size}" for name, size in sizes.items())
            if sizes.keys() != {"x"}
            else sizes["x"]
        )


def images(count: int, side: int, seed: int = 0, channels: int = 3) -> Tensor:
    """Random images with equally much contrast in every octave, as photographs have (Field, 1987)."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for size in (2, 4, 8, 16, 32, 64, 128):
        coarse = torch.randn(count, channels, min(size, side), min(size, side), generator=generator)
        layers.append(F.interpolate(coarse, size=(side, side), mode="bilinear"))
    mixed = torch.stack([layer / layer.std() for layer in layers]).sum(0)
    return mixed / mixed.std()


def shake(model: nn.Module) -> None:
    """Give weights that begin as zero, or nearly so, the size that they have after training."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if not name.endswith("bias") and weight.is_floating_point() and weight.abs().max() < 1e-3:
            if weight.numel() == max(weight.shape):  # a scale for each channel
                weight.copy_(0.1 + 0.4 * torch.rand(weight.shape, generator=generator))
            else:
                weight.copy_(0.02 * torch.randn(weight.shape, generator=generator))


def settle(model: nn.Module, inputs: Inputs) -> None:
    """Give every batch norm the statistics of its inputs."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True
    try:
        call(model, inputs)
    finally:
        for norm in norms:
            norm.momentum, norm.training = 0.1, False


def prepared(network: Network) -> Network:
    """The network after ``shake`` and ``settle``."""
    shake(network.model)
    settle(network.model, network.batch(STATISTICS, TRAINING))
    return network
