"""Small networks, each around one thing that channel pruning has to follow."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Net(nn.Module):
    """Layers by name and a forward pass as a function of the network and its input."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


@dataclass(frozen=True)
class Case:
    """A network, its input, and by hand: units of each group, and layers that cannot lose channels."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    groups: dict[str, int]
    frozen: dict[str, str] = field(default_factory=dict)


def conv(i: int, o: int, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, 3, padding=1, **more)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def head(x: Tensor, net: Any) -> Tensor:
    """Global average and the classifier."""
    return net.fc(x.mean((2, 3)))


OUT = {"fc": "feeds the network's output"}
IMAGE = (3, 8, 8)


def _residual(n: Any, x: Tensor) -> Tensor:
    x = F.relu(n.bn(n.a(x)))
    return head(F.relu(n.c(F.relu(n.b(x))) + x), n)


def _excitation(n: Any, x: Tensor) -> Tensor:
    x = n.a(x)
    return head(x * torch.sigmoid(n.up(F.relu(n.down(x.mean((2, 3), keepdim=True))))), n)


def _dense(n: Any, x: Tensor) -> Tensor:
    a = F.relu(n.a(x))
    b = F.relu(n.b(a))
    return head(n.c(torch.cat([a, b], 1)), n)


def _shuffle(n: Any, x: Tensor) -> Tensor:
    x = torch.cat([n.a(x), n.b(x)], 1)
    batch, channels, h, w = x.shape
    x = x.view(batch, 2, channels // 2, h, w).transpose(1, 2).contiguous().view(batch, channels, h, w)
    left, right = x.chunk(2, 1)
    return head(torch.cat([left, n.c(right)], 1), n)


def _heads(n: Any, x: Tensor) -> Tensor:
    q, k, v = (layer(x).view(x.size(0), -1, 3, 4).transpose(1, 2) for layer in (n.q, n.k, n.v))
    weights = (q @ k.transpose(-2, -1) / 4**0.5).softmax(-1)
    return n.fc(n.o((weights @ v).transpose(1, 2).reshape(x.size(0), -1, 12)).mean(1))


def _sdpa(n: Any, x: Tensor) -> Tensor:
    qkv = n.qkv(x).reshape(x.shape[0], x.shape[1], 3, 3, 4).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
    return n.fc(n.o(y.transpose(1, 2).flatten(2)).mean(1))


def _one_head(n: Any, x: Tensor) -> Tensor:
    q, k, v = n.q(x), n.k(x), n.v(x)
    return n.fc(n.o(F.scaled_dot_product_attention(q, k, v)).mean(1))


def _symbolic_scale(n: Any, x: Tensor) -> Tensor:
    q, k, v = n.q(x), n.k(x), n.v(x)
    weights = (torch.bmm(q, k.transpose(1, 2)) * q.size(-1) ** -0.5).softmax(-1)
    return n.fc(n.o(torch.bmm(weights, v)).mean(1))


def _einsum(n: Any, x: Tensor) -> Tensor:
    q, k, v = (part.unflatten(-1, (3, 4)) for part in n.qkv(x).chunk(3, -1))
    weights = torch.einsum("b i h d, b j h d -> b h i j", q, k).softmax(-1)
    return n.fc(n.o(torch.einsum("bhij,bjhd->bihd", weights, v).reshape(x.shape[0], -1, 12)).mean(1))


def _tokens(n: Any, x: Tensor) -> Tensor:
    x = n.patch(x).flatten(2).transpose(1, 2)
    x = torch.cat([n.cls.expand(x.shape[0], -1, -1), x], 1) + n.pos
    x = x + n.scale * n.down(F.gelu(n.up(x)))
    return n.fc(x[:, 0])


def _twice(n: Any, x: Tensor) -> Tensor:
    x = n.a(x)
    return head(n.b(F.relu(n.b(F.relu(x)))), n)


def _spatial_gate(n: Any, x: Tensor) -> Tensor:
    x = n.a(x)
    return head(x * torch.sigmoid(n.gate(x)), n)


def _shortcut_a(n: Any, x: Tensor) -> Tensor:
    x = F.relu(n.a(x))
    y = n.b(x)
    return head(y + F.pad(x, (0, 0, 0, 0, 1, 2)), n)


def _decoder(n: Any, x: Tensor) -> Tensor:
    x = n.lin(x).view(-1, 5, 2, 2)
    return head(n.b(F.relu(n.a(x))), n)


def _glu(n: Any, x: Tensor) -> Tensor:
    return head(F.glu(n.a(x), 1), n)


def _slices(n: Any, x: Tensor) -> Tensor:
    x = n.a(x)
    return head(torch.cat([n.b(x[:, :3]), n.c(x[:, 3:]), n.d(x[:, ::2]), n.e(x[:, 1:2])], 1), n)


def _literal(n: Any, x: Tensor) -> Tensor:
    return n.fc(F.relu(n.lin(F.max_pool2d(n.a(x), 2).view(-1, 6 * 4 * 4))))


def _windows(n: Any, x: Tensor) -> Tensor:
    x = n.a(x).permute(0, 2, 3, 1).reshape(-1, 2, 4, 2, 4, 6)
    x = n.lin(x.permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, 6)).view(-1, 2, 2, 4, 4, 5)
    return n.fc(x.permute(0, 1, 3, 2, 4, 5).reshape(-1, 8, 8, 5).mean((1, 2)))


def _table(n: Any, x: Tensor) -> Tensor:
    q, k, v = (layer(x).unflatten(-1, (3, 4)).transpose(1, 2) for layer in (n.q, n.k, n.v))
    bias = n.table[n.places.view(-1)].view(5, 5, -1).permute(2, 0, 1)
    y = (q @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(-1) @ v
    return n.fc(n.o(y.transpose(1, 2).flatten(2)).mean(1))


def _split(n: Any, x: Tensor) -> Tensor:
    a, b, c = n.a(x).split([1, 2, 3], dim=1)
    return head(torch.cat([n.b(torch.cat([a, c], 1)), b.narrow(1, 0, 2)], 1), n)


def _narrow(n: Any, x: Tensor) -> Tensor:
    x = n.a(x)
    return head(torch.cat([torch.narrow(x, 1, 1, 3), x.narrow(1, -2, 2)], 1), n)


def _moved_about(n: Any, x: Tensor) -> Tensor:
    x = torch.roll(n.a(x), 1, 1)
    return head(n.b(x.flip(1)) + n.c(x[:, [5, 0, 1, 4, 3, 2]]), n)


def _stacked(n: Any, x: Tensor) -> Tensor:
    return head(torch.stack([n.a(x), n.b(x)], 1).sum(1), n)


def _selective_kernel(n: Any, x: Tensor) -> Tensor:
    """Li et al., CVPR 2019: two branches weighed by a softmax over the branches."""
    both = torch.stack([n.a(x), n.b(x)], 1)
    weights = n.up(F.relu(n.down(both.sum(1).mean((2, 3))))).view(-1, 2, 6).softmax(1)
    return head((both * weights[..., None, None]).sum(1), n)


def _repeated(n: Any, x: Tensor) -> Tensor:
    return head(n.b(torch.repeat_interleave(n.a(x), 2, 1)) + n.c(n.a(x).repeat(1, 2, 1, 1)), n)


def _by_weights(n: Any, x: Tensor) -> Tensor:
    x = torch.relu(x @ n.first)
    return n.fc(torch.matmul(x, n.second))


def _embedded(n: Any, x: Tensor) -> Tensor:
    x = n.words((x * 9).abs().clamp(max=9).long()) + n.positions
    return n.fc((x + n.down(F.silu(n.gate(x)) * n.up(x))).mean(1))


def _normalised(n: Any, x: Tensor) -> Tensor:
    q, k, v = (layer(x).unflatten(-1, (3, 4)).transpose(1, 2) for layer in (n.q, n.k, n.v))
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    y = (scores * n.tau.clamp(max=2.0).exp()).softmax(-1) @ v
    return n.fc(n.o(y.transpose(1, 2).flatten(2)).mean(1))


def _patches(n: Any, x: Tensor) -> Tensor:
    x = n.a(x)
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 3, 5, 1)
    return n.fc(n.lin(x.reshape(batch, (height // 2) * (width // 2), 4 * channels)).mean(1))


def _standardized(n: Any, x: Tensor) -> Tensor:
    """Qiao et al. 2019: weights are standardized at every call."""
    weight = n.a.weight - n.a.weight.mean((1, 2, 3), keepdim=True)
    weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
    return head(n.b(F.relu(F.conv2d(x, weight, n.a.bias, padding=1))), n)


def _blurred(n: Any, x: Tensor) -> Tensor:
    """Zhang, ICML 2019: a fixed filter for every channel."""
    x = F.pad(F.relu(n.a(x)), (1, 1, 1, 1), mode="reflect")
    return head(n.b(F.conv2d(x, n.blur, stride=2, groups=x.shape[1])), n)


def _unpooled(n: Any, x: Tensor) -> Tensor:
    """Badrinarayanan et al., TPAMI 2017: values return to the places of their maxima."""
    x, places = n.pool(n.a(x))
    return head(n.c(n.unpool(n.b(x), places)), n)


def _u_net(n: Any, x: Tensor) -> Tensor:
    a = F.relu(n.a(x))
    b = F.interpolate(n.b(F.max_pool2d(a, 2)), size=a.shape[2:], mode="bilinear")
    return head(n.c(torch.cat([a, b], dim=1)), n)


def _with_places(net: Net) -> Net:
    net.register_buffer("places", torch.arange(25).view(5, 5) % 9)
    return net


def _seq(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


def _qkvo(**more: Any) -> dict[str, Any]:
    return {
        **{name: nn.Linear(7, 12) for name in "qkv"},
        "o": nn.Linear(12, 6),
        "fc": nn.Linear(6, 4),
        **more,
    }


def _pooled(*layers: nn.Module, width: int) -> nn.Module:
    return _seq(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))


_Q = {"q": 3, "o": 6}
_TEXT = (5, 7)
LAST = "feeds the network's output"

CASES: dict[str, Case] = {
    "residual": Case(
        lambda: Net(
            _residual, a=conv(3, 6), bn=nn.BatchNorm2d(6), b=conv(6, 5), c=conv(5, 6), fc=nn.Linear(6, 4)
        ),
        IMAGE,
        {"a": 6, "b": 5},
        OUT,
    ),
    "squeeze and excitation": Case(
        lambda: Net(
            _excitation, a=conv(3, 6), down=nn.Conv2d(6, 2, 1), up=nn.Conv2d(2, 6, 1), fc=nn.Linear(6, 4)
        ),
        IMAGE,
        {"a": 6, "down": 2},
        OUT,
    ),
    "concatenation": Case(
        lambda: Net(_dense, a=conv(3, 4), b=conv(4, 3), c=conv(7, 5), fc=nn.Linear(5, 4)),
        IMAGE,
        {"a": 4, "b": 3, "c": 5},
        OUT,
    ),
    "channel shuffle and chunk": Case(
        lambda: Net(_shuffle, a=conv(3, 4), b=conv(3, 4), c=conv(4, 5), fc=nn.Linear(9, 4)),
        IMAGE,
        {"a": 3, "b": 4, "c": 5},  # a2 is spared: c reads two of each
        OUT,
    ),
    "depthwise": Case(
        lambda: _pooled(conv(3, 6), conv(6, 6, groups=6), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1), width=5),
        IMAGE,
        {"0": 6, "3": 5},
        {"6": LAST},
    ),
    "depthwise with a multiplier": Case(
        lambda: _pooled(conv(3, 4), conv(4, 8, groups=4), width=8), IMAGE, {"0": 4}, {"4": LAST}
    ),
    "grouped": Case(
        lambda: _pooled(conv(3, 6), conv(6, 8, groups=2), conv(8, 5), width=5),
        IMAGE,
        {"0": 3, "1": 4, "2": 5},
        {"5": LAST},
    ),
    "transposed": Case(
        lambda: _pooled(
            nn.ConvTranspose2d(3, 6, 2, 2), nn.ConvTranspose2d(6, 8, 2, groups=2), conv(8, 5), width=5
        ),
        IMAGE,
        {"0": 3, "1": 4, "2": 5},
        {"5": LAST},
    ),
    "transposed depthwise": Case(
        lambda: _pooled(conv(3, 6), nn.ConvTranspose2d(6, 6, 2, 2, groups=6), width=6),
        IMAGE,
        {"0": 6},
        {"4": LAST},
    ),
    "group norm": Case(
        lambda: _pooled(conv(3, 6), nn.GroupNorm(6, 6), conv(6, 4), width=4),
        IMAGE,
        {"0": 6, "2": 4},
        {"5": LAST},
    ),
    "instance norm and PReLU": Case(
        lambda: _pooled(conv(3, 6), nn.InstanceNorm2d(6, affine=True), nn.PReLU(6), nn.Dropout2d(), width=6),
        IMAGE,
        {"0": 6},
        {"6": LAST},
    ),
    "flatten": Case(
        lambda: _seq(conv(3, 6), nn.ReLU(), nn.Flatten(), nn.Linear(384, 7), nn.Linear(7, 4)),
        IMAGE,
        {"0": 6, "3": 7},
        {"4": LAST},
    ),
    "a literal view": Case(
        lambda: Net(_literal, a=conv(3, 6), lin=nn.Linear(96, 7), fc=nn.Linear(7, 4)),
        IMAGE,
        {"a": 6, "lin": 7},
        OUT,
    ),
    "views into windows": Case(
        lambda: Net(_windows, a=conv(3, 6), lin=nn.Linear(6, 5), fc=nn.Linear(5, 4)),
        IMAGE,
        {"a": 6, "lin": 5},
        OUT,
    ),
    "unflatten": Case(
        lambda: _pooled(nn.Linear(7, 20), nn.Unflatten(1, (5, 2, 2)), conv(5, 6), width=6),
        (7,),
        {"0": 5, "2": 6},
        {"5": LAST},
    ),
    "a decoder": Case(
        lambda: Net(
            _decoder, lin=nn.Linear(7, 20), a=nn.ConvTranspose2d(5, 6, 2, 2), b=conv(6, 3), fc=nn.Linear(3, 4)
        ),
        (7,),
        {"lin": 5, "a": 6, "b": 3},
        OUT,
    ),
    "pixel shuffle and back": Case(
        lambda: _pooled(conv(3, 12), nn.PixelShuffle(2), nn.PixelUnshuffle(2), conv(12, 5), width=5),
        IMAGE,
        {"0": 3, "3": 5},
        {"6": LAST},
    ),
    "a channel shuffle layer": Case(
        lambda: _pooled(conv(3, 6), nn.ChannelShuffle(2), conv(6, 4), width=4),
        IMAGE,
        {"0": 6, "2": 4},
        {"5": LAST},
    ),
    "gated linear unit": Case(lambda: Net(_glu, a=conv(3, 8), fc=nn.Linear(4, 4)), IMAGE, {"a": 4}, OUT),
    "slices": Case(
        lambda: Net(
            _slices, a=conv(3, 6), b=conv(3, 2), c=conv(3, 2), d=conv(3, 2), e=conv(1, 2), fc=nn.Linear(8, 4)
        ),
        IMAGE,
        {"a": 3, "b": 2, "c": 2, "d": 2, "e": 2},  # a1 is all e reads; a0 and a3 are spared for b, d and c
        OUT,
    ),
    "padding with channels": Case(
        lambda: Net(_shortcut_a, a=conv(3, 4), b=conv(4, 7), fc=nn.Linear(7, 4)),
        IMAGE,
        {"a": 4, "b": 3},
        OUT,
    ),
    "a layer called twice": Case(
        lambda: Net(_twice, a=conv(3, 6), b=conv(6, 6), fc=nn.Linear(6, 4)), IMAGE, {"a": 6}, OUT
    ),
    "a spatial gate": Case(
        lambda: Net(_spatial_gate, a=conv(3, 6), gate=conv(6, 1), fc=nn.Linear(6, 4)),
        IMAGE,
        {"a": 6},
        OUT | {"gate": "is spread over other channels"},
    ),
    "class token, positions, layer scale": Case(
        lambda: Net(
            _tokens,
            patch=nn.Conv2d(3, 6, 4, 4),
            cls=parameter(1, 1, 6),
            pos=parameter(1, 5, 6),
            scale=parameter(6),
            up=nn.Linear(6, 8),
            down=nn.Linear(8, 6),
            fc=nn.Linear(6, 4),
        ),
        IMAGE,
        {"patch": 6, "up": 8},
        OUT,
    ),
    "heads by matmul": Case(lambda: Net(_heads, **_qkvo()), _TEXT, _Q, OUT),
    "heads by einsum": Case(
        lambda: Net(_einsum, qkv=nn.Linear(7, 36), o=nn.Linear(12, 6), fc=nn.Linear(6, 4)),
        _TEXT,
        {"qkv": 3, "o": 6},
        OUT,
    ),
    "heads by one projection": Case(
        lambda: Net(_sdpa, qkv=nn.Linear(7, 36), o=nn.Linear(12, 6), fc=nn.Linear(6, 4)),
        _TEXT,
        {"qkv": 3, "o": 6},
        OUT,
    ),
    "a position bias per head": Case(
        lambda: _with_places(Net(_table, table=parameter(9, 3), **_qkvo())), _TEXT, _Q, OUT
    ),
    "a single head": Case(
        lambda: Net(_one_head, **_qkvo(v=nn.Linear(7, 12))), _TEXT, {"q": 12, "v": 12, "o": 6}, OUT
    ),
    "a scale from a size": Case(
        lambda: Net(_symbolic_scale, **_qkvo()), _TEXT, {"q": 12, "v": 12, "o": 6}, OUT
    ),
    "one dimension": Case(
        lambda: _seq(
            nn.Conv1d(3, 6, 3),
            nn.BatchNorm1d(6),
            nn.MaxPool1d(2),
            nn.ConvTranspose1d(6, 5, 2),
            nn.Flatten(),
            nn.Linear(20, 4),
        ),
        (3, 8),
        {"0": 6, "3": 5},
        {"5": LAST},
    ),
    "three dimensions": Case(
        lambda: _seq(nn.Conv3d(2, 6, 3), nn.BatchNorm3d(6), nn.AvgPool3d(2), nn.Flatten(), nn.Linear(6, 4)),
        (2, 4, 4, 4),
        {"0": 6},
        {"4": LAST},
    ),
    "split": Case(
        lambda: Net(_split, a=conv(3, 6), b=conv(4, 2), fc=nn.Linear(4, 4)),
        IMAGE,
        {"a": 5, "b": 2},
        OUT,  # without the part of one
    ),
    "narrow": Case(lambda: Net(_narrow, a=conv(3, 6), fc=nn.Linear(5, 4)), IMAGE, {"a": 5}, OUT),
    "roll, flip, reorder": Case(
        lambda: Net(_moved_about, a=conv(3, 6), b=conv(6, 5), c=conv(6, 5), fc=nn.Linear(5, 4)),
        IMAGE,
        {"a": 6, "b": 5},
        OUT,
    ),
    "a sum of a stack": Case(
        lambda: Net(_stacked, a=conv(3, 6), b=conv(3, 6), fc=nn.Linear(6, 4)), IMAGE, {"a": 6}, OUT
    ),
    "selective kernels": Case(
        lambda: Net(
            _selective_kernel,
            a=conv(3, 6),
            b=conv(3, 6),
            down=nn.Linear(6, 3),
            up=nn.Linear(3, 12),
            fc=nn.Linear(6, 4),
        ),
        IMAGE,
        {"a": 6, "down": 3},
        OUT,
    ),
    "repeated channels": Case(
        lambda: Net(_repeated, a=conv(3, 4), b=conv(8, 5), c=conv(8, 5), fc=nn.Linear(5, 4)),
        IMAGE,
        {"a": 4, "b": 5},
        OUT,
    ),
    "bare weights": Case(
        lambda: Net(_by_weights, first=parameter(7, 6), second=parameter(6, 5), fc=nn.Linear(5, 4)),
        (7,),
        {"first": 6, "second": 5},
        OUT,
    ),
    "an embedding and a gated MLP": Case(
        lambda: Net(
            _embedded,
            words=nn.Embedding(10, 6),
            positions=parameter(5, 6),
            gate=nn.Linear(6, 8),
            up=nn.Linear(6, 8),
            down=nn.Linear(8, 6),
            fc=nn.Linear(6, 4),
        ),
        (5,),
        {"words": 6, "gate": 8},
        OUT,
    ),
    "cosine attention": Case(lambda: Net(_normalised, tau=parameter(3, 1, 1), **_qkvo()), _TEXT, _Q, OUT),
    "patches": Case(
        lambda: Net(_patches, a=conv(3, 6), lin=nn.Linear(24, 5), fc=nn.Linear(5, 4)),
        IMAGE,
        {"a": 6, "lin": 5},
        OUT,
    ),
    "standardized weights": Case(
        lambda: Net(_standardized, a=conv(3, 6), b=conv(6, 5), fc=nn.Linear(5, 4)),
        IMAGE,
        {"a": 6, "b": 5},
        OUT,
    ),
    "a fixed blur": Case(
        lambda: Net(_blurred, a=conv(3, 6), b=conv(6, 5), blur=parameter(6, 1, 3, 3), fc=nn.Linear(5, 4)),
        IMAGE,
        {"a": 6, "b": 5},
        OUT,
    ),
    "unpooling": Case(
        lambda: Net(
            _unpooled,
            a=conv(3, 6),
            b=conv(6, 6),
            c=conv(6, 5),
            pool=nn.MaxPool2d(2, return_indices=True),
            unpool=nn.MaxUnpool2d(2),
            fc=nn.Linear(5, 4),
        ),
        IMAGE,
        {"a": 6, "c": 5},
        OUT,
    ),
    "a U-Net's skip": Case(
        lambda: Net(_u_net, a=conv(3, 5), b=conv(5, 4), c=conv(9, 6), fc=nn.Linear(6, 4)),
        IMAGE,
        {"a": 5, "b": 4, "c": 6},
        OUT,
    ),
    "unfold and fold": Case(
        lambda: _pooled(conv(3, 4), nn.Unfold(2, stride=2), nn.Fold(8, 2, stride=2), conv(4, 5), width=5),
        IMAGE,
        {"0": 4, "3": 5},
        {"6": LAST},
    ),
}
"""Networks that lose channels without any change to what the others compute."""

FROZEN: dict[str, Case] = {
    "a mean over channels": Case(
        lambda: Net(lambda n, x: n.fc(n.a(x).mean(1).flatten(1)), a=conv(3, 6), fc=nn.Linear(64, 4)),
        IMAGE,
        {},
        OUT | {"a": "goes through mean over channels"},
    ),
    "a softmax over channels": Case(
        lambda: Net(lambda n, x: head(n.a(x).softmax(1), n), a=conv(3, 6), fc=nn.Linear(6, 4)),
        IMAGE,
        {},
        OUT | {"a": "goes through softmax over channels"},
    ),
    "local response norm": Case(
        lambda: _pooled(conv(3, 6), nn.LocalResponseNorm(3), width=6),
        IMAGE,
        {},
        {"0": "is mixed by 1", "4": LAST},
    ),
    "an unknown function": Case(
        lambda: Net(lambda n, x: head(torch.tril(n.a(x)), n), a=conv(3, 6), fc=nn.Linear(6, 4)),
        IMAGE,
        {},
        OUT | {"a": "goes through tril"},
    ),
    "the image added": Case(
        lambda: Net(lambda n, x: head(n.a(x) + x, n), a=conv(3, 3), fc=nn.Linear(3, 4)),
        IMAGE,
        {},
        OUT | {"a": "is combined with a value that has no prunable channels"},
    ),
    "one channel": Case(
        lambda: Net(lambda n, x: head(n.b(n.a(x)), n), a=conv(3, 1), b=conv(1, 5), fc=nn.Linear(5, 4)),
        IMAGE,
        {"b": 5},
        OUT | {"a": "has one output channel"},
    ),
    "a place": Case(
        lambda: Net(
            lambda n, x: n.fc(torch.cat([n.a(x)[:, 1], n.a(x).select(1, 2)], 1).flatten(1)),
            a=conv(3, 3),
            fc=nn.Linear(128, 4),
        ),
        IMAGE,
        {},
        OUT | {"a": "is picked by its place"},
    ),
    "tied to the output": Case(
        lambda: Net(lambda n, x: n.a(x) + n.b(n.a(x)), a=conv(3, 4), b=conv(4, 4)),
        IMAGE,
        {},
        {"a": LAST, "b": LAST},
    ),
}
"""Layers that have to keep their channels, and why."""
