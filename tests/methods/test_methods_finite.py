"""A network that gives NaN or infinity on the samples is refused by every method in the same words."""

import pytest
import torch
from torch import nn

import modelopt_cli as mo
from modelopt_cli.methods.batches import require_finite

X = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 4


class Endless(nn.Module):
    """A network whose values are infinite from its second layer on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.second(self.first(x).abs() / 0.0))
        return self.last(x.mean((2, 3)))


METHODS = {
    "quantize": lambda net: mo.quantize(net, calibration=[X]),
    "prune by Taylor": lambda net: mo.prune(net, flops=0.5, criterion="taylor", calibration=[(X, Y)]),
    "prune by second derivatives": lambda net: mo.prune(
        net, sparsity=0.5, structure="unstructured", criterion="obs", calibration=[X]
    ),
    "batch norms": lambda net: mo.prune(net, flops=0.5, criterion="l1", calibration=[X]),
    "share with data": lambda net: mo.share(net, bits=3, weighting="hessian", calibration=[X]),
    "share within a budget": lambda net: mo.share(net, bits="auto", ratio=6, calibration=[X]),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_network_without_numbers_is_refused(method):
    with pytest.raises(mo.DataError) as error:
        method(Endless().eval())
    assert error.value.message == "the network gives NaN or infinity on the calibration data"
    assert error.value.hint.startswith("check the checkpoint and the preprocessing")


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_one_value_is_enough(wrong):
    values = torch.zeros(3, 5)
    require_finite(values)
    values[1, 2] = wrong
    with pytest.raises(mo.DataError, match=r"^layer a: the network gives .*; check .*, or prune less$"):
        require_finite(values, "layer a", "prune less")
