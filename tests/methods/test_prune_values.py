"""Pruning networks that read sizes and weights as values, against the user's module with zeroed channels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from channels_oracle import masked, prune_ours
from small_networks import made
from test_small_networks import SHAPE, eager
from torch import Tensor, nn

from modelopt_cli.program import InputSpec
from modelopt_cli.program.capture import capture
from modelopt_cli.program.channels import analyse

SIZES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a weight's size": lambda n, x: n.head(n.b(n.a(x)) * n.b.weight.shape[1] ** -0.5),
    "a head's size": lambda n, x: n.fc(n.b(n.a(x)).mean((2, 3)) * n.fc.weight.size(1) ** -0.5),
    "a weight's elements": lambda n, x: n.head(n.b(n.a(x)) / n.b.weight.numel() * 100),
    "a reshape to it": lambda n, x: n.head(n.b(n.a(x).reshape(-1, n.b.weight.size(1), 12, 12))),
    "elements over elements": lambda n, x: n.head(n.b(y := n.a(x)) * (y.numel() / x.numel())),
    "elements, of channels that stay": lambda n, x: n.head(n.b(n.c(y := n.a(x))) * (y.numel() / 1000)),
    "a range": lambda n, x: n.head(n.b((y := n.a(x)) + torch.arange(y.shape[1]).view(1, -1, 1, 1))),
}
WEIGHTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "transposed": lambda n, x: n.fc(F.linear(n.token(n.a(x).mean((2, 3))), n.token.weight.t())),
    "multiplied": lambda n, x: n.fc(n.token(n.a(x).mean((2, 3))) @ n.token.weight),
    "summed": lambda n, x: n.head(n.b(n.a(x)) + n.b.weight.sum((1, 2, 3)).view(1, -1, 1, 1)),
    "its norm": lambda n, x: n.head(n.b(n.a(x)) * n.b.weight.norm()),
    "the largest": lambda n, x: n.head(n.b(n.a(x)) * n.a.weight.abs().amax()),
    "a column": lambda n, x: n.fc(n.token(n.a(x).mean((2, 3))) + n.token.weight[:, 0]),
    "a line": lambda n, x: n.head(n.b(n.a(x)) + n.b.weight[0, :, 1, 1].view(1, 8, 1, 1)),
    "the elements of one": lambda n, x: n.head(n.b(n.a(x)) / n.b.weight[0].numel() ** 0.5),
    "a bias": lambda n, x: n.head(n.b(n.a(x)) + n.b.bias.view(-1, 1, 1)),
    "used twice by functions": lambda n, x: n.fc(
        F.linear(n.a(x).mean((2, 3)), n.token.weight).relu() + n.token.weight.abs().mean(0)
    ),
    "by einsum": lambda n, x: n.fc(torch.einsum("bi,oi->bo", n.token(n.a(x).mean((2, 3))), n.token.weight)),
    "in a sum of matrices": lambda n, x: n.fc(
        torch.addmm(n.token.bias, n.token(n.a(x).mean((2, 3))), n.token.weight.mT)
    ),
    "in a batch of them": lambda n, x: n.fc(
        torch.bmm(n.token(n.a(x).mean((2, 3)))[:, None], n.token.weight.expand(x.shape[0], 8, 8))[:, 0]
    ),
    "its square": lambda n, x: n.fc(n.token(n.a(x).mean((2, 3))) @ (n.token.weight @ n.token.weight.T)),
    "as a kernel": lambda n, x: n.head(F.conv2d(n.b(n.a(x)), n.b.weight, padding=1)),
    "as a turned kernel": lambda n, x: n.head(
        F.conv2d(n.b(n.a(x)), n.b.weight.transpose(0, 1).flip(2, 3), padding=1)
    ),
    "there and back": lambda n, x: n.head(F.conv_transpose2d(n.b(n.a(x)), n.b.weight, padding=1)),
    "another layer's kernel": lambda n, x: n.head(F.conv2d(n.b(n.a(x)), n.c.weight, n.c.bias, padding=1)),
    "a linear's as a kernel": lambda n, x: n.head(F.conv2d(n.a(x), n.token.weight[:, :, None, None])),
    "in halves": lambda n, x: n.fc(
        torch.cat([F.linear(n.a(x).mean((2, 3)), half) for half in n.token.weight.chunk(2)], 1)
    ),
    "a vector": lambda n, x: n.head(
        n.b(y := n.a(x)) * F.linear(y.mean((2, 3)), n.bn.weight).view(-1, 1, 1, 1)
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("forward", [*SIZES.values(), *WEIGHTS.values()], ids=[*SIZES, *WEIGHTS])
def test_sizes_and_weights_that_are_values_stay_as_they_were(
    forward: Callable[[Any, Tensor], Tensor],
) -> None:
    network = made(forward)
    pruned, found, keep = prune_ours(capture(network, InputSpec(SHAPE)), 0.5)
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(5))
    expected = masked(found, keep)
    assert not any(type(layer).__name__.startswith("_Masked") for layer in expected.modules())
    torch.testing.assert_close(pruned(x), eager(network, expected, x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["a weight's size", "a weight's elements", "a reshape to it", "a range"])
def test_a_size_that_is_read_keeps_no_channel(name: str) -> None:
    pruned, _, _ = prune_ours(capture(made(SIZES[name]), InputSpec(SHAPE)), 0.5)
    assert pruned.get_parameter("b.weight").shape[0] == 4


@torch.no_grad()
def test_a_layer_norm_over_the_shape_of_its_weight_is_over_what_is_left() -> None:
    network = made(
        lambda n, x: n.fc(F.layer_norm(n.token(n.a(x).mean((2, 3))), n.norm.weight.shape, n.norm.weight))
    )
    pruned, _, _ = prune_ours(capture(network, InputSpec(SHAPE)), 0.5)
    left = pruned.state_dict()
    x = torch.randn(3, *SHAPE)
    tokens = F.conv2d(x, left["a.weight"], left["a.bias"], padding=1).mean((2, 3))
    tokens = F.linear(tokens, left["token.weight"], left["token.bias"])
    normal = (tokens - tokens.mean(1, keepdim=True)) / (tokens.var(1, False, keepdim=True) + 1e-5).sqrt()
    expected = F.linear(normal * left["norm.weight"], left["fc.weight"], left["fc.bias"])
    assert tokens.shape == (3, 4)
    torch.testing.assert_close(pruned(x), expected, rtol=1e-4, atol=1e-5)


def normed(norm: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    return lambda n, x: n.fc(norm(n, n.token(n.a(x).mean((2, 3)))))


@torch.no_grad()
@pytest.mark.parametrize("eps", [None, 1e-5, 0.5])
@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm", "without bias"])
def test_a_norm_by_function_is_over_the_channels_that_are_left(norm: str, eps: float | None) -> None:
    """Torch's own function of the tokens that stay, and the dense network with statistics over those."""
    name, some = norm if norm != "without bias" else "layer_norm", {} if eps is None else {"eps": eps}
    call = getattr(F, name)

    def apply(n: Any, x: Tensor) -> Tensor:
        bias = [n.norm.bias] if norm == "layer_norm" else []
        result: Tensor = call(x, (8,), n.norm.weight, *bias, **some)
        return result

    network = made(normed(apply))
    nn.init.normal_(network.norm.weight)
    nn.init.normal_(network.norm.bias)
    pruned, found, keep = prune_ours(capture(network, InputSpec(SHAPE)), 0.5)
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(5))
    left = pruned.state_dict()
    tokens = F.conv2d(x, left["a.weight"], left["a.bias"], padding=1).mean((2, 3))
    tokens = F.linear(tokens, left["token.weight"], left["token.bias"])
    bias = [left["norm.bias"]] if norm == "layer_norm" else []
    expected = F.linear(
        call(tokens, (4,), left["norm.weight"], *bias, **some), left["fc.weight"], left["fc.bias"]
    )
    torch.testing.assert_close(pruned(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(masked(found, keep)(x), expected, rtol=1e-4, atol=1e-5)


def test_a_weight_read_outside_of_its_layer_is_named() -> None:
    found = analyse(capture(made(WEIGHTS["the largest"]), InputSpec(SHAPE)))
    assert found.frozen["a"] == "has a weight that is read outside of its layer"
    assert "b" in {group.name for group in found.groups}


class Tokens(nn.Module):
    """A network of tokens that does with its table of them whatever it is told."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.table, self.linear, self.norm = nn.Embedding(20, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.unembed, self.head, self.classes = (
            nn.Linear(8, 20, bias=False),
            nn.Linear(20, 5),
            nn.Linear(8, 5),
        )
        self.unembed.weight = self.table.weight
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


TOKENS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a head by function": lambda n, x: F.linear((y := n.table(x)) + n.linear(y), n.table.weight)[:, -1],
    "a head by product": lambda n, x: ((y := n.table(x)) + n.linear(y)) @ n.table.weight.t(),
    "a product with its norm": lambda n, x: n.classes(n.linear(n.table(x)) * n.table.weight.norm()),
    "a layer after it": lambda n, x: n.head(F.linear(n.linear(n.table(x)), n.table.weight)),
    "a tied layer": lambda n, x: n.head(n.unembed(n.linear(n.table(x)))),
    "functions alone": lambda n, x: n.head(
        F.linear(n.linear(F.embedding(x, n.table.weight)), n.table.weight)
    ),
    "a look-up by function": lambda n, x: n.head(n.unembed(n.linear(F.embedding(x, n.unembed.weight)))),
    "the first of it": lambda n, x: n.classes(n.linear(n.table(x) + n.table.weight[:6])),
    "its width": lambda n, x: n.classes(n.linear(n.table(x) * n.table.weight.shape[1] ** 0.5)),
    "a norm by function": lambda n, x: n.classes(n.linear(n.table(x)) * n.norm.weight + n.norm.bias.abs()),
}


@torch.no_grad()
@pytest.mark.parametrize("forward", TOKENS.values(), ids=TOKENS)
def test_a_table_of_tokens_keeps_its_rows(forward: Callable[[Any, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    network = Tokens(forward).eval()
    program = capture(network, InputSpec((6,), dtype="int64"))
    pruned, found, keep = prune_ours(program, 0.5)
    x = torch.randint(20, (3, 6), generator=torch.Generator().manual_seed(5))
    expected = eager(network, masked(found, keep), x)  # type: ignore[arg-type]
    torch.testing.assert_close(pruned(x), expected, rtol=1e-4, atol=1e-5)
    table = {**program.state_dict(), **pruned.state_dict()}
    assert all(len(tensor) == 20 for name, tensor in table.items() if name == "table.weight")
