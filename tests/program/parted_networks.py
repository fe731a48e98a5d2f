"""Networks that cannot be captured whole: control flow that depends on values, between stages that can be."""

from typing import Any

import torch
from torch import Tensor, nn


def _stage(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class Gated(nn.Module):
    """Two stages; the second sees the first one's strongest half, in a loop and a branch over values.

    The head is called once for each of two sizes, and a scale and an offset belong to no stage.
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Sequential(_stage(3, width), _stage(width, width, 2))
        self.second = _stage(width, width)
        self.head = nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, 4, 1))
        self.scale = nn.Parameter(torch.full((width, 1, 1), 1.5))
        self.register_buffer("offset", torch.linspace(-1, 1, 4))
        self.mixing = nn.Parameter(torch.eye(4) + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) * self.scale
        steps = 0
        while float(x.detach().abs().max()) > 4 and steps < 3:
            x, steps = x / 2, steps + 1
        if bool(x.detach().mean() > 1e9):
            x = -x
        levels = [self.second(x), self.second(x)[:, :, ::2, ::2]]
        logits = [self.head(level).mean((2, 3)) for level in levels]
        return torch.stack(logits).sum(0) @ self.mixing + self.offset


class Tied(nn.Module):
    """A part whose weight the network's own code reads: that part is no part."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 5)
        self.middle = nn.Sequential(nn.Linear(5, 5), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.middle(self.encoder(x))
        if float(hidden.detach().sum()) > 1e9:
            hidden = -hidden
        return hidden @ self.encoder.weight


class Named(nn.Module):
    """Parts that take and return dictionaries, keyword arguments and constants."""

    class Neck(nn.Module):
        """Takes a dictionary of two sizes, a factor and a flag."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, maps: dict[str, Tensor], *, factor: float, deep: bool) -> dict[str, Any]:
            return {"maps": [self.conv(each) * factor for each in maps.values()], "deep": None if deep else 1}

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.neck = Named.Neck()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        x = x if float(x.detach().sum()) < 1e9 else -x
        found = self.neck({"large": x, "small": x[:, :, ::2, ::2]}, factor=0.5, deep=True)
        return {"sum": sum(each.mean((1, 2, 3)) for each in found["maps"])}


class Cells(nn.Module):
    """A detector's way: the head sees the cells of which the first channel is above zero, one row each."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 5)
        nn.init.constant_(self.stem.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        cells = x.movedim(1, 3).flatten(0, 2)
        return x.mean((2, 3)) + self.head(cells[cells[:, 0] > 0]).sum()


class Branched(nn.Module):
    """Two branches; inputs whose mean is above ``threshold`` take the first, together or each alone."""

    def __init__(self, threshold: float, *, by_sample: bool = False) -> None:
        super().__init__()
        self.stem, self.head = _stage(3, 8), nn.Linear(8, 4)
        self.over, self.under = (nn.Sequential(_stage(8, 8), _stage(8, 8)) for _ in range(2))
        self.threshold, self.by_sample = threshold, by_sample

    def forward(self, x: Tensor) -> Tensor:
        routed = []
        for each in x.split(1) if self.by_sample else [x]:
            branch = self.over if float(each.mean()) > self.threshold else self.under
            routed.append(branch(self.stem(each)))
        return self.head(torch.cat(routed).mean((2, 3)))


def gated() -> Gated:
    """A network with statistics, in evaluation mode."""
    torch.manual_seed(0)
    network = Gated()
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(8, 3, 16, 16))
    return network.eval()
