"""Every method on a network with an LSTM, whose values torch's own modules compute, too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelopt_cli import api, artifact
from modelopt_cli.measure.coverage import coverage
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.share.config import ShareConfig
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.capture import capture


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.rnn = nn.Conv2d(1, 16, 3, padding=1), nn.LSTM(128, 24, batch_first=True)
        self.fc, self.head = nn.Linear(24, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        y, (last, _) = self.rnn(self.conv(x).relu().transpose(1, 2).flatten(2))
        return self.head(self.fc(y.mean(1) + last[0]).relu())  # type: ignore[no-any-return]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    program = capture(Reader(), InputSpec((1, 8, 8)))
    artifact.write_program(program, tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def made(method: Any, source: Path, config: Any) -> Program:
    output = source.with_name("out.safetensors")
    method(source, output, config=config, data="digits", evaluate=False)
    return artifact.read_program(output)


def images() -> Tensor:
    return torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def signal_to_noise(actual: Tensor, wanted: Tensor) -> float:
    return float(10 * torch.log10(wanted.square().sum() / (actual - wanted).square().sum()))


@torch.no_grad()
def test_int8_leaves_it_in_float_and_says_why(source: Path) -> None:
    program = made(api.quantize, source, QuantizeConfig(scheme="int8", calibration_samples=32))
    layers = {layer.name: layer for layer in coverage(program).layers}
    assert {name for name, layer in layers.items() if layer.compressed} == {"conv", "fc", "head"}
    assert "hidden units, fewer than 768" in layers["rnn"].reason
    wanted = artifact.read_program(source)(images())
    assert signal_to_noise(program(images()), wanted) > 25


@pytest.mark.parametrize(
    ("method", "config", "least"),
    [
        (api.quantize, QuantizeConfig(scheme="int8-weight"), 35),
        (api.share, ShareConfig(bits=6), 20),
        (api.prune, PruneConfig(structure="unstructured", sparsity=0.1), 15),
    ],
    ids=["int8-weight", "share", "unstructured"],
)
@torch.no_grad()
def test_its_weights_are_compressed(source: Path, method: Any, config: Any, least: float) -> None:
    program = made(method, source, config)
    assert coverage(program).fraction == 1.0
    model = Reader()
    model.load_state_dict(program.state_dict())
    assert torch.equal(program(images()), model(images()))
    assert signal_to_noise(program(images()), artifact.read_program(source)(images())) > least


@pytest.mark.slow
@torch.no_grad()
def test_its_hidden_units_and_the_channels_around_it_are_pruned(source: Path) -> None:
    """The file computes what the network does without the channels and hidden units that were removed."""
    program = made(api.prune, source, PruneConfig(structure="channels", sparsity=0.5))
    state, model = program.state_dict(), Reader()
    model.load_state_dict(artifact.read_program(source).state_dict())
    shapes = {"conv.weight": (8, 1, 3, 3), "rnn.weight_ih_l0": (48, 64), "fc.weight": (16, 12)}
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    channels, units, features = (
        removed(state[name], model.get_parameter(name)) for name in ("conv.bias", "rnn.bias_ih_l0", "fc.bias")
    )
    units = units[units < model.rnn.hidden_size]  # each has a row in all four gates
    for parameter in model.conv.parameters():
        parameter[channels] = 0
    model.rnn.weight_hh_l0[:, units] = 0
    model.fc.weight[:, units] = 0
    model.head.weight[:, features] = 0
    assert torch.allclose(program(images()), model(images()), rtol=1e-4, atol=1e-6)


def removed(kept: Tensor, dense: Tensor) -> Tensor:
    """Places of the numbers that are no longer there."""
    return (~torch.isin(dense, kept)).nonzero().flatten()
