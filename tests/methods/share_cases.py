"""A network with shared weights of all kinds, and what trains it."""

from typing import Any

import torch
from prune_cases import captured
from torch import Tensor, nn

from modelopt_cli.data import Data
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.share.clustered_weight import ClusteredWeight
from modelopt_cli.program import Program
from modelopt_cli.training import TrainConfig, Training, fit

CONFIG = TrainConfig(epochs=3, batch_size=16, lr=0.05)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.mid, self.fc = nn.Conv2d(8, 16, 3, stride=2), nn.Linear(16 * 9, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.mid(torch.relu(self.bn(self.conv(x)))))
        result: Tensor = self.fc(x.flatten(1))
        return result


def nearest_shared(weight: Tensor, entries: int, *, groups: int = 1, vector: int = 1) -> ClusteredWeight:
    """Shared with entries at quantiles, or drawn blocks; the zeros of a weight apart."""
    weight = weight.detach()
    blocks = weight.reshape(len(weight), -1, vector)
    tables, indices = [], []
    pruned = bool((weight == 0).any())
    for part in blocks.split(-(-len(weight) // groups)):
        points = part.reshape(-1, vector)
        live = points[points.abs().sum(1) > 0]
        order = live[:, 0].argsort()
        places = torch.linspace(0, len(live) - 1, entries - pruned).round().long()
        table = live[order[places]]
        found = torch.cdist(points, table).argmin(1)
        if pruned:
            table = torch.cat([table, torch.zeros(1, vector)])
            found[points.abs().sum(1) == 0] = entries - 1
        tables.append(table)
        indices.append(found.view(part.shape[:2]))
    return ClusteredWeight(tuple(weight.shape), torch.cat(indices), torch.stack(tables), pruned)


def shared_of(program: Program) -> dict[str, ClusteredWeight]:
    """All kinds: vectors, several tables, pruned weights."""
    return {
        "conv.weight": nearest_shared(program.get_parameter("conv.weight"), 6, vector=3),
        "mid.weight": nearest_shared(program.get_parameter("mid.weight"), 5, groups=3),
        "fc.weight": nearest_shared(program.get_parameter("fc.weight"), 4),
    }


def within(digits: Data, config: TrainConfig = CONFIG, **more: Any) -> Context:
    return Context(training=Training(digits, config=config, **more))


def pruned_network(digits: Data) -> Program:
    """A trained network, two of whose weights are pruned."""
    torch.manual_seed(0)
    network = captured(Small(), 1, 8, 8)
    fit(network, Training(digits, config=TrainConfig(epochs=10, batch_size=16, lr=0.05)), seed=0)
    with torch.no_grad():
        for name in ("mid.weight", "fc.weight"):
            weight = network.get_parameter(name)
            weight.masked_fill_(weight.abs() < weight.abs().quantile(0.6), 0)
    return network
