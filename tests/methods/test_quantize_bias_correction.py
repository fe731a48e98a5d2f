"""Bias correction: the means of an int8 network's outputs are those of the float network."""

import pytest
import torch
from quantize_networks import Images, captured, images, small, sqnr
from torch import Tensor, nn

from modelopt_cli.methods.context import Context
from modelopt_cli.methods.quantize.apply import apply
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.equalizing.bias_correction import _sure
from modelopt_cli.program import Program

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def int8(program: Program, seen: Tensor, **options: str) -> Program:
    config = QuantizeConfig(**{"bias_correction": "measured", **options})  # type: ignore[arg-type]
    return apply(program, config, Context(data=Images(seen))).program  # type: ignore[arg-type]


def standard_errors(differences: Tensor) -> Tensor:
    """Of means over samples, by numpy."""
    return torch.from_numpy(differences.numpy().std(0, ddof=1) / len(differences) ** 0.5)


def test_means_of_the_outputs_are_those_of_the_float_network_up_to_their_standard_errors():
    program, seen = small(), images(32, 3, 12, 12)
    left = program(seen) - int8(program, seen)(seen)
    plain = program(seen) - int8(program, seen, bias_correction="none")(seen)
    assert (left.mean(0).abs() <= standard_errors(left)).all()
    assert (plain.mean(0).abs() > 3 * standard_errors(plain)).any()


def test_a_layer_gets_the_means_behind_its_activation():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1)
    seen = images(32, 3, 8, 8)
    program = captured(nn.Sequential(conv, nn.ReLU(), nn.Conv2d(4, 2, 1)), 3, 8, 8)
    corrected = int8(program, seen).get_submodule("0")
    q = corrected.input
    rounded = q.scale * ((seen / q.scale).round() + q.zero_point).clamp(0, 255).sub(q.zero_point)
    weight = corrected.weight.float() * corrected.scale.view(-1, 1, 1, 1)

    def left(bias: Tensor) -> Tensor:
        sums = torch.nn.functional.conv2d(rounded, weight, bias, padding=1)
        return (torch.relu(conv(seen)) - torch.relu(sums)).mean((2, 3))

    assert (left(corrected.bias).mean(0).abs() <= standard_errors(left(corrected.bias))).all()
    assert (left(conv.bias).mean(0).abs() > 2 * standard_errors(left(conv.bias))).any()


def test_a_mean_no_larger_than_its_standard_error_is_noise():
    differences = torch.tensor([[1.0, 3.0], [-1.0, 5.0], [1.5, 4.0], [-1.4, 4.0]], dtype=torch.float64)
    error, mean = standard_errors(differences), differences.mean(0)
    assert abs(mean[0]) < error[0]
    expected = torch.stack([torch.zeros((), dtype=torch.float64), mean[1] - error[1] ** 2 / mean[1]])
    torch.testing.assert_close(_sure(differences), expected)


def test_nothing_is_learned_of_one_sample():
    program, seen = small(), images(1, 3, 12, 12)
    corrected, plain = (
        int8(program, seen).state_dict(),
        int8(program, seen, bias_correction="none").state_dict(),
    )
    assert all(torch.equal(corrected[name], value) for name, value in plain.items())


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
