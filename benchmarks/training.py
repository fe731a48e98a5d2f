"""Overhead of training: ``fit`` next to a loop written by hand that does the same work.

Repetitions are interleaved and medians compared, so that a neighbour on the machine slows both alike. The
other loop is what one would write for this one task (``pace.by_hand``). Both are timed as a whole, ``fit``
with all its preparations and checks, on one thread; by the clock, and by the processor's time, which a
neighbour does not lengthen much.

    python -m benchmarks.training [NETWORK ...] [--repetitions N] [--steps N] [--batch-size N] [--augment ...]
"""

import argparse
import datetime

import torch
import torch.nn.functional as F

from benchmarks.pace import EPOCHS, LR, Samples, Speed, Stopwatch, by_hand, compare, make
from modelopt_cli.measure.environment import cpu_name
from modelopt_cli.training import TrainConfig, Training, fit


class Contest:
    """Both loops on the same random samples."""

    def __init__(self, name: str, steps: int, batch_size: int, augment: str) -> None:
        self.name = name
        self.samples = Samples(make(name), steps, batch_size, augment)

    def ours(self) -> Speed:
        """``fit``."""
        network, samples = make(self.name), self.samples
        config = TrainConfig(epochs=EPOCHS, batch_size=samples.batch_size, lr=LR, augment=samples.augment)
        watch = Stopwatch()
        trained = fit(network, Training(samples.data, config=config), seed=0)
        assert trained.steps == samples.steps
        return watch.speed(samples.steps)

    def plain(self) -> Speed:
        """The loop written by hand."""
        network = make(self.name)
        watch = Stopwatch()
        by_hand(network, self.samples, lambda images, labels: F.cross_entropy(network(images), labels))
        return watch.speed(self.samples.steps)


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
        print(f"| {name} | {compare(*zip(*pairs, strict=True))} |", flush=True)


if __name__ == "__main__":
    main()
