"""Training with the defaults: one epoch of the bundled digits, of the built-in and of common networks.

The first loss is that of the first step, the last the mean of the epoch; guessing has 2.303.
Seconds are those of the processor, on one thread.

    python -m benchmarks.rates [NETWORK ...] [--optimizers NAME ...] [--batch-size N]
"""

import argparse
import datetime
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modelopt_cli.checkpoint import fresh_model
from modelopt_cli.checkpoint.builtin import BUILTINS
from modelopt_cli.data import open_data
from modelopt_cli.data.config import PreprocessOverrides
from modelopt_cli.measure.environment import cpu_name
from modelopt_cli.program import InputSpec
from modelopt_cli.training import OPTIMIZERS, CrossEntropy, StepInputs, TrainConfig, Training, fit, loop
from modelopt_cli.training.learner import Learner
from modelopt_cli.training.loader import Batch

NETWORKS = (
    *(f"builtin:{name}" for name in BUILTINS),
    "torchvision:resnet18",
    "torchvision:mobilenet_v2",
    "torchvision:mobilenet_v3_small",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:mnasnet0_5",
    "torchvision:regnet_y_400mf",
    "torchvision:efficientnet_b0",
    "torchvision:googlenet?aux_logits=false&init_weights=true",
    "torchvision:squeezenet1_1",
    "torchvision:alexnet",
    "torchvision:vgg11",
    "torchvision:vgg11_bn",
    "torchvision:densenet121",
    "torchvision:convnext_tiny",
    "torchvision:swin_t",
    "torchvision.models:VisionTransformer?image_size=32&patch_size=8&num_layers=6&num_heads=3&hidden_dim=192&mlp_dim=768",
)
SIZES = {"torchvision:alexnet": 64}
"""Height and width of the images where 32 pixels are too few."""


@dataclass(frozen=True)
class Recording(CrossEntropy):
    """Cross-entropy that keeps its values."""

    losses: list[float] = field(default_factory=list)

    def __call__(self, logits: Tensor, targets: Tensor, inputs: StepInputs) -> Tensor:
        """The mean over the batch, in nats."""
        loss = super().__call__(logits, targets, inputs)
        self.losses.append(loss.item())
        return loss


class TimedTest:
    """The test of the learning rate, and the seconds that it took."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.tested_rate = loop.tested_rate

    def __call__(self, learner: Learner, batches: Iterable[Batch]) -> float:
        """The rate that is chosen."""
        begun = time.process_time()
        rate = self.tested_rate(learner, batches)
        self.seconds += time.process_time() - begun
        return rate


def row(arch: str, optimizer: str, batch_size: int) -> str:
    """Train a network, and say how it went."""
    name = arch.partition("?")[0]
    builtin = BUILTINS.get(name.removeprefix("builtin:"))
    channels = builtin.channels if builtin else 3
    size = builtin.size if builtin else SIZES.get(name, 32)
    shape = InputSpec((channels, size, size))
    opened = fresh_model(arch if builtin else f"{arch}{'&' if '?' in arch else '?'}num_classes=10", shape)
    half = (0.5,) * channels
    overrides = PreprocessOverrides(resize=size, mean=half, std=half)
    data = open_data("digits?split=train", input_spec=shape, overrides=overrides)
    config = TrainConfig(epochs=1, batch_size=batch_size, optimizer=optimizer)
    objective, test = Recording(), TimedTest()
    loop.tested_rate = test  # type: ignore[assignment]
    begun = time.process_time()
    trained = fit(opened.program or opened.module, Training(data, config=config), seed=0, objective=objective)
    seconds = time.process_time() - begun
    loop.tested_rate = test.tested_rate
    tested = f"{test.seconds:.1f}" if test.seconds else "none"
    return (
        f"| {name} | {optimizer} | {objective.losses[0]:.3f} | {trained.loss:.3f} | {config.peak_lr:.3g} "
        f"| {trained.lr:.3g} | {trained.returns} | {tested} | {seconds:.1f} |"
    )


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--optimizers", nargs="*", default=tuple(OPTIMIZERS))
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{datetime.date.today()}, {cpu_name()}, torch {torch.__version__}, batches of {options.batch_size}\n"
    )
    print("| network | optimizer | first loss | last loss | usual rate | rate | returns | test, s | all, s |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for network in options.networks:
        for optimizer in options.optimizers:
            print(row(network, optimizer, options.batch_size), flush=True)


if __name__ == "__main__":
    main()
