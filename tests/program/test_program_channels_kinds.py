"""Every kind of layer with a rule for channels, between two layers that have some: one row, one run.

Expected is the dense network with the removed channels zeroed where they are made and where they are read;
where a norm takes its statistics over channels, torch's own norm of the channels that are left.
"""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from channels_oracle import masked
from test_program_kinds import EXAMPLES
from torch import Tensor, nn

from modelopt_cli.program import InputSpec
from modelopt_cli.program.capture import capture
from modelopt_cli.program.channels import analyse, remove
from modelopt_cli.program.channels.layer_rules import RULES
from modelopt_cli.program.layer_kinds import KINDS

# Where the first example of a kind is not fit for it.
OWN: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "ConstantPad2d": (nn.ConstantPad2d(1, 2.5), (2, 4, 12, 12)),
    "PixelShuffle": (nn.PixelShuffle(2), (2, 12, 6, 6)),
    "LayerNorm": (nn.LayerNorm(12), (2, 4, 12)),
    "Softmax": (nn.Softmax(-1), (2, 4, 12, 12)),
    "LogSoftmax": (nn.LogSoftmax(-1), (2, 4, 12, 12)),
}
FIRST = {type(layer).__name__: (layer, shape) for layer, shape in reversed(EXAMPLES)} | OWN
MIXING = {"response_norm", "softmax_2d"}  # rules that let no channel of theirs go
ON_LAST_DIM = {"linear", "last_dims_norm"}

NORMS: dict[str, Any] = {
    "LayerNorm": lambda norm, x: F.layer_norm(x, x.shape[-1:], None, None, norm.eps),
    "RMSNorm": lambda norm, x: F.rms_norm(x, x.shape[-1:], None, norm.eps),
    "GroupNorm": lambda norm, x: F.group_norm(x, norm.num_groups, None, None, norm.eps),
}


class Between(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        layer, shape = FIRST[kind]
        last = KINDS[kind].channels in ON_LAST_DIM
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(shape) - 3]
        self.before = nn.Linear(shape[-1], shape[-1]) if last else conv(shape[1], shape[1], 1)
        self.layer = copy.deepcopy(layer).eval()
        self.double()
        with torch.no_grad():
            width = self.layer(self.before(self.sample(kind))).flatten(1).shape[1]
        self.after = nn.Linear(width, 4).double()
        for parameter in (*self.before.parameters(), *self.after.parameters()):
            nn.init.normal_(parameter)
        if kind not in NORMS:
            for parameter in self.layer.parameters():
                nn.init.normal_(parameter)
        self.eval()

    @staticmethod
    def sample(kind: str) -> Tensor:
        shape = FIRST[kind][1]
        return torch.randn(2, *shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.layer(self.before(x)).flatten(1))


def kept_norm(net: Between, kind: str, kept: Tensor, x: Tensor) -> Tensor:
    """The network on the kept channels alone."""
    dim = -1 if KINDS[kind].channels in ON_LAST_DIM else 1
    y = net.before(x)
    full = torch.zeros_like(y)
    full.index_copy_(dim, kept, NORMS[kind](net.layer, y.index_select(dim, kept)))
    return net.after(full.flatten(1))


WITH_RULE = [kind for kind, row in KINDS.items() if row.channels and kind in FIRST]


@pytest.mark.parametrize("kind", WITH_RULE)
def test_without_some_channels_it_computes_the_zeroed_network(kind: str) -> None:
    torch.manual_seed(0)
    net = Between(kind)
    x = net.sample(kind)
    program = capture(net, InputSpec(tuple(x.shape[1:])), verify=False)
    found = analyse(program)
    assert bool(found.groups) == (KINDS[kind].channels not in MIXING)
    keep = {g.name: list(range(g.units))[: max(g.units // 2 // g.step, 1) * g.step] for g in found.groups}
    smaller = remove(program, keep, dependencies=found)
    with torch.no_grad():
        if kind in NORMS:
            made = next(member for member in found["before"].members if member.makes_channels)
            kept = made.positions[torch.isin(made.units, torch.tensor(keep["before"]))]
            expected = kept_norm(net, kind, kept.sort().values, x)
        else:
            expected = masked(found, keep)(x)
        torch.testing.assert_close(smaller(x), expected, rtol=1e-10, atol=1e-10)
    if keep:
        assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in program.parameters())


def test_every_rule_is_of_a_row_and_every_row_has_its_rule() -> None:
    assert {row.channels for row in KINDS.values()} - {None} == set(RULES)
