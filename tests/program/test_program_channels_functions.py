"""Every function with a rule for channels, between two layers that have some: one word, one run.

Expected is the dense network with the removed channels zeroed where they are made and where they are read.
"""

import operator
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from channels_oracle import masked
from torch import Tensor, nn

from modelopt_cli.program import InputSpec
from modelopt_cli.program.calls import operation
from modelopt_cli.program.capture import capture
from modelopt_cli.program.channels import analyse, remove
from modelopt_cli.program.channels.function_rules import RULES

Call = Callable[[Any, Tensor], Any]
POOLS = " ".join(
    f"{s}{kind}_pool{d}d" for s in ("", "adaptive_") for kind in ("avg", "max") for d in (1, 2, 3)
)
CONVS = " ".join(f"conv{kind}{d}d" for kind in ("", "_transpose") for d in (1, 2, 3))


def each(names: str, make: Callable[[str], Call]) -> dict[str, Call]:
    return {name: make(name) for name in names.split()}


def of_rank(x: Tensor, name: str) -> Tensor:
    return {"1": x.flatten(2), "2": x, "3": x.unflatten(3, (2, 3))}[name[-2]]


def twice(name: str) -> Call:
    """Called with different options, a weight does not become a layer."""

    def call(n: Any, x: Tensor) -> Tensor:
        weight = getattr(n, name).weight
        function, x = getattr(F, name), of_rank(x, name)
        return function(x, weight) + function(x, weight, dilation=2)

    return call


def two_norms(function: Any, x: Tensor, *parameters: Tensor) -> Tensor:
    return function(x, (4,), *parameters, eps=1e-5) + function(x, (4,), *parameters, eps=1e-3)


def unpooled(name: str, x: Tensor) -> Tensor:
    values, places = getattr(F, name.replace("_un", "_"))(x, 2, return_indices=True)
    result: Tensor = getattr(F, name)(values * 2, places, 2, output_size=x.shape[2:])
    return result


def assigned(x: Tensor, index: Any, value: Any) -> Tensor:
    x = x + 0
    x[index] = value
    return x


def torchvisions(module: str, name: str) -> Any:
    return getattr(import_module(f"torchvision.{module}"), name)


# Calls on a feature map (N, 4, 6, 6) of values above 1, where a function wants more than that.
CALLS: dict[str, Call] = {
    "pos": lambda n, x: +x,
    "threshold": lambda n, x: F.threshold(x, 1.2, 7.0),
    "clamp": lambda n, x: x.clamp(1.1, 1.5),
    **each("clamp_min clamp_max", lambda name: lambda n, x: getattr(x, name)(1.2)),
    **each("add sub mul pow lt le eq ne gt ge", lambda name: lambda n, x: getattr(operator, name)(x, 1.3)),
    "div": lambda n, x: x / 1.3,
    "floor_divide": lambda n, x: x // 0.3,
    "remainder": lambda n, x: x % 0.3,
    **each(
        "fmod fmin fmax atan2 hypot logaddexp", lambda name: lambda n, x: getattr(torch, name)(x, x * 2 - 1.3)
    ),
    **each("addcmul addcdiv lerp", lambda name: lambda n, x: getattr(torch, name)(x, x * 2 - 1.3, x + 0.1)),
    **each("asin acos atanh logit", lambda name: lambda n, x: getattr(torch, name)(1 / (x + 0.1))),
    **each("minimum maximum", lambda name: lambda n, x: getattr(torch, name)(x, x * 2 - 1.3)),
    "and": lambda n, x: (x > 1.2) & (x < 1.4),
    "or": lambda n, x: (x > 1.2) | (x < 1.4),
    "xor": lambda n, x: (x > 1.2) ^ (x < 1.4),
    "invert": lambda n, x: ~(x > 1.2),
    **each("logical_and logical_or", lambda name: lambda n, x: getattr(torch, name)(x > 1.2, x < 1.4)),
    "logical_not": lambda n, x: torch.logical_not(x > 1.2),
    "where": lambda n, x: torch.where(x > 1.2, x, x * x),
    "masked_fill": lambda n, x: x.masked_fill(x > 1.2, 3.0),
    "contiguous": lambda n, x: x.contiguous(),
    **each("float half bfloat16 int long bool", lambda name: lambda n, x: getattr(x, name)()),
    "double": lambda n, x: x.float().double(),
    "to": lambda n, x: x.to(torch.float32),
    "type_as": lambda n, x: x.float().type_as(x),
    "reshape": lambda n, x: x.reshape(-1, 144),
    "flatten": lambda n, x: x.flatten(2),
    "unflatten": lambda n, x: x.unflatten(2, (2, 3)),
    "reshape_as": lambda n, x: x.flatten(2).reshape_as(x),
    "permute": lambda n, x: x.permute(0, 2, 3, 1),
    "transpose": lambda n, x: x.transpose(1, 3),
    "t": lambda n, x: x.mean((2, 3)).t().t(),
    "movedim": lambda n, x: x.movedim(1, 3),
    "squeeze": lambda n, x: x.amax(2, keepdim=True).squeeze(2),
    "unsqueeze": lambda n, x: x.unsqueeze(2),
    "expand": lambda n, x: x.amax(3, keepdim=True).expand(-1, -1, -1, 5),
    "expand_as": lambda n, x: x.amax(3, keepdim=True).expand_as(x),
    **each("repeat tile", lambda name: lambda n, x: getattr(x, name)(1, 1, 2, 1)),
    "repeat_interleave": lambda n, x: x.repeat_interleave(2, dim=2),
    "broadcast_to": lambda n, x: torch.broadcast_to(x.unsqueeze(4), (*x.shape, 2)),
    "chunk": lambda n, x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "split": lambda n, x: torch.cat(x.split([1, 3], 1)[::-1], 1),
    "tensor_split": lambda n, x: torch.cat(x.tensor_split(2, 1)[::-1], 1),
    "narrow": lambda n, x: x.narrow(1, 1, 3),
    "roll": lambda n, x: x.roll(1, 1),
    "flip": lambda n, x: x.flip(1),
    "select": lambda n, x: x.select(2, 1),
    "unbind": lambda n, x: torch.stack([row * 2 for row in x.unbind(2)], 2),
    "cat": lambda n, x: torch.cat([x, x * 2], 1),
    "stack": lambda n, x: torch.stack([x, x * 2], 2),
    "getitem": lambda n, x: x[:, 1:, ::2],
    "set_item": lambda n, x: assigned(assigned(x, (..., 0), 1.5), (slice(None), slice(None), 2), x[..., 1]),
    "fold": lambda n, x: sum(F.fold(F.unfold(x, s, stride=s), 6, s, stride=s) for s in (2, 3)),
    "unfold": lambda n, x: torch.cat([F.unfold(x, 2).flatten(1), x.unfold(2, 2, 2).flatten(1)], 1),
    "index_select": lambda n, x: x.index_select(2, torch.tensor([3, 1])),
    **each("sum mean prod amax amin std var logsumexp cumsum", lambda name: lambda n, x: getattr(x, name)(2)),
    **each("max min", lambda name: lambda n, x: getattr(x, name)(2).values),
    "argmax": lambda n, x: torch.cat([x.argmax(2), x.max(2).indices], 1),
    "argmin": lambda n, x: x.argmin(2),
    **each("var_mean std_mean", lambda name: lambda n, x: torch.cat(getattr(torch, name)(x, 2), 1)),
    "norm": lambda n, x: torch.norm(x, dim=2),
    "linalg.vector_norm": lambda n, x: torch.linalg.vector_norm(x, dim=2),
    **each("softmax log_softmax softmin normalize", lambda name: lambda n, x: getattr(F, name)(x, dim=2)),
    **each(POOLS, lambda name: lambda n, x: getattr(F, name)(of_rank(x, name), 2)),
    **each("lp_pool1d lp_pool2d", lambda name: lambda n, x: getattr(F, name)(of_rank(x, name), 2.0, 2)),
    **each(
        "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices",
        lambda name: lambda n, x: torch.cat(getattr(F, name)(of_rank(x, name[:10]), 2), 1),
    ),
    **each(
        "max_unpool1d max_unpool2d max_unpool3d", lambda name: lambda n, x: unpooled(name, of_rank(x, name))
    ),
    "interpolate": lambda n, x: F.interpolate(x, scale_factor=2.0),
    "pad": lambda n, x: F.pad(x, (1, 1), value=2.0),
    "getattr": lambda n, x: x.mean((2, 3)).T.T,
    **each("zeros_like ones_like", lambda name: lambda n, x: x + getattr(torch, name)(x)),
    "full_like": lambda n, x: x + torch.full_like(x, 3.0),
    **each("new_zeros new_ones", lambda name: lambda n, x: x + getattr(x, name)((6, 6))),
    "new_full": lambda n, x: x + x.new_full((6, 6), 3.0),
    "size": lambda n, x: x.reshape(x.size(0), -1),
    "numel": lambda n, x: x / x[0, 0].numel(),
    "pixel_shuffle": lambda n, x: F.pixel_shuffle(x.repeat_interleave(4, dim=1), 2),
    "pixel_unshuffle": lambda n, x: F.pixel_unshuffle(x, 2),
    "channel_shuffle": lambda n, x: torch.channel_shuffle(x, 2),
    "glu": lambda n, x: F.glu(x, 1),
    "einsum": lambda n, x: torch.einsum("nchw,nchv->ncwv", x, x),
    "matmul": lambda n, x: x @ x.transpose(2, 3),
    "bmm": lambda n, x: torch.bmm((x - 1).flatten(2).transpose(1, 2), (x - 1).flatten(2)),
    "addmm": lambda n, x: torch.addmm(n.five, x.mean((2, 3)), n.matrix),
    "baddbmm": lambda n, x: torch.baddbmm(n.square, (x - 1).amax(2).transpose(1, 2), (x - 1).amax(3)),
    "mm": lambda n, x: torch.mm(x.mean((2, 3)), n.matrix),
    "scaled_dot_product_attention": lambda n, x: F.scaled_dot_product_attention(x, x, x * 2),
    **each(CONVS, twice),
    "linear": lambda n, x: sum(
        F.linear(x.transpose(1, 3), n.own.weight, bias) for bias in (n.own.bias, None)
    ),
    "embedding": lambda n, x: F.embedding((x > 1.2).long(), n.matrix),
    "prelu": lambda n, x: F.prelu(x - 1.2, n.scale),
    "batch_norm": lambda n, x: F.batch_norm(
        x, n.norm.running_mean, n.norm.running_var, n.norm.weight, n.norm.bias
    ),
    "instance_norm": lambda n, x: F.instance_norm(x, None, None, n.norm.weight, n.norm.bias),
    "group_norm": lambda n, x: sum(
        F.group_norm(x, 4, n.norm.weight, n.norm.bias, eps) for eps in (1e-5, 1e-3)
    ),
    "layer_norm": lambda n, x: two_norms(F.layer_norm, x.transpose(1, 3), n.norm.weight, n.norm.bias),
    "rms_norm": lambda n, x: two_norms(F.rms_norm, x.transpose(1, 3), n.norm.weight),
    "_patch_merging_pad": lambda n, x: torchvisions("models.swin_transformer", "_patch_merging_pad")(
        x.transpose(1, 3)
    ),
    "_get_relative_position_bias": lambda n, x: (
        x + torchvisions("models.swin_transformer", "_get_relative_position_bias")(n.table, n.places, [2, 3])
    ),
    # Always on: a call that is switched off becomes a layer.
    **each(
        "dropout dropout2d dropout3d alpha_dropout feature_alpha_dropout",
        lambda name: lambda n, x: getattr(F, name)(x, 0.5, True),
    ),
    "dropout1d": lambda n, x: F.dropout1d(x.flatten(2), 0.5, True),
    "stochastic_depth": lambda n, x: torchvisions("ops.stochastic_depth", "stochastic_depth")(x, 0.5, "row"),
    "drop_block2d": lambda n, x: torchvisions("ops.drop_block", "drop_block2d")(x, 0.5, 3),
    "drop_block3d": lambda n, x: torchvisions("ops.drop_block", "drop_block3d")(x.unsqueeze(2), 0.5, 1),
}
RANDOM = {name for name in RULES if name.startswith(("drop", "alpha_drop", "feature_alpha", "stochastic"))}
OVER_CHANNELS = {"layer_norm", "rms_norm"}  # their statistics are those of the channels that are left


class Own(nn.Module):
    """Parameters of the user's own, by name."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.rand(shape) + 0.5))


class Between(nn.Module):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self.before = nn.Conv2d(3, 4, 1)
        self.call = call
        self.own = Own(weight=(5, 4), bias=(5,))
        self.norm = Own(weight=(4,), bias=(4,), running_mean=(4,), running_var=(4,))
        self.odd = Own(weight=(4,), mean=(4,), var=(4,))
        for name in CONVS.split():
            channels = (4, 5) if "transpose" in name else (5, 4)
            setattr(self, name, Own(weight=(*channels, *[1] * int(name[-2]))))
        self.matrix, self.scale = nn.Parameter(torch.rand(4, 5)), nn.Parameter(torch.rand(4))
        self.square = nn.Parameter(torch.rand(6, 6))
        self.five = nn.Parameter(torch.rand(5))
        self.table = nn.Parameter(torch.rand(15, 4))
        self.register_buffer("places", torch.arange(36) % 15)
        self.double()
        self.after = nn.Identity()
        with torch.no_grad():
            width = self(sample()).shape[1]
        self.after = nn.Linear(width, 4).double()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        y = self.call(self, self.before(x).abs() + 1)
        return self.after(y.flatten(1).double() * 1.0)


def sample() -> Tensor:
    return torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def call_of(name: str) -> Call:
    function = getattr(torch, name, None) or getattr(F, name, None)
    return CALLS.get(name) or (lambda n, x: function(x))


@pytest.mark.parametrize("name", RULES)
def test_without_some_channels_it_computes_the_zeroed_network(name: str) -> None:
    torch.manual_seed(0)
    net = Between(call_of(name))
    program = capture(net, InputSpec((3, 6, 6)), verify=False)
    assert name in {operation(node) for node in program.graph.nodes}
    found = analyse(program)
    assert found.groups
    keep = {g.name: list(range(g.units))[: max(g.units // 2 // g.step, 1) * g.step] for g in found.groups}
    smaller = remove(program, keep, dependencies=found)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in program.parameters())
    with torch.no_grad():
        if name in RANDOM | OVER_CHANNELS:
            assert smaller(sample()).isfinite().all()
            return
        torch.testing.assert_close(smaller(sample()), masked(found, keep)(sample()), rtol=1e-10, atol=1e-10)


def test_a_norm_whose_statistics_have_other_names_keeps_its_channels() -> None:
    net = Between(lambda n, x: F.batch_norm(x, n.odd.mean, n.odd.var, n.odd.weight))
    found = analyse(capture(net, InputSpec((3, 6, 6)), verify=False))
    assert "batch_norm" in found.frozen["before"]
