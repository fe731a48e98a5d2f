"""Recurrent layers: captured as layers, stored, and pruned."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from channels_oracle import masked, prune_ours
from torch import Tensor, nn

from modelopt_cli import artifact
from modelopt_cli.measure.flops import count_macs
from modelopt_cli.program import InputSpec
from modelopt_cli.program.capture import capture

SHAPE = (1, 8, 8)
KINDS: dict[str, dict[str, Any]] = {
    "LSTM": {"num_layers": 2, "dropout": 0.3},
    "GRU": {"bidirectional": True, "bias": False},
    "RNN": {"nonlinearity": "relu"},
}


class Rows(nn.Module):
    """Reads the rows of an image after a convolution, last hidden state included."""

    def __init__(self, rnn: nn.Module, width: int) -> None:
        super().__init__()
        self.conv, self.norm, self.rnn = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), rnn
        self.fc, self.head, self.last = nn.Linear(width, 16), nn.Linear(16, 10), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().transpose(1, 2).flatten(2)
        y, last = self.rnn(x)
        last = last[0] if isinstance(last, tuple) else last
        return self.head(self.fc(y[:, -1]).relu()) + self.last(last.mean(0))  # type: ignore[no-any-return]


class Cells(nn.Module):
    """Steps through the rows with cells whose first state is made for the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTMCell(8, 6), nn.GRUCell(6, 6), nn.RNNCell(6, 5)
        self.head = nn.Linear(5, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 6)
        c, g = torch.zeros(x.size(0), 6), torch.zeros((x.shape[0], 6))
        for t in range(x.shape[2]):
            h, c = self.lstm(x[:, 0, t], (h, c))
            g = self.gru(h, g)
        return self.head(self.rnn(g, g[:, :5]))  # type: ignore[no-any-return]


def network(kind: str) -> nn.Module:
    torch.manual_seed(1)
    if kind == "cells":
        return Cells().eval()
    options = KINDS[kind]
    rnn = getattr(nn, kind)(32, 6, batch_first=True, **options)
    return Rows(rnn, 12 if options.get("bidirectional") else 6).eval()


def images(count: int) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("kind", [*KINDS, "cells"])
class TestProgram:
    @pytest.mark.slow
    def test_computes_the_same_bits_copied_and_reloaded(self, kind: str, tmp_path: Path) -> None:
        model = network(kind)
        program = capture(model, InputSpec(SHAPE))
        artifact.write_program(program, tmp_path / "net.safetensors")
        again = artifact.read_program(tmp_path / "net.safetensors")
        with torch.no_grad():
            for x in map(images, (1, 5)):
                for made in (program, copy.deepcopy(program), again):
                    assert torch.equal(made(x), model(x))

    @pytest.mark.slow
    def test_computes_with_its_own_weights(self, kind: str) -> None:
        """A recurrent layer keeps a second list of its weights, which must not be the model's."""
        program = copy.deepcopy(capture(network(kind), InputSpec(SHAPE)))
        x, before = images(2), {}
        for name, parameter in program.named_parameters():
            before[name] = program(x)
            with torch.no_grad():
                parameter.add_(0.5)
            assert not torch.equal(program(x), before[name]), name

    def test_pruned(self, kind: str) -> None:
        pruned, found, keep = prune_ours(capture(network(kind), InputSpec(SHAPE)), 0.5)
        assert keep.keys() == ({"conv", "rnn", "fc"} if kind != "cells" else {"lstm", "gru"})
        x = images(3).double()
        with torch.no_grad():
            assert torch.allclose(pruned.double()(x), masked(found, keep).double()(x), rtol=1e-12)

    def test_multiply_accumulates(self, kind: str) -> None:
        macs = count_macs(capture(network(kind), InputSpec(SHAPE)), InputSpec(SHAPE)).per_layer
        gates = {"LSTM": 4, "GRU": 3, "RNN": 1}
        if kind == "cells":
            assert macs["lstm"] == 8 * 4 * 6 * (8 + 6)
        elif kind == "LSTM":
            assert macs["rnn"] == 8 * 4 * 6 * (32 + 6 + 6 + 6)
        else:
            assert macs["rnn"] == 8 * gates[kind] * 6 * (32 + 6) * (2 if kind == "GRU" else 1)
