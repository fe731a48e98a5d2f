"""Parts that benchmarks of training loops share: samples, the loop written by hand, a comparison of two."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from modelopt_cli.checkpoint.builtin import BUILTINS
from modelopt_cli.data import Data
from modelopt_cli.data.arrays import ArraySource
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.capture import capture
from modelopt_cli.training.augment import batch_augmentation
from modelopt_cli.training.prepare import prepared

EPOCHS = 2
LR = 0.01
CLASSES = 10


def make(name: str, *, seed: int = 0, channels: int | None = None) -> Program:
    """One of the library's own networks, its width after a slash, always with the same weights.

    Args:
        name: for example ``resnet8/0.5``.
        seed: of the weights.
        channels: of its input, if not its usual ones.
    """
    kind, _, width = name.partition("/")
    builtin = BUILTINS[kind]
    channels = channels or builtin.channels
    torch.manual_seed(seed)
    network = builtin.make(CLASSES, channels, float(width or 1))
    return capture(network, InputSpec((channels, builtin.size, builtin.size)))


@dataclass(frozen=True)
class Speed:
    """Steps per second, by the clock and of the processor's time."""

    clock: float
    processor: float


class Stopwatch:
    """Runs from when it is made."""

    def __init__(self) -> None:
        self.clock, self.processor = time.perf_counter(), time.process_time()

    def speed(self, steps: int) -> Speed:
        """Steps per second until now."""
        return Speed(
            steps / (time.perf_counter() - self.clock), steps / (time.process_time() - self.processor)
        )


class Samples:
    """Random ones for a network, enough for ``steps`` batches, as ours take them and as tensors."""

    def __init__(self, network: Program, steps: int, batch_size: int, augment: str) -> None:
        self.batch_size, self.augment, self.steps = batch_size, augment, EPOCHS * steps
        shape = network.input.shape
        with prepared(network, network.input, "cpu") as found:
            self.channels_last = found.channels_last
        draw = np.random.default_rng(0)
        images = draw.normal(size=(steps * batch_size, *shape)).astype(np.float32)
        labels = draw.integers(0, CLASSES, steps * batch_size)
        self.data = Data(ArraySource("random", images, labels), InputSpec(shape))
        self.images, self.labels = torch.from_numpy(images), torch.from_numpy(labels)
        self.transform = batch_augmentation(augment, self.data)


def by_hand(network: nn.Module, samples: Samples, loss_of: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The loop one would write for one task.

    Samples in memory, a permutation for each epoch, the same augmentation called on each batch, SGD with a
    cosine, a running loss; channels-last, unless torch's kernels overrun their memory with this network so.

    Args:
        network: is trained.
        samples: to train on.
        loss_of: the loss of a batch of images and labels.
    """
    network.train()
    if samples.channels_last:
        network.to(memory_format=torch.channels_last)
    heavy = [p for p in network.parameters() if p.dim() > 1]
    light = [p for p in network.parameters() if p.dim() <= 1]
    groups = [{"params": heavy, "weight_decay": 5e-4}, {"params": light, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=LR, momentum=0.9)
    step = 0
    for _ in range(EPOCHS):
        total = 0.0
        for chosen in torch.randperm(len(samples.labels)).split(samples.batch_size):
            for group in optimizer.param_groups:
                group["lr"] = LR * (1 + math.cos(math.pi * step / samples.steps)) / 2
            images, labels = samples.images[chosen], samples.labels[chosen]
            if samples.transform is not None:
                images = samples.transform(images, torch.rand(len(chosen), samples.transform.draws))
            optimizer.zero_grad()
            loss = loss_of(images, labels)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(labels)
            step += 1
    assert step == samples.steps


@dataclass(frozen=True)
class Comparison:
    """Two loops over interleaved repetitions.

    Attributes:
        first, second: median steps per second.
        ratio: of the second's over the first's, by the clock.
        range: of the ratios of single repetitions.
        processor: the ratio by processor time.
    """

    first: float
    second: float
    ratio: float
    range: tuple[float, float]
    processor: float

    def __str__(self) -> str:
        low, high = self.range
        both = f"{self.first:.1f} | {self.second:.1f} | {self.ratio:.3f}"
        return f"{both} | {low:.2f} to {high:.2f} | {self.processor:.3f}"


def compare(first: Sequence[Speed], second: Sequence[Speed]) -> Comparison:
    """The one next to the other, repetition by repetition."""
    clock = [statistics.median(speed.clock for speed in side) for side in (first, second)]
    processor = [statistics.median(speed.processor for speed in side) for side in (first, second)]
    ratios = sorted(b.clock / a.clock for a, b in zip(first, second, strict=True))
    span = ratios[0], ratios[-1]
    return Comparison(*clock, clock[1] / clock[0], span, processor[1] / processor[0])
