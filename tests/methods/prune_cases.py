"""Networks and data for the tests of pruning weights."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelopt_cli.methods.context import Context
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.capture import capture


@dataclass(frozen=True)
class Samples:
    """Samples out of tensors, with what pruning uses of ``Data``."""

    images: Tensor
    labels: Tensor | None = None
    name: str = "tensor"
    passes: list[int] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.images)

    @property
    def labelled(self) -> bool:
        return self.labels is not None

    def sample(self, n: int, seed: int = 0) -> "Samples":
        return replace(self, images=self.images[:n], labels=None if self.labels is None else self.labels[:n])

    def where(self, index: int) -> str:
        return f"sample {index}"

    def split(self, held: int) -> tuple["Samples", "Samples"]:
        first, second = (
            replace(self, images=self.images[part], labels=None if self.labels is None else self.labels[part])
            for part in (slice(held, None), slice(None, held))
        )
        return first, second

    def with_targets(self, targets: Any) -> "Samples":
        return self

    def with_labels(self, names: tuple[str, ...] | None = None) -> "Samples":
        return self

    def batches(
        self, size: int, *, limit: int | None = None, workers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes.append(0)
        labels = torch.full((self.size,), -1) if self.labels is None else self.labels
        for start in range(0, self.size, size):
            yield self.images[start : start + size], labels[start : start + size]


def context(images: Tensor, labels: Tensor | None = None, **options: Any) -> Context:
    return Context(data=Samples(images, labels), **options)  # type: ignore[arg-type]


def captured(model: nn.Module, *shape: int) -> Program:
    return capture(model.eval(), InputSpec(shape), verify=False)


def smooth(n: int, *shape: int, seed: int = 0) -> Tensor:
    """Images whose neighbouring pixels are alike, so that inputs of a layer are correlated."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, shape[0], 3, 3, generator=g) + torch.randn(n, shape[0], 1, 1, generator=g)
    return F.interpolate(coarse, size=shape[1:], mode="bilinear")


class Net(nn.Module):
    """Plain, depthwise and grouped convolutions, batch norm, a residual, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, stride=2, groups=2)
        self.dw = nn.Conv2d(12, 12, 3, groups=12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.bn(self.stem(x)))
        x = torch.relu(self.body(x) + x)
        x = F.relu6(self.dw(self.grouped(x)))
        result: Tensor = self.fc(x.mean((2, 3)))
        return result


def net(seed: int = 0) -> Program:
    torch.manual_seed(seed)
    return captured(Net(), 3, 12, 12)


class One(nn.Module):
    """A single layer as a network."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (6,)),
    "linear-tokens": (lambda: nn.Linear(6, 5), (4, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (4, 7, 8)),
    "conv2d-grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 6, 7)),
    "conv2d-depthwise": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), (4, 6, 7)),
    "conv2d-same": (lambda: nn.Conv2d(4, 6, (2, 4), padding="same", padding_mode="reflect"), (4, 6, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, padding=1), (2, 3, 4, 5)),
    "deconv1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=2, output_padding=1), (4, 6)),
    "deconv2d-grouped": (
        lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=2, padding=(1, 0), groups=2, dilation=(2, 1)),
        (4, 5, 4),
    ),
}
"""Every kind of layer whose inputs can be watched, and the shape of one sample."""


def one(case: str) -> Program:
    torch.manual_seed(0)
    make, shape = LAYERS[case]
    return captured(One(make()), *shape)
