"""Static int8 of residual streams: a value that float operations read is not rounded for them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from quantize_networks import Images, captured, count, quantized, sqnr
from torch import Tensor, nn

from modelopt_cli.methods.context import Context
from modelopt_cli.methods.quantize.apply import apply
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.program import Program

pytestmark = pytest.mark.usefixtures("one_thread")


class Tokens(nn.Module):
    """Tokens of a class and of an image in one stream, as in CoaT: a convolution and norms read it.

    The image's tokens are a hundred times as large as that of the class, which alone is classified.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.position = nn.Conv2d(3, 16, 4, 4), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(4))
        self.up = nn.ModuleList(nn.Linear(16, 32) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(32, 16) for _ in range(3))
        self.token, self.head = nn.Parameter(torch.randn(1, 1, 16)), nn.Linear(16, 5)

    def block(self, i: int, x: Tensor) -> Tensor:
        x = x + self.down[i](F.gelu(self.up[i](self.norms[i](x))))
        maps = x[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
        tokens = (maps + self.position(maps)).flatten(2).transpose(1, 2)
        return torch.cat([x[:, :1], tokens], 1)

    def forward(self, x: Tensor) -> Tensor:
        x = 100 * self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token + x.mean(1, keepdim=True) / 100, x], 1)
        for i in range(3):
            x = self.block(i, x)
        return self.head(self.norms[3](x)[:, 0])  # type: ignore[no-any-return]


class Stream(nn.Module):
    """Two blocks around norms; a convolution reads what they add up."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)
        self.body = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        for norm, linear in zip(self.norms, self.body, strict=True):
            x = x + linear(norm(x))
        y = self.conv(x.permute(0, 3, 1, 2)).mean((2, 3))
        return self.head(y * x.mean((1, 2)))  # type: ignore[no-any-return]


class Sums(nn.Module):
    """A stream that convolutions alone read, with activations, so that no addition joins one."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.convs[0](x))
        x = x + F.silu(self.convs[1](x))
        x = x + F.silu(self.convs[2](x))
        return self.convs[3](x)  # type: ignore[no-any-return]


def simple(model: nn.Module, seen: Tensor, x: Tensor) -> Tensor:
    """Outputs of plain torch: each layer's input rounded to 255 steps of its range, its weight to 7 bits."""
    model = copy.deepcopy(model)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    ranges: dict[int, list[float]] = {}

    def watch(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        low, high = ranges.get(id(layer), [0.0, 0.0])
        ranges[id(layer)] = [min(low, float(args[0].min())), max(high, float(args[0].max()))]

    def rounded(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        low, high = ranges[id(layer)]
        step = (high - low) / 255
        return (((args[0] / step).round() * step).clamp(low - step, high + step),)

    watching = [layer.register_forward_pre_hook(watch) for layer in layers]
    model(seen)
    for handle in watching:
        handle.remove()
    for layer in layers:
        steps = layer.weight.abs().flatten(1).amax(1).view(-1, *[1] * (layer.weight.dim() - 1)) / 63
        layer.weight.copy_((layer.weight / steps).round() * steps)
        layer.register_forward_pre_hook(rounded)
    return model(x)  # type: ignore[no-any-return]


def made(model: nn.Module) -> tuple[Program, Program, Tensor, Tensor]:
    """The network, its int8 form, what that was calibrated on and what to compare them on."""
    program = captured(model, 3, 16, 16)
    seen, x = torch.randn(2, 16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    int8 = apply(program, QuantizeConfig(), Context(data=Images(seen))).program  # type: ignore[arg-type]
    return program, int8, seen, x


@torch.no_grad()
def test_no_worse_than_rounding_what_the_layers_read() -> None:
    torch.manual_seed(0)
    model = Tokens()
    program, int8, seen, x = made(model)
    best = sqnr(model(x), simple(model, seen, x))
    assert best > 30  # what 8 bits can do here
    assert sqnr(program(x), int8(x)) > best - 2


@torch.no_grad()
def test_a_stream_that_norms_read_is_added_up_in_float() -> None:
    torch.manual_seed(0)
    _, int8, _, _ = made(Stream())
    assert count(int8, "QuantizedAdd") == 0
    assert count(int8, "Dequantize") == 0
    assert int8.get_submodule("stem").output is None


def test_a_stream_that_convolutions_alone_read_is_added_up_in_int8() -> None:
    torch.manual_seed(0)
    int8 = quantized(captured(Sums(), 3, 12, 12))
    assert (count(int8, "Quantize"), count(int8, "Dequantize"), count(int8, "QuantizedAdd")) == (1, 0, 2)
