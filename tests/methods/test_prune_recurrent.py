"""Hidden units of recurrent layers, pruned by every criterion."""

from functools import cache
from pathlib import Path

import pytest
import torch
from prune_cases import captured, context
from torch import Tensor, nn

from modelopt_cli.artifact import read_program, write_program
from modelopt_cli.methods.prune.apply import apply
from modelopt_cli.methods.prune.channel_pruner import width
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.methods.prune.criteria import CRITERIA
from modelopt_cli.methods.prune.structures import CHANNELS
from modelopt_cli.program import Program
from modelopt_cli.program.channels import analyse

STRONG = torch.arange(32) % 2 == 0
SAMPLES = torch.randn(24, 6, 10, generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(24) % 5
ABLE = [name for name, row in CRITERIA.items() if CHANNELS in row.granularities]


class Sequence(nn.Module):
    """A recurrent layer, and what no rule follows."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.mixed = nn.LSTM(10, 32, batch_first=True, bidirectional=True), nn.Bilinear(10, 10, 3)
        self.fc = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(self.rnn(x)[0].mean(1)) + self.mixed(x[:, 0], x[:, 1]).sum(1, keepdim=True)
        return result


@cache
def program() -> Program:
    """Every other hidden unit has weights, and readers, ten times as large as the rest, and differs more."""
    torch.manual_seed(0)
    model = Sequence()
    with torch.no_grad():
        for name, weight in model.rnn.named_parameters():
            weight[~STRONG.repeat(4)] /= 10
            if name.startswith("weight_hh"):
                weight[:, ~STRONG] /= 10
        model.fc.weight[:, ~STRONG.repeat(2)] /= 10
    return captured(model, 6, 10)


@pytest.mark.parametrize("criterion", sorted(set(ABLE) - {"random", "bn-scale"}))
def test_the_weakest_units_go_in_every_gate_and_direction(criterion: str, tmp_path: Path) -> None:
    config = PruneConfig(structure="channels", sparsity=0.5, criterion=criterion)
    result = apply(program(), config, context(SAMPLES, LABELS))
    before, after = program().state_dict(), result.program.state_dict()
    assert result.program.get_submodule("rnn").hidden_size == 16  # a multiple of 8
    for name, weight in before.items():
        if not name.startswith("rnn."):
            continue
        kept = weight[STRONG.repeat(4)]
        assert torch.equal(after[name], kept[:, STRONG] if "weight_hh" in name else kept)
    assert torch.equal(after["fc.weight"], before["fc.weight"][:, STRONG.repeat(2)])
    assert result.skipped["mixed"] == "Bilinear, which channels cannot be followed through"
    write_program(result.program, tmp_path / "net.safetensors")
    with torch.no_grad():
        assert torch.equal(read_program(tmp_path / "net.safetensors")(SAMPLES), result.program(SAMPLES))


def test_a_hidden_unit_counts_as_one_channel() -> None:
    result = apply(program(), PruneConfig(structure="channels", sparsity=0.25, round_to=1), context(SAMPLES))
    assert result.program.get_submodule("rnn").hidden_size == 24
    (group,) = analyse(program()).groups
    assert (group.units, width(group)) == (32, 1)
    assert result.target is not None
    assert result.target.reached == 0.25
