"""Norms over channels that are written out, compared with the same code on the channels that are left."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.capture import capture
from modelopt_cli.program.channels import analyse, remove

Norm = Callable[[Any, Tensor], Tensor]
SHAPE, WIDTH, KEPT = (7, 5), 6, [0, 2, 5]


class Normed(nn.Module):
    """Two convolutions over sequences, and a norm between them of the first one's outputs ``(N, C, L)``."""

    def __init__(self, norm: Norm, width: int = WIDTH) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv1d(7, width, 1), nn.Conv1d(width, 4, 1), norm
        self.weight, self.bias = nn.Parameter(torch.rand(width, 1) + 0.5), nn.Parameter(torch.randn(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(self.norm(self, self.a(x)) * self.weight + self.bias)
        return result


def _by_hand(n: Any, x: Tensor) -> Tensor:
    mean = x.mean(1, keepdim=True)
    return (x - mean) / torch.sqrt((x - mean).pow(2).mean(1, keepdim=True) + 1e-5)


def _var_mean(n: Any, x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, dim=1, unbiased=False, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + 1e-5)


def _standardized(n: Any, x: Tensor) -> Tensor:
    return (x - x.mean(dim=1).unsqueeze(1)) / (x.std(1, keepdim=True) + 1e-5)


def _root_mean_square(n: Any, x: Tensor) -> Tensor:
    """Touvron et al. 2023, as Hugging Face writes it."""
    wide = x.to(torch.float64)
    return (wide * torch.rsqrt(wide.pow(2).mean(1, keepdim=True) + 1e-5)).to(x.dtype)


def _inverse(n: Any, x: Tensor) -> Tensor:
    return x * (1 / torch.sqrt((x * x).mean(1, keepdim=True).clamp(min=1e-6)))


def _power(n: Any, x: Tensor) -> Tensor:
    return x * torch.pow(torch.square(x).mean(1, keepdim=True) + 1e-5, -0.5)


def _mean_of_norms(n: Any, x: Tensor) -> Tensor:
    """Woo et al., CVPR 2023, equation 4: responses, normed over space, over their mean."""
    sizes = torch.norm(x, p=2, dim=2, keepdim=True)
    return x + x * (sizes / (sizes.mean(1, keepdim=True) + 1e-6))


NORMS: dict[str, Norm] = {
    "layer norm": _by_hand,
    "var_mean": _var_mean,
    "standard deviation": _standardized,
    "RMS norm": _root_mean_square,
    "inverse": _inverse,
    "power": _power,
    "global response norm": _mean_of_norms,
    "over everything": lambda n, x: (x - x.mean((1, 2), keepdim=True)) / x.std((1, 2), keepdim=True),
    "centred": lambda n, x: x - x.mean(1, keepdim=True),
    "length": lambda n, x: x / x.norm(dim=1, keepdim=True).clamp(min=1e-6),
    "vector norm": lambda n, x: x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-6),
    "normalize": lambda n, x: F.normalize(x, dim=1),
    "layer norm without weights": lambda n, x: F.layer_norm(x.mT, x.shape[1:2]).mT,
}


def captured(norm: Norm) -> Program:
    torch.manual_seed(0)
    return capture(Normed(norm).double().eval(), InputSpec(SHAPE), verify=False)


@pytest.mark.parametrize("name", NORMS)
def test_statistics_are_of_the_channels_that_are_left(name: str) -> None:
    program = captured(NORMS[name])
    found = analyse(program)
    assert {group.name: group.units for group in found.groups} == {"a": WIDTH}
    smaller = remove(program, {"a": KEPT}, dependencies=found)
    for key, tensor in smaller.state_dict().items():
        whole = program.state_dict()[key]
        assert torch.equal(
            tensor,
            whole if key == "b.bias" else whole.index_select(int(key == "b.weight"), torch.tensor(KEPT)),
        )
    small = Normed(NORMS[name], len(KEPT)).double().eval()
    small.load_state_dict(smaller.state_dict())
    x = torch.randn(3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(smaller(x), small(x), rtol=1e-10, atol=1e-10)


OTHERS: dict[str, tuple[Norm, str]] = {
    "a gate": (lambda n, x: x * torch.sigmoid(x.mean(1, keepdim=True)), "mean"),
    "the mean itself": (lambda n, x: x * x.mean(1, keepdim=True), "mean"),
    "over the inverse": (lambda n, x: x / x.square().mean(1, keepdim=True).rsqrt(), "mean"),
    "a mean that is used elsewhere": (
        lambda n, x: (x - (mean := x.mean(1, keepdim=True))) + mean.square() * 2,
        "mean",
    ),
    "the norm of something else": (lambda n, x: x / torch.tanh(x).norm(dim=1, keepdim=True), "norm"),
    "two means": (lambda n, x: x - x.mean(1, keepdim=True) + x.sin().mean(1, keepdim=True), "mean"),
    "the difference from a sum": (lambda n, x: x - x.sum(1, keepdim=True), "sum"),
}


@pytest.mark.parametrize(("norm", "name"), OTHERS.values(), ids=OTHERS)
def test_other_uses_of_a_statistic_keep_all_channels(norm: Norm, name: str) -> None:
    found = analyse(captured(norm))
    assert not found.groups
    assert found.frozen["a"] == f"goes through {name} over channels"
