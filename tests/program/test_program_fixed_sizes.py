"""Sizes that follow from the network's own values are fixed; those that follow from the input are refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from channels_oracle import masked
from torch import Tensor, nn

from modelopt_cli.errors import CaptureError
from modelopt_cli.program import InputSpec, bounds
from modelopt_cli.program.capture import capture
from modelopt_cli.program.channels import analyse, remove
from modelopt_cli.program.serialization import from_data, state_of, to_data
from modelopt_cli.program.shapes import value_shapes

Call = Callable[[Any, Tensor], Tensor]
SPEC = InputSpec((3, 4, 6))


class Picks(nn.Module):
    """A call between two layers; the second is as wide as what the call gives."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.before, self.call, self.after = nn.Conv2d(3, 8, 1), call, nn.Identity()
        self.gate = nn.Parameter(torch.tensor([1.0, -1, 1, 1, -1, 1, -1, 1]))
        self.wide = nn.Parameter(torch.rand(8, 9))
        self.register_buffer("mask", torch.tensor([1, 0, 1, 1, 0, 1, 0, 1]).bool())
        self.register_buffer("counts", torch.tensor([1, 2, 0, 1, 3, 1, 1, 1]))
        self.register_buffer("places", torch.tensor([3, 1, 5, 3]))
        self.double().eval()
        with torch.no_grad():
            width = self(images(2)).shape[1]
        self.after = nn.Linear(width, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.call(self, self.before(x).relu()).flatten(1).double())


def images(batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, *SPEC.shape, dtype=torch.float64, generator=generator)


FOLLOWED: dict[str, Call] = {
    "a mask": lambda n, x: x[:, n.mask],
    "a computed mask": lambda n, x: x[:, n.gate > 0],
    "a mask of what was changed in place": lambda n, x: x.mul_(2)[:, n.gate > 0],
    "a mask of another layer's weight": lambda n, x: x[:, n.before.bias > n.before.bias.mean()],
    "a mask of sizes": lambda n, x: x[:, torch.arange(x.shape[1]) % 3 > 0],
    "a mask at the front": lambda n, x: x.transpose(0, 1)[n.gate > 0].transpose(0, 1),
    "nonzero": lambda n, x: x[:, torch.nonzero(n.gate > 0).flatten()],
    "nonzero as a method": lambda n, x: x.index_select(1, (n.gate > 0).nonzero().flatten()),
    "where": lambda n, x: x[:, torch.where(n.gate > 0)[0]],
    "unique": lambda n, x: x[:, torch.unique(n.places)],
    "repeat_interleave": lambda n, x: torch.repeat_interleave(x, n.counts, 1),
    "repeat_interleave of a known size": lambda n, x: x.repeat_interleave(n.counts, 1, output_size=10),
    "repeat_interleave by computed counts": lambda n, x: x.repeat_interleave((n.gate > 0).long() + 1, 1),
    "repeat_interleave by one count": lambda n, x: x.repeat_interleave(n.counts[1], 1),
    "repeat_interleave of nothing but counts": lambda n, x: x[:, torch.repeat_interleave(n.counts)],
    "two masks": lambda n, x: x[:, n.mask][:, :, n.mask[:4]],
    "repeat_interleave without a dimension": lambda n, x: (
        n.wide.repeat_interleave(torch.arange(72) % 2).sum() * x
    ),
}
FROZEN: dict[str, Call] = {
    "a mask and a slice": lambda n, x: x[:, n.mask, 1:],
    "a mask of two dimensions": lambda n, x: x.flatten(2)[:, n.wide[:, :1].expand(8, 24) > 0.3],
    "a mask of a weight": lambda n, x: F.linear(x.transpose(1, 3), n.wide.t()[:, n.mask][:, :1].expand(9, 8)),
    "one_hot": lambda n, x: x * F.one_hot(n.places).sum(0).repeat(4)[:8].view(8, 1, 1),
    "topk": lambda n, x: x[:, n.gate.topk(5)[1]],
    "topk of the input": lambda n, x: x[:, x.mean((0, 2, 3)).topk(5)[1]],
    "argsort": lambda n, x: x[:, n.gate.argsort()],
    "bucketize": lambda n, x: x[:, torch.bucketize(n.gate, n.wide[0].sort()[0])[:5].clamp(max=7)],
    "a computed index": lambda n, x: x.index_select(1, n.places + 1),
    "gather": lambda n, x: x.gather(1, n.places.view(1, -1, 1, 1).expand(x.shape[0], 4, 4, 6)),
    "counts of the input, of a known size": lambda n, x: x.repeat_interleave(
        F.one_hot(x.mean((0, 2, 3)).argmax(), 8) + 1, 1, output_size=9
    ),
}


def captured(call: Call) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    net = Picks(call)
    return net, capture(net, SPEC)


@pytest.mark.parametrize("name", [*FOLLOWED, *FROZEN])
def test_the_network_is_the_same_and_its_shapes_are_known(name: str) -> None:
    net, program = captured({**FOLLOWED, **FROZEN}[name])
    read = from_data(to_data(program), state_of(program))
    for batch in (1, 5):
        with torch.no_grad():
            expected = net(images(batch))
            assert torch.equal(program(images(batch)), expected)
            assert torch.equal(read(images(batch)), expected)
        assert value_shapes(read, batch)["output"] == expected.shape


@pytest.mark.parametrize("name", [*FOLLOWED, *FROZEN])
def test_without_some_channels_it_computes_the_zeroed_network(name: str) -> None:
    _, program = captured({**FOLLOWED, **FROZEN}[name])
    found = analyse(program)
    if name in FROZEN:
        assert "before" in found.frozen
        return
    (group,) = found.groups
    keep = {group.name: [0, 1, 3, 6]}
    smaller = remove(program, keep, dependencies=found)
    assert smaller.get_submodule("before").out_channels < 6
    smaller = from_data(to_data(smaller), state_of(smaller))
    with torch.no_grad():
        torch.testing.assert_close(smaller(images(3)), masked(found, keep)(images(3)), rtol=1e-10, atol=1e-10)


def test_a_weight_that_a_mask_picks_from_stays_a_weight() -> None:
    _, program = captured(FROZEN["a mask of a weight"])
    assert isinstance(program.wide, nn.Parameter)


OF_THE_INPUT: dict[str, Call] = {
    "a mask": lambda n, x: x * x[x > 0].mean(),
    "a mask of as many every time": lambda n, x: x[:, _half(x)],
    "where": lambda n, x: x * torch.where(x.mean((2, 3)) > -1)[0].sum(),
    "one_hot": lambda n, x: x * F.one_hot(_half(x).long()).sum(),
}


@pytest.mark.parametrize("name", OF_THE_INPUT)
def test_a_size_that_follows_from_the_input_is_refused(name: str) -> None:
    with pytest.raises(CaptureError, match=r"depends? on the values in a(nother)?"):
        captured(OF_THE_INPUT[name])


def test_what_is_larger_than_a_file_may_ask_for_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_ELEMENTS", 10)
    with pytest.raises(CaptureError, match=r"would make a tensor of .*a file may not ask for so much"):
        captured(FOLLOWED["a mask"])


def _half(x: Tensor) -> Tensor:
    means = x.mean((0, 2, 3))
    return means >= means.kthvalue(5)[0]
