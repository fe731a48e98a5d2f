"""Factors that channels are divided by, from the weights that compute and read them and the values seen."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modelopt_cli.methods.quantize.widths import BYTE, Widths
from modelopt_cli.program.quantization import levels_of, weight_limits

CLIP = 6.0
"""Value at which ReLU6 clips."""
SMALLEST = 1 / 1024
"""Smallest factor of a channel: below it the noise of a channel no longer counts."""
LEAST_REACH = 1 / 32
"""Smallest factor where ReLU6 clips: a channel that was hardly ever seen may have larger values later."""
LEAST_GAIN = 0.98
"""Fraction of the predicted error that may be left of it for factors to be worth their while."""
_POWERS = torch.linspace(0, 1, 9, dtype=torch.float64).tolist()


class ChannelRange:
    """Range and mean square of each channel; float64 ``(C,)``."""

    def __init__(self) -> None:
        self.low = self.high = self.squares = torch.zeros((), dtype=torch.float64)
        self.count = 0

    def update(self, x: Tensor) -> None:
        """Take in one batch, a float tensor ``(N, C, ...)``."""
        if x.numel():
            rows = x.detach().flatten(2) if x.dim() > 2 else x.detach().unsqueeze(2)
            self.low = self.low.minimum(rows.amin((0, 2)).double())
            self.high = self.high.maximum(rows.amax((0, 2)).double())
            self.squares = self.squares + torch.linalg.vector_norm(rows, dim=(0, 2)).double().square()
            self.count += rows.shape[0] * rows.shape[2]

    @property
    def size(self) -> Tensor:
        """Largest magnitude."""
        return self.high.maximum(-self.low)

    @property
    def power(self) -> Tensor:
        """Mean square."""
        return self.squares / max(self.count, 1)


@dataclass
class Reader:
    """A layer that reads channels.

    Attributes:
        weight: float64 ``(groups, O / groups, C / groups, taps)``.
        seen: values of the channels that it reads, where calibration shows them.
        widths: bits of its weight and input; None of a layer that stays float.
    """

    weight: Tensor
    seen: ChannelRange | None = None
    widths: Widths | None = None

    @property
    def columns(self) -> Tensor:
        """The weights of each channel, ``(C, O / groups * taps)``."""
        return self.weight.transpose(1, 2).flatten(0, 1).flatten(1)

    def scaled(self, factors: Tensor) -> Tensor:
        """The weight, multiplied by factors ``(C,)``."""
        return self.weight * factors.view(len(self.weight), 1, -1, 1)


@dataclass
class Channels:
    """Channels with one factor each, and all that computes, reads and shows them.

    Attributes:
        writers: their weights, float64 ``(C, ...)``.
        readers: at least one.
        seen: values of the channels that are rounded.
        clipped: outputs of a ReLU6 among them.
    """

    writers: list[Tensor]
    readers: list[Reader]
    seen: list[ChannelRange] = field(default_factory=list)
    clipped: list[ChannelRange] = field(default_factory=list)
    has_clip: bool = False


def by_weights(channels: Channels) -> Tensor | None:
    """Factors at which the largest weight of a channel's row and of its column are equal.

    With the ranges r1 of rows and r2 of columns, s = sqrt(r1 r2) / r2 (equation 11 of the paper). Channels
    that a ReLU6 clips stay: the paper takes the clipping away, which changes the network.
    """
    if channels.has_clip:
        return None
    rows = torch.stack([weight.flatten(1).abs().amax(1) for weight in channels.writers]).amax(0)
    columns = torch.stack([reader.columns.abs().amax(1) for reader in channels.readers]).amax(0)
    alive = (rows > 0) & (columns > 0)
    return torch.where(alive, rows / torch.where(alive, columns, 1), 1.0).sqrt()


def by_outputs(channels: Channels) -> Tensor | None:
    """Factors at which the readers' outputs have the least predicted error.

    A step of s rounds by s^2 / 12. What is tried are powers of the channels' ranges, alone and with those of
    the weights that read them.
    """
    known = [reader for reader in channels.readers if reader.seen is not None]
    if not known or not all(bool(seen.size.any()) for seen in channels.seen):
        return None

    def error(factors: Tensor) -> float:
        return sum(_output_error(reader, factors) for reader in known)

    unscaled = torch.ones(len(channels.writers[0]), dtype=torch.float64)
    best = min(_tried(channels), key=error)
    return best if error(best) < LEAST_GAIN * error(unscaled) else None


def _tried(channels: Channels) -> Iterator[Tensor]:
    sizes = torch.stack([seen.size / seen.size.max() for seen in channels.seen]).amax(0)
    # What was always zero may be of any size later.
    dead = sizes <= 0
    sizes = torch.where(dead, 1.0, sizes.clamp(min=SMALLEST))
    columns = torch.stack([reader.columns.abs().amax(1) for reader in channels.readers]).amax(0)
    columns = (columns / columns.max().clamp(min=torch.finfo(torch.float64).tiny)).clamp(min=SMALLEST)
    for power in _POWERS:
        for factors in (sizes**power, sizes**power / columns ** (1 - power)):
            yield _settled(torch.where(dead, factors.max(), factors), channels)


def _settled(factors: Tensor, channels: Channels) -> Tensor:
    """Factors of at most 1; where a ReLU6 clips, no value that was seen is clipped at 6 times its factor."""
    if not channels.clipped:
        return (factors / factors.max()).clamp(min=SMALLEST)
    reach = torch.stack([seen.size for seen in channels.clipped]).amax(0) / CLIP
    return (factors * (reach / factors).max()).clamp(min=LEAST_REACH, max=1)


def _output_error(reader: Reader, factors: Tensor) -> float:
    """Predicted squared error of a reader's outputs, against the squares that independent inputs give."""
    seen, weight = reader.seen, reader.weight
    assert seen is not None
    squares = reader.columns.square().sum(1)
    levels = levels_of(reader.widths.activation or BYTE) if reader.widths else levels_of(BYTE)
    step = ((seen.high / factors).max() - (seen.low / factors).min()) / (levels - 1)
    of_inputs = step.square() * (squares * factors.square()).sum()
    of_weights = torch.zeros(())
    if reader.widths:
        steps = reader.scaled(factors).abs().amax((2, 3)) / weight_limits(reader.widths.weight)[1]
        inputs = (seen.power / factors.square()).view(len(weight), -1).sum(1) * weight.shape[3]
        of_weights = (steps.square() * inputs[:, None]).sum()
    power = (squares * seen.power).sum().clamp(min=torch.finfo(torch.float64).tiny)
    return float((of_inputs + of_weights) / power)
