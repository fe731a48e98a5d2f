"""A small network that is healthy, and the same function written so that int8 breaks it."""

import torch
from quantize_networks import images
from torch import Tensor, nn


class Chain(nn.Module):
    """Three convolutions with batch norms, the last two in a chain, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.second, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.third = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.first(x)))
        x = torch.relu(self.norm2(self.second(x)))
        x = torch.relu(self.third(x))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def chain() -> Chain:
    """The network, its batch norms with the statistics of images."""
    torch.manual_seed(0)
    network = Chain()
    for norm in (network.norm1, network.norm2):
        norm.momentum = None  # type: ignore[assignment]
    with torch.no_grad():
        network.train()(images(16, 3, 12, 12, seed=3))
    return network.eval()


def with_tiny_variance(channel: int) -> Chain:
    """The same function, with a batch norm whose variance of a channel is 0, so that it multiplies it."""
    network = chain()
    norm = network.norm1
    assert norm.running_var is not None
    assert norm.running_mean is not None
    scale = (norm.running_var[channel] + norm.eps).sqrt() / norm.eps**0.5
    with torch.no_grad():
        norm.running_var[channel] = 0
        norm.bias[channel] += norm.running_mean[channel] * (1 - scale)
        network.second.weight[:, channel] /= scale
    return network


def with_dead_layer() -> Chain:
    """A network whose second layer gives the same for all inputs."""
    network = chain()
    with torch.no_grad():
        network.second.weight.zero_()
    return network


def with_outlier_channel(channel: int, times: float = 1000.0) -> Chain:
    """The same function, as a ReLU lets a factor through, with a channel that dwarfs the others."""
    network = chain()
    with torch.no_grad():
        network.norm1.weight[channel] *= times
        network.norm1.bias[channel] *= times
        network.second.weight[:, channel] /= times
    return network
