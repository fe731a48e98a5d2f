"""Which networks are trained with the channels innermost: not those that oneDNN would crash on."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from modelopt_cli.program import InputSpec
from modelopt_cli.training.prepare import prepared


def shortcut(channels, kernel=1, stride=2):
    """A network with one convolution that may be a shortcut."""
    return nn.Sequential(
        nn.Conv2d(channels, 32, kernel, stride, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


@pytest.mark.parametrize(
    ("network", "channels", "expected"),
    [
        pytest.param(shortcut(8), 8, False, id="narrow shortcut"),
        pytest.param(shortcut(16), 16, True, id="wide shortcut"),
        pytest.param(shortcut(8, stride=1), 8, True, id="no skipping"),
        pytest.param(shortcut(8, kernel=3), 8, True, id="larger kernel"),
    ],
)
def test_channels_last_unless_it_is_not_safe(network, channels, expected):
    with prepared(network, InputSpec((channels, 16, 16)), "cpu") as found:
        assert found.channels_last is expected


@pytest.mark.slow
def test_a_narrow_shortcut_trains_on_two_threads():
    """In a process of its own, since the failure this guards against ends the process."""
    script = """
import torch
from torch import nn
from modelopt_cli.program import InputSpec
from modelopt_cli.training.prepare import prepared
torch.set_num_threads(2)
network = nn.Sequential(nn.Conv2d(8, 16, 1, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
with prepared(network, InputSpec((8, 32, 32)), "cpu") as found:
    for _ in range(20):
        network(torch.randn(25, 8, 32, 32)).square().sum().backward()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_layout_is_put_back():
    network = shortcut(16)
    with prepared(network, InputSpec((16, 16, 16)), "cpu"):
        assert network[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert network[0].weight.is_contiguous()
