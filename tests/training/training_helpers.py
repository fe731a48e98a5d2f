"""A small network and data to train it on."""

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from modelopt_cli.data import Data
from modelopt_cli.data.arrays import ArraySource
from modelopt_cli.program import InputSpec

SHAPE = (2, 6, 6)
CLASSES = 3


def noisy_patterns(samples: int = 64, seed: int = 0, noise: float = 1.0) -> Data:
    """Noise around one pattern for each class."""
    generator = np.random.default_rng(seed)
    patterns = np.random.default_rng(99).normal(size=(CLASSES, *SHAPE))
    labels = np.arange(samples) % CLASSES
    images = patterns[labels] + noise * generator.normal(size=(samples, *SHAPE))
    return Data(ArraySource("patterns", images.astype(np.float32), labels), InputSpec(SHAPE))


def small_network(dropout: float = 0.0, seed: int = 0) -> nn.Sequential:
    """Convolutions, batch norm, dropout, a linear layer."""
    before = torch.get_rng_state()
    torch.manual_seed(seed)
    network = nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(16, CLASSES)),
    )
    torch.set_rng_state(before)
    return network


def normalised_network() -> nn.Sequential:
    """A norm follows every layer but the last: it has its usual rate without a test."""
    layers = list(small_network())
    return nn.Sequential(*layers[:4], nn.BatchNorm2d(4), *layers[4:])


def plain_network(width: int = 64, scale: float = 1.0) -> nn.Sequential:
    """Nothing in it normalises; ``scale`` makes it as steep as one likes."""
    before = torch.get_rng_state()
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(2, width, 3, padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(36 * width, width), nn.ReLU(), nn.Linear(width, 3)),
    )
    torch.set_rng_state(before)
    with torch.no_grad():
        network[0].weight.mul_(scale)  # type: ignore[operator, union-attr]
    return network


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """A copy of everything in the network."""
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def differing(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that are not equal bit for bit."""
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


@dataclass
class Watcher:
    """A callback that only looks, or does what it is told before a step."""

    before: dict[int, BaseException] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    watched: nn.Module | None = None

    def before_step(self, network: nn.Module, step: int, steps: int) -> None:
        if step in self.before:
            raise self.before[step]
        self.watched = network

    def after_step(self, network: nn.Module, step: int, steps: int) -> None:
        if network is self.watched:
            self.steps.append(step)
            self.weights.append(weights_of(network))

    def state(self) -> dict[str, Tensor]:
        return {"seen": torch.tensor(len(self.steps))}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.steps = list(range(int(state["seen"])))


@dataclass
class Breaking(Watcher):
    """Multiplies the weights once, after a step, unless that was done before an interruption."""

    after: int = 9
    factor: float = 1e30
    done: bool = False
    stop: set[int] = field(default_factory=set)

    def after_step(self, network: nn.Module, step: int, steps: int) -> None:
        super().after_step(network, step, steps)
        if step == self.after and not self.done:
            self.done = True
            with torch.no_grad():
                network[-1].weight.mul_(self.factor)  # type: ignore[operator, union-attr, index]
        if step in self.stop:
            self.stop.remove(step)
            signal.raise_signal(signal.SIGINT)
