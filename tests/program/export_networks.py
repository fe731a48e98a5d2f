"""Small networks with what fx cannot follow in their forward pass, each with one cause.

Not a test module, so that pytest leaves its assertions as they are.
"""

import functools
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

SHAPE = (3, 12, 12)
LOG = logging.getLogger("net")
Forward = Callable[[Any, Tensor], Tensor]


def network(forward: Forward, **layers: Any) -> nn.Module:
    """A module with a convolution and these layers, whose forward is the function of (self, x)."""
    torch.manual_seed(0)
    module: nn.Module = type("Net", (nn.Module,), {"forward": forward})()
    for name, layer in {"conv": nn.Conv2d(3, 4, 3), **layers}.items():
        setattr(module, name, layer)
    return module.eval()


def tensor(x: Any) -> Tensor:
    """What is given, if it is a tensor: nothing that stands for one."""
    if not isinstance(x, Tensor):
        raise TypeError(f"a {type(x).__name__}")
    return x


def two_sides(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    left, right = y[..., :5], y[..., 5:]
    left += 1
    right *= left.mean()
    return F.relu(y)


def read_before(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    view = y[:, 1]
    y[..., 0] = 5
    return y + view[:, None]


def made_apart(self: Any, x: Tensor) -> Tensor:
    offsets = torch.zeros(4)
    offsets[1] = x.mean()
    return self.conv(x) + offsets[:, None, None]  # type: ignore[no-any-return]


def two_layers(self: Any, x: Tensor) -> Tensor:
    assert not x.isnan().any()
    y = tensor(self.norm(self.conv(x)))
    y *= 2
    return self.head(y.relu_()).mean((2, 3))  # type: ignore[no-any-return]


def checked(self: Any, x: Tensor) -> Tensor:
    torch._assert(x.dim() == 4, "images, please")
    y = tensor(self.conv(x))
    if (y.abs() > 1e6).any():
        raise ValueError(f"too large: {y.abs().max()}")
    assert not y.isnan().any(), "NaN"
    return F.relu(y)


def logged(self: Any, x: Tensor) -> Tensor:
    features = tensor(self.conv(x))
    LOG.debug(f"mean {features.mean():.3f}, largest {features.max().item()}")
    return F.relu(features)


def remembered(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    if not hasattr(self, "table"):
        self.register_buffer("table", torch.arange(100.0).reshape(10, 10).sin(), persistent=False)
    self.last = tensor(y)
    return self.last + self.table  # type: ignore[no-any-return]


def counted(self: Any, x: Tensor) -> Tensor:
    self.calls += 1
    self.mean.copy_(x.mean())
    return tensor(self.conv(x)).relu()


def attended(self: Any, x: Tensor) -> Tensor:
    tokens = self.conv(x).flatten(2).transpose(1, 2)
    with torch.no_grad():
        mask = torch.ones(tensor(tokens).shape[1], tokens.shape[1], dtype=torch.bool).tril()
    with torch.autocast("cpu", enabled=False):
        out, weights = self.attention(tokens, tokens, tokens, attn_mask=~mask, need_weights=True)
    return self.head(out.mean(1)) + weights.amax()  # type: ignore[no-any-return]


def recurrent(self: Any, x: Tensor) -> Tensor:
    rows = self.conv(x).mean(2).transpose(1, 2)
    match rows:
        case Tensor():
            out, (hidden, _) = self.lstm(rows)
        case _:
            raise TypeError
    return self.head(out[:, -1] + hidden[-1])  # type: ignore[no-any-return]


def turned(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x).mean(3)
    y.unsqueeze_(1)
    y.transpose_(2, 3)
    return y * 2  # type: ignore[no-any-return]


def doubled(x: Tensor) -> Tensor:
    if x.dim() == 4:
        x = x * 2
    return x


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    scripted = torch.jit.script(doubled)


@functools.singledispatch
def scaled(x: Any) -> Any:
    """Scale whatever can be scaled."""
    raise TypeError(type(x))


@scaled.register
def _(x: Tensor) -> Tensor:
    return x * 0.5


def tensors_only(function: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse everything else."""

    @functools.wraps(function)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not all(isinstance(each, Tensor) for each in (*args, *kwargs.values())):
            raise TypeError("tensors only")
        return function(self, *args, **kwargs)

    return wrapped


@dataclass
class Features:
    """Feature maps between two parts of a network."""

    maps: list[Tensor]
    scale: float = 1.0

    def __post_init__(self) -> None:
        if any(not torch.is_tensor(each) for each in self.maps):
            raise TypeError("tensors only")


class Checking(nn.Conv2d):
    """Looks at what it is given, as library layers do."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve twice as much."""
        if type(x) is not Tensor and not isinstance(x, Tensor):
            raise TypeError("not a tensor")
        return super().forward(x) * 2


class Symmetric(nn.Module):
    """A parametrization of one's own."""

    def forward(self, weight: Tensor) -> Tensor:
        """Half of a weight and its mirror image."""
        return (weight + weight.flip(-1)) / 2


def hooked() -> nn.Module:
    """A convolution whose hook changes what it returns."""
    layer = nn.Conv2d(3, 4, 3)
    layer.register_forward_hook(lambda module, args, output: output.clamp(max=0.5))
    return layer


def parametrized() -> nn.Module:
    """A convolution with symmetric filters, which looks at its input."""
    return parametrize.register_parametrization(Checking(3, 4, 3), "weight", Symmetric())


def _counters() -> nn.Module:
    module = network(counted)
    module.register_buffer("calls", torch.tensor(0))
    module.register_buffer("mean", torch.tensor(0.0))
    return module


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "views that are written into": lambda: network(two_sides),
    "a view read after its base has changed": lambda: network(read_before),
    "a tensor made without the input": lambda: network(made_apart),
    "checks of values": lambda: network(checked),
    "logging of values": lambda: network(logged),
    "a cache of positions": lambda: network(remembered),
    "counters": _counters,
    "attention in a block without gradients": lambda: network(
        attended, attention=nn.MultiheadAttention(4, 2, batch_first=True), head=nn.Linear(4, 5)
    ),
    "a recurrent layer and a match": lambda: network(
        recurrent, lstm=nn.LSTM(4, 6, batch_first=True), head=nn.Linear(6, 5)
    ),
    "shapes changed in place": lambda: network(turned),
    "a scripted function": lambda: network(lambda self, x: scripted(self.conv(x))),
    "singledispatch": lambda: network(lambda self, x: scaled(self.conv(x))),
    "a wrapper that checks types": lambda: network(tensors_only(lambda self, x: self.conv(x).relu())),
    "a data class that checks types": lambda: network(
        lambda self, x: Features([self.conv(x)], 2.0).maps[0].relu()
    ),
    "an operator called by itself": lambda: network(
        lambda self, x: torch.ops.aten.leaky_relu(self.conv(x), 0.2)
    ),
    "a layer that checks its input": lambda: network(
        lambda self, x: self.conv(x).relu(), conv=Checking(3, 4, 3)
    ),
    "a parametrization": lambda: network(lambda self, x: self.conv(x).relu(), conv=parametrized()),
    "a hook": lambda: network(lambda self, x: self.conv(x).relu(), conv=hooked()),
}
"""Cause to a network that has it."""
