"""Bias correction: the means of an int8 network's outputs are those of the float network."""

import pytest
import torch
from quantize_networks import Images, captured, images, small, sqnr
from torch import Tensor, nn

from modelopt_cli.methods.context import Context
from modelopt_cli.methods.quantize.apply import apply
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.program import Program

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def int8(program: Program, seen: Tensor, **options: str) -> Program:
    config = QuantizeConfig(**{"bias_correction": "measured", **options})  # type: ignore[arg-type]
    return apply(program, config, Context(data=Images(seen))).program  # type: ignore[arg-type]


def test_means_of_the_outputs_are_those_of_the_float_network():
    program, seen = small(), images(32, 3, 12, 12)
    wanted = program(seen).mean(0)
    corrected = int8(program, seen)(seen).mean(0)
    plain = int8(program, seen, bias_correction="none")(seen).mean(0)
    torch.testing.assert_close(corrected, wanted, rtol=0, atol=1e-5)
    assert (plain - wanted).abs().max() > 1e-4


def test_a_layer_gets_the_mean_difference_of_its_sums():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1)
    seen = images(32, 3, 8, 8)
    program = captured(nn.Sequential(conv, nn.ReLU(), nn.Conv2d(4, 2, 1)), 3, 8, 8)
    corrected = int8(program, seen).get_submodule("0")
    q = corrected.input
    rounded = q.scale * ((seen / q.scale).round() + q.zero_point).clamp(0, 255).sub(q.zero_point)
    weight = corrected.weight.float() * corrected.scale.view(-1, 1, 1, 1)
    sums = torch.nn.functional.conv2d(rounded, weight, conv.bias, padding=1)
    expected = conv.bias + (conv(seen) - sums).mean((0, 2, 3))
    torch.testing.assert_close(corrected.bias, expected, rtol=0, atol=1e-5)
    assert not torch.equal(corrected.bias, conv.bias)


def test_unseen_samples_gain():
    program, x = small(), images(64, 3, 12, 12, seed=9)
    seen = images(64, 3, 12, 12)
    plain = int8(program, seen, bias_correction="none")
    assert sqnr(program(x), int8(program, seen)(x)) > sqnr(program(x), plain(x))


def test_channels_of_zeros_keep_their_biases():
    torch.manual_seed(0)
    first = nn.Conv2d(3, 4, 3)
    first.weight[1], first.bias[1] = 0, 0
    program = captured(nn.Sequential(first, nn.ReLU(), nn.Conv2d(4, 2, 1)), 3, 8, 8)
    bias = int8(program, images(32, 3, 8, 8)).get_submodule("0").bias
    assert isinstance(bias, Tensor)
    assert bias[1] == 0
    assert not torch.equal(bias, first.bias)


def test_a_layer_that_is_called_twice_keeps_its_bias():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(6, 6), nn.Linear(6, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(self.layer(torch.relu(self.layer(x)))))  # type: ignore[no-any-return]

    program = captured(Twice(), 6)
    corrected = int8(program, torch.randn(32, 6)).state_dict()
    assert torch.equal(corrected["layer.bias"], program.state_dict()["layer.bias"])
    assert "last.bias" not in corrected
