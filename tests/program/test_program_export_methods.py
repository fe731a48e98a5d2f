"""Methods on networks that were captured with ``torch.export``: int8, fewer channels, and back again."""

import pytest
import torch
from export_networks import NETWORKS, SHAPE, network, two_layers
from quick_cases import quick
from torch import Tensor, nn

import modelopt_cli as mo
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.capture import capture
from modelopt_cli.program.serialization import from_data, state_of, to_data

BATCH = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(1))


INT8 = ("views that are written into", "counters", "shapes changed in place", "a parametrization", "a hook")
"""What leaves a trace in the graph or in a layer; the other networks become graphs like any."""


def snr(actual: Tensor, expected: Tensor) -> float:
    """Signal-to-noise ratio in dB."""
    return float(10 * torch.log10(expected.pow(2).sum() / (actual - expected).pow(2).sum()))


@pytest.mark.parametrize("name", quick(NETWORKS, INT8))
def test_int8(name: str) -> None:
    model = NETWORKS[name]()
    program = capture(model, InputSpec(SHAPE))
    result = mo.quantize(program, calibration=[BATCH], scheme="int8")
    assert any(type(layer).__name__ == "QuantizedConv2d" for layer in result.program.modules())
    x = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert snr(result.program(x), model(x.clone())) > 25


def wide() -> nn.Module:
    layers = {"conv": nn.Conv2d(3, 16, 3), "norm": nn.BatchNorm2d(16), "head": nn.Conv2d(16, 5, 3)}
    return network(two_layers, **layers)


def pruned(model: nn.Module) -> Program:
    program = capture(model, InputSpec(SHAPE))
    return mo.prune(program, flops=0.5).program


@pytest.mark.slow
def test_channels_are_pruned() -> None:
    program = pruned(wide())
    conv, head = program.get_submodule("conv"), program.get_submodule("head")
    assert conv.out_channels == head.in_channels < 16
    again, x = from_data(to_data(program), state_of(program)), torch.randn(2, *SHAPE)
    assert torch.equal(again(x), program(x))


def test_pruned_channels_are_those_of_the_original() -> None:
    """The pruned network computes what the original does with the other channels switched off."""
    model = wide()
    program = pruned(model)
    kept = [
        next(i for i, row in enumerate(model.conv.weight) if torch.equal(row, mine))
        for mine in program.get_submodule("conv").weight
    ]
    with torch.no_grad():
        off = [i for i in range(16) if i not in kept]
        model.head.weight[:, off] = 0
        x = torch.randn(2, *SHAPE)
        torch.testing.assert_close(program(x), model(x), rtol=1e-5, atol=1e-6)
