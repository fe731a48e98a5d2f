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
HELD_OUT = 4
"""One sample in so many is held out of the ranges."""
LEAST_SAMPLES = 16
"""Samples below which too few are held out to judge factors by."""
LEAST_GAIN = 0.75
"""Fraction of the predicted error that may be left of it for factors to be worth their while."""
_POWERS = torch.linspace(0, 1, 9, dtype=torch.float64).tolist()


class ChannelRange:
    """Range and mean square of each channel; float64 ``(C,)``.

    Every fourth sample is held out of the range: its extremes show what clipping other samples costs.

    Attributes:
        low: smallest values of the samples that are not held out, at most 0.
        high: their largest values, at least 0.
        size: largest magnitude in any sample.
        positions: values of a channel in one sample.
    """

    def __init__(self) -> None:
        self.low = self.high = self.size = self.squares = self.nonzero = torch.zeros((), dtype=torch.float64)
        self.samples = self.positions = self.count = 0
        self._held: list[tuple[Tensor, Tensor]] = []

    def update(self, x: Tensor) -> None:
        """Take in one batch, a float tensor ``(N, C, ...)``."""
        if not x.numel():
            return
        rows = x.detach().flatten(2) if x.dim() > 2 else x.detach().unsqueeze(2)
        lows, highs = (part.double() for part in torch.aminmax(rows, dim=2))
        held = (torch.arange(self.samples, self.samples + len(rows), device=x.device) + 1) % HELD_OUT == 0
        self._held.append((lows[held], highs[held]))
        zero = lows.new_zeros(1, lows.shape[1])
        self.low = self.low.minimum(torch.cat([lows[~held], zero]).amin(0))
        self.high = self.high.maximum(torch.cat([highs[~held], zero]).amax(0))
        self.size = self.size.maximum(highs.amax(0)).maximum(-lows.amin(0))
        self.squares = self.squares + torch.linalg.vector_norm(rows, dim=(0, 2)).double().square()
        self.nonzero = self.nonzero + (rows != 0).sum((0, 2))
        self.samples, self.positions = self.samples + len(rows), rows.shape[2]
        self.count += rows.shape[0] * rows.shape[2]

    @property
    def fitted(self) -> Tensor:
        """Largest magnitude in the samples that are not held out."""
        return self.high.maximum(-self.low)

    @property
    def power(self) -> Tensor:
        """Mean square."""
        return self.squares / max(self.count, 1)

    @property
    def rounded(self) -> Tensor:
        """Fraction of values that rounding changes: zeros are exact."""
        return self.nonzero / max(self.count, 1)

    def clipped(self, factors: Tensor) -> Tensor:
        """Mean square of what held-out samples lose where all channels, divided by factors, share a range.

        The range is that of the other samples. One position of a sample is counted, the extreme one.
        """
        low, high = (self.low / factors).min(), (self.high / factors).max()
        lows, highs = (torch.cat(parts) for parts in zip(*self._held, strict=True))
        lost = (low - lows / factors).clamp(min=0).square() + (highs / factors - high).clamp(min=0).square()
        return lost.mean(0) * factors.square() / self.positions


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

    A step of s rounds what is not zero by s^2 / 12. Samples that are held out show what is clipped: the range
    of a channel is that of few samples, and at one size with the others it has no room left. What is tried
    are powers of the channels' ranges, alone and with those of the weights that read them.
    """
    known = [reader for reader in channels.readers if reader.seen is not None]
    if not known or not all(bool(seen.fitted.any()) for seen in channels.seen):
        return None
    if min(seen.samples for seen in channels.seen) < LEAST_SAMPLES:
        return None

    def error(factors: Tensor) -> float:
        return sum(_output_error(reader, factors) for reader in known)

    unscaled = torch.ones(len(channels.writers[0]), dtype=torch.float64)
    best = min(_tried(channels), key=error)
    return best if error(best) < LEAST_GAIN * error(unscaled) else None


def _tried(channels: Channels) -> Iterator[Tensor]:
    sizes = torch.stack([seen.fitted / seen.fitted.max() for seen in channels.seen]).amax(0)
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
    of_inputs = step.square() * (squares * seen.rounded * factors.square()).sum()
    of_clipping = 12 * (squares * seen.clipped(factors)).sum()
    of_weights = torch.zeros(())
    if reader.widths:
        steps = reader.scaled(factors).abs().amax((2, 3)) / weight_limits(reader.widths.weight)[1]
        inputs = (seen.power / factors.square()).view(len(weight), -1).sum(1) * weight.shape[3]
        of_weights = (steps.square() * inputs[:, None]).sum()
    power = (squares * seen.power).sum().clamp(min=torch.finfo(torch.float64).tiny)
    return float((of_inputs + of_clipping + of_weights) / power)
