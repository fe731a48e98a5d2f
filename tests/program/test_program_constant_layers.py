"""Functions of weights that a network computes of its parameters become layers that compute the same."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelopt_cli.program import Encoding, InputSpec, Program
from modelopt_cli.program.capture import capture
from modelopt_cli.program.channels import layered
from modelopt_cli.program.constant_layers import constant_layers
from modelopt_cli.program.serialization import from_data, state_of, to_data


class Qkv(nn.Module):
    """Attention of BEiT: keys have no bias, and one of the layer's is left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24, bias=False), nn.Linear(8, 8)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        self.register_buffer("k_bias", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Standardized(nn.Conv2d):
    """A convolution whose weight is standardized (Qiao et al., 2019), called twice."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        for _ in range(2):
            x = F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return x


class Pool(nn.Module):
    """Attention pooling of CLIP's ResNets; its output has another width."""

    def __init__(self, masked: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.c = (nn.Linear(8, width) for width in (8, 8, 8, 5))
        self.place = nn.Parameter(torch.randn(10, 8))
        self.masked = masked

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(dim=0, keepdim=True), x]) + self.place[:, None]
        apart: dict[str, Any] = {f"{name}_proj_weight": getattr(self, name).weight for name in "qkv"}
        if self.masked:
            apart["key_padding_mask"] = x[..., 0].t() > 1
        y, _ = F.multi_head_attention_forward(
            *(x[:1], x, x, x.shape[-1], 2, None, torch.cat([self.q.bias, self.k.bias, self.v.bias])),
            *(None, None, False, 0.0, self.c.weight, self.c.bias),
            training=self.training,
            need_weights=False,
            use_separate_proj_weight=True,
            **apart,
        )
        return y[0]  # type: ignore[no-any-return]


class Packed(nn.Module):
    """The function with one weight for all three."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(8, 24, bias=False), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        given = (x, x, x, 8, 2, self.inner.weight, None, None, None, False, 0.0)
        y = F.multi_head_attention_forward(*given, self.out.weight, None, training=False, need_weights=False)
        return y[0].transpose(0, 1)  # type: ignore[no-any-return]


class Transposed(nn.Module):
    """Products with weights ``(in, out)``: that of GPT-2, with a bias, and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(6, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        up = torch.addmm(self.up.bias, x.view(-1, 8), self.up.weight)
        return up.view(x.shape) @ self.down.weight


class Dense(nn.Module):
    """A layer as one writes it by hand, ``x @ weight + bias``; its bias may be added on either side."""

    def __init__(self, inputs: int, outputs: int, *, before: bool = False) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(inputs, outputs)),
            nn.Parameter(torch.randn(outputs)),
        )
        self.before = before

    def forward(self, x: Tensor) -> Tensor:
        return self.bias + x @ self.weight if self.before else x @ self.weight + self.bias


def captured(model: nn.Module, *shape: int) -> Program:
    torch.manual_seed(0)
    return capture(model.double().eval(), InputSpec(shape), verify=False)


def layers(program: Program) -> dict[str, str]:
    calls = program.graph.find_nodes(op="call_module")
    return {str(node.target): type(program.get_submodule(str(node.target))).__name__ for node in calls}


CASES: dict[str, tuple[Any, tuple[int, ...], dict[str, str]]] = {
    "bias put together": (Qkv, (6, 8), {"qkv": "Linear", "proj": "Linear"}),
    "standardized": (lambda: nn.Sequential(Standardized(4, 4, 3)), (4, 9, 9), {"0": "Conv2d"}),
    "pooling": (Pool, (8, 3, 3), dict.fromkeys("qkvc", "Linear")),
    "masked pooling": (lambda: Pool(masked=True), (8, 3, 3), dict.fromkeys("qkvc", "Linear")),
    "transposed": (Transposed, (5, 8), {"up": "Linear", "down": "Linear"}),
    "by hand": (
        lambda: nn.Sequential(Dense(8, 6), nn.ReLU(), Dense(6, 4, before=True)),
        (5, 8),
        {"0": "Linear", "1": "ReLU", "2": "Linear"},
    ),
    "packed": (Packed, (6, 8), {"inner": "Linear", "out": "Linear"}),
}


@pytest.mark.parametrize("name", CASES)
def test_it_becomes_a_layer_that_computes_the_same(name: str) -> None:
    make, shape, expected = CASES[name]
    program = captured(make(), *shape)
    code = program.code
    made = layered(program)
    assert layers(made) == expected
    assert program.code == code
    assert "multi_head" not in made.code
    x = torch.randn(3, *shape, dtype=torch.float64)
    again = from_data(to_data(made), state_of(made))
    with torch.no_grad():
        torch.testing.assert_close(made(x), program(x), rtol=1e-12, atol=1e-12)
        assert torch.equal(again(x), made(x))
    assert layered(made).code == made.code


def test_a_transposed_product_is_the_networks_to_the_last_bit() -> None:
    torch.manual_seed(0)
    model, x = Transposed(), torch.randn(3, 5, 8)
    program = capture(model, InputSpec((5, 8)))
    assert torch.equal(program(x), model(x))
    assert program.state_dict().keys() == model.state_dict().keys()


def test_a_product_that_is_read_besides_keeps_its_addition() -> None:
    class Twice(Dense):
        def forward(self, x: Tensor) -> Tensor:
            y = x @ self.weight
            return y * (y + self.bias)

    program = captured(nn.Sequential(Twice(4, 4)), 4)
    assert constant_layers(program) is program


def test_nothing_to_do() -> None:
    program = captured(nn.Sequential(nn.Linear(4, 3)), 4)
    assert constant_layers(program) is program


@pytest.mark.parametrize("codec", ["sparse", "codebook"])
def test_a_weight_that_is_pruned_or_shared_is_not_computed(codec: str) -> None:
    program = captured(nn.Sequential(Standardized(4, 4, 3)), 4, 9, 9)
    program.encodings = {"0.weight": Encoding(codec)}
    assert constant_layers(program) is program
    plain = captured(Qkv(), 6, 8)
    plain.encodings = {"qkv.weight": Encoding(codec)}
    assert "qkv" in layers(constant_layers(plain))  # as it was, under the name it had


@pytest.mark.parametrize("way", ["weight", "two biases", "inputs", "inside"])
def test_what_something_else_needs_stays(way: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.more = nn.Linear(4, 4), nn.Parameter(torch.randn(4))
            self.fc.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = F.linear(x, self.fc.weight, self.fc.bias + self.more)
            if way == "weight":
                return y + self.fc.weight.sum() * x
            if way == "two biases":
                return y + F.linear(x, self.fc.weight, self.more)
            if way == "inputs":
                return F.linear(x, self.fc.weight * x.mean())
            return self.fc.inner(y)  # type: ignore[no-any-return, operator]

    program = captured(Net(), 4)
    assert constant_layers(program) is program
