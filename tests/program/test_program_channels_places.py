"""Channels read by place, sizes that name places, and layers with several inputs.

Expected is the dense network with the removed channels zeroed, or that it keeps them and says why.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from channels_oracle import masked, prune_ours
from torch import Tensor, nn

from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.calls import operation
from modelopt_cli.program.capture import capture
from modelopt_cli.program.channels import analyse

Call = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
TOKENS, FEATURES = 12, 10


class Three(nn.Module):
    """Three linear layers over tokens and what a call makes of their outputs, 16, 16 and 4 channels wide."""

    def __init__(self, call: Call, layer: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.small = (nn.Linear(FEATURES, width) for width in (16, 16, 4))
        self.layer, self.call = layer or nn.Identity(), call
        self.last, self.other = nn.Identity(), nn.Linear(4, 5)
        self.eval()
        with torch.no_grad():
            width = self.call(self.layer, *self.made(torch.rand(2, TOKENS, FEATURES))).shape[-1]
        self.last = nn.Linear(width, 5).eval()

    def made(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.a(x), self.b(x.flip(1)), self.small(x)

    def forward(self, x: Tensor) -> Tensor:
        a, b, small = self.made(x)
        return torch.cat([self.last(self.call(self.layer, a, b, small)), self.other(small)], 1)


def check(network: nn.Module) -> dict[str, str]:
    return compare(capture(network, InputSpec((TOKENS, FEATURES))))


def compare(program: Program) -> dict[str, str]:
    """Compare a network without half of its channels with the dense one; the reasons of its frozen layers."""
    pruned, found, keep = prune_ours(program, 0.5)
    x = torch.rand(3, TOKENS, FEATURES, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        torch.testing.assert_close(pruned(x), masked(found, keep)(x), rtol=1e-4, atol=1e-5)
    return found.frozen


def state(y: Tensor) -> Tensor:
    return y[:, :1].transpose(0, 1).contiguous()


# Layer, call, and what must stay whole.
SEVERAL: dict[str, tuple[nn.Module, Call, str]] = {
    "bilinear": (nn.Bilinear(16, 16, 8), lambda c, a, b, s: c(a, b), "ab"),
    "bilinear by name": (nn.Bilinear(16, 16, 8), lambda c, a, b, s: c(input2=a, input1=b), "ab"),
}
STATEFUL: dict[str, tuple[nn.Module, Call]] = {
    "a state": (nn.GRU(16, 16, batch_first=True), lambda c, a, b, s: c(a, state(b))[0]),
    "a state by name": (nn.GRU(16, 16, batch_first=True), lambda c, a, b, s: c(hx=state(b), input=a)[0]),
    "a pair of states": (
        nn.LSTM(16, 16, batch_first=True),
        lambda c, a, b, s: c(a, (state(b), state(b)))[0],
    ),
    "a list of states": (
        nn.LSTM(16, 16, batch_first=True),
        lambda c, a, b, s: c(a, [state(b), state(a)])[0],
    ),
    "a cell": (nn.GRUCell(16, 16), lambda c, a, b, s: c(a[:, 0], b[:, 0]).unsqueeze(1)),
}


@pytest.mark.parametrize(("layer", "call", "whole"), SEVERAL.values(), ids=SEVERAL)
def test_every_input_of_a_layer_with_several_stays_whole(layer: nn.Module, call: Call, whole: str) -> None:
    frozen = check(Three(call, layer))
    assert all(f"goes through layer ({type(layer).__name__})" in frozen[name] for name in whole)


@pytest.mark.parametrize(("layer", "call"), STATEFUL.values(), ids=STATEFUL)
def test_a_state_goes_with_the_units_it_becomes(layer: nn.Module, call: Call) -> None:
    program = capture(Three(call, layer), InputSpec((TOKENS, FEATURES)))
    assert not {"a", "b", "layer"} & compare(program).keys()
    tied = {"b.weight", "layer.weight_hh_l0" if isinstance(layer, nn.RNNBase) else "layer.weight_hh"}
    assert any(tied <= {m.parameter for m in group.members} for group in analyse(program).groups)


ROLLED, STEPPED = "goes through roll over channels", "is sliced with a step"
MOVED: dict[str, tuple[Call, str | None]] = {
    "roll": (lambda c, a, b, s: torch.roll(a, 3, 2), None),
    "roll of tokens": (lambda c, a, b, s: torch.roll(a, 3, 1), None),
    "roll of both": (lambda c, a, b, s: torch.roll(a, (3, 1), (2, 1)), ROLLED),
    "roll of all": (lambda c, a, b, s: torch.roll(a, 3), ROLLED),
    "roll of a grid": (lambda c, a, b, s: a.view(-1, 12, 4, 4).roll((1, 1), (2, 3)).flatten(2), ROLLED),
    "flip of both": (lambda c, a, b, s: a.flip(1, 2), None),
    "narrow": (lambda c, a, b, s: a.narrow(2, 4, 8), None),
    "select": (lambda c, a, b, s: a * a.select(2, 4).unsqueeze(2), None),
    "index_select": (lambda c, a, b, s: a.index_select(2, torch.tensor([3, 1, 4, 1, 5])), None),
    "steps": (lambda c, a, b, s: a[..., ::2], None),
    "steps of both": (lambda c, a, b, s: a[:, ::2, ::2], STEPPED),
    "steps and a range": (lambda c, a, b, s: a[:, 1:, ::2], STEPPED),
    "steps and a new dimension": (lambda c, a, b, s: a[:, :, None, ::3].flatten(2), STEPPED),
    **{
        name: (lambda c, a, b, s, name=name: getattr(torch, name)(a, dim=2), name)
        for name in ("diff", "cumsum", "logcumsumexp")
    },
    "rot90": (lambda c, a, b, s: torch.rot90(a, 2, (1, 2)), "rot90"),
    "gather": (lambda c, a, b, s: a.gather(2, torch.arange(8).flip(0).expand_as(a[..., :8])), "gather"),
    "unfold": (lambda c, a, b, s: a.unfold(2, 4, 2).flatten(2), "unfold"),
}


@pytest.mark.parametrize(("call", "why"), MOVED.values(), ids=MOVED)
def test_moved_channels_go_or_stay_for_a_reason(call: Call, why: str | None) -> None:
    frozen = check(Three(call))
    assert why in frozen["a"] if why else "a" not in frozen


# The places among tokens are numbers of channels that go.
SIZES: dict[str, Call] = {
    "roll": lambda c, a, b, s: a.roll(s.shape[2], 1),
    "roll of channels": lambda c, a, b, s: a.roll(s.shape[2], 2),
    "one": lambda c, a, b, s: a[:, s.shape[2] - 2][:, None],
    "a range": lambda c, a, b, s: a[:, s.shape[2] : s.shape[2] + 1],
    "an end": lambda c, a, b, s: a[:, : s.shape[2]],
    "of what stays": lambda c, a, b, s: a.cumsum(2)[..., : s.shape[2]],
    "narrow": lambda c, a, b, s: a.narrow(1, s.shape[2], 1),
    "repeat": lambda c, a, b, s: a[:, :1].repeat(1, s.shape[2], 1),
    "repeat_interleave": lambda c, a, b, s: a.repeat_interleave(s.shape[2], 1)[:, :9],
    "pad": lambda c, a, b, s: F.pad(a.transpose(1, 2), (s.shape[2], 0)).transpose(1, 2)[:, :7],
}


@pytest.mark.parametrize("call", SIZES.values(), ids=SIZES)
def test_a_place_that_a_size_names_stays_the_same(call: Call) -> None:
    check(Three(call))


@pytest.mark.parametrize("name", ["narrow", "roll", "index_select"])
def test_arguments_in_the_order_of_a_file_are_those_of_the_signature(name: str) -> None:
    """A file has them in the alphabet's order."""
    program = capture(Three(MOVED[name][0]), InputSpec((TOKENS, FEATURES)))
    (call,) = (node for node in program.graph.nodes if operation(node) == name)
    order = list(call.kwargs)
    call.kwargs = dict(sorted(call.kwargs.items()))
    program.recompile()
    assert list(call.kwargs) == order != sorted(order)
    compare(program)
