"""Overhead of training: ``fit`` beside a loop written by hand that does the same work.

Repetitions are interleaved and medians compared, so that a neighbour on the machine slows both alike. The
other loop is what one would write for this one task: samples in memory, a permutation for each epoch, the
same augmentation called on each batch, channels-last, SGD with a cosine, a running loss. Both are timed as a
whole, ``fit`` with all its preparations and checks, on one thread; by the clock, and by the processor's time,
which a neighbour does not lengthen much.

    python -m benchmarks.training [NETWORK ...] [--repetitions N] [--steps N] [--batch-size N] [--augment ...]
"""

import argparse
import datetime
import math
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import modelopt_cli  # noqa: F401  makes torchvision importable beside a CPU-only torch

EPOCHS = 2
LR = 0.01
CLASSES = 10


def make(name: str) -> nn.Module:
    """The network, always with the same weights, as a Program."""
    from modelopt_cli.checkpoint.builtin import BUILTINS
    from modelopt_cli.program import InputSpec
    from modelopt_cli.program.capture import capture

    torch.manual_seed(0)
    builtin = BUILTINS[name]
    network = builtin.make(CLASSES, builtin.channels)
    return capture(network, InputSpec((builtin.channels, builtin.size, builtin.size)))


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
        """Of so many steps until now."""
        return Speed(
            steps / (time.perf_counter() - self.clock), steps / (time.process_time() - self.processor)
        )


class Contest:
    """Both loops on the same random samples."""

    def __init__(self, name: str, steps: int, batch_size: int, augment: str) -> None:
        from modelopt_cli.data import Data
        from modelopt_cli.data.arrays import ArraySource
        from modelopt_cli.training.augment import batch_augmentation

        self.name, self.batch_size, self.augment = name, batch_size, augment
        self.network = make(name)
        self.steps = EPOCHS * steps
        shape = self.network.input.shape
        draw = np.random.default_rng(0)
        images = draw.normal(size=(steps * batch_size, *shape)).astype(np.float32)
        labels = draw.integers(0, CLASSES, steps * batch_size)
        self.data = Data(ArraySource("random", images, labels), self.network.input)
        self.images, self.labels = torch.from_numpy(images), torch.from_numpy(labels)
        self.transform = batch_augmentation(augment, self.data)

    def ours(self) -> Speed:
        """``fit``."""
        from modelopt_cli.training import TrainConfig, Training, fit

        network = make(self.name)
        config = TrainConfig(epochs=EPOCHS, batch_size=self.batch_size, lr=LR, augment=self.augment)
        watch = Stopwatch()
        trained = fit(network, Training(self.data, config=config), seed=0)
        assert trained.steps == self.steps
        return watch.speed(self.steps)

    def plain(self) -> Speed:
        """The loop written by hand."""
        network = make(self.name)
        watch = Stopwatch()
        network.train().to(memory_format=torch.channels_last)
        heavy = [p for p in network.parameters() if p.dim() > 1]
        light = [p for p in network.parameters() if p.dim() <= 1]
        groups = [{"params": heavy, "weight_decay": 5e-4}, {"params": light, "weight_decay": 0.0}]
        optimizer = torch.optim.SGD(groups, lr=LR, momentum=0.9)
        step = 0
        for _ in range(EPOCHS):
            total = 0.0
            for chosen in torch.randperm(len(self.labels)).split(self.batch_size):
                for group in optimizer.param_groups:
                    group["lr"] = LR * (1 + math.cos(math.pi * step / self.steps)) / 2
                images, labels = self.images[chosen], self.labels[chosen]
                if self.transform is not None:
                    images = self.transform(images, torch.rand(len(chosen), self.transform.draws))
                optimizer.zero_grad()
                loss = F.cross_entropy(network(images), labels)
                loss.backward()
                optimizer.step()
                total += loss.item() * len(labels)
                step += 1
        assert step == self.steps
        return watch.speed(self.steps)


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("networks", nargs="*", default=("lenet300", "lenet5", "resnet8"))
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--steps", type=int, default=50, help="of an epoch; there are two")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--augment", default="cifar")
    options = parser.parse_args()
    torch.set_num_threads(1)
    from modelopt_cli.measure.environment import cpu_name

    print(
        f"{datetime.date.today()}, {cpu_name()}, torch {torch.__version__}, one thread, batches of "
        f"{options.batch_size}, {options.repetitions} interleaved repetitions of {EPOCHS * options.steps} "
        f"steps, augmentation {options.augment}, median steps/s\n"
    )
    print("| network | by hand | fit | fit over by hand | single pairs | by processor time |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in options.networks:
        contest = Contest(name, options.steps, options.batch_size, options.augment)
        pairs = [(contest.plain(), contest.ours()) for _ in range(options.repetitions + 1)][1:]
        plain, ours = (statistics.median(speed.clock for speed in side) for side in zip(*pairs, strict=True))
        hand, fit = (
            statistics.median(speed.processor for speed in side) for side in zip(*pairs, strict=True)
        )
        ratios = sorted(mine.clock / theirs.clock for theirs, mine in pairs)
        print(
            f"| {name} | {plain:.1f} | {ours:.1f} | {ours / plain:.3f} | {ratios[0]:.2f} to {ratios[-1]:.2f} "
            f"| {fit / hand:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
