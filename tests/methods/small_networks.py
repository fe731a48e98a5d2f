"""Small networks for every way in which a graph can be written: the inputs of ``test_small_networks.py``.

Each takes ``(N, 4, 12, 12)`` and is a function of the layers of :class:`Layers` and the input.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layers(nn.Module):
    """Layers to choose from; only those that are used become part of a Program."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(4, 8, 3, padding=1),
            *(nn.Conv2d(8, 8, 3, padding=1) for _ in "12"),
        )
        self.point, self.depth = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped, self.four = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Conv2d(4, 4, 3, padding=1)
        self.tall, self.wide = (
            nn.Conv2d(8, 8, (3, 1), padding=(1, 0)),
            nn.Conv2d(8, 8, (1, 3), padding=(0, 1)),
        )
        self.strided, self.dilated = nn.Conv2d(8, 8, 3, stride=2), nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.odd, self.even = nn.Conv2d(8, 8, 3, stride=(1, 3), padding=1), nn.Conv2d(8, 8, 2, padding=1)
        self.up, self.reflected = (
            nn.ConvTranspose2d(8, 8, 2, 2),
            nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        )
        self.bn, self.gn, self.relu = nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.ReLU(inplace=True)
        self.relu6, self.swish, self.drop = nn.ReLU6(True), nn.Hardswish(True), nn.Dropout(0.5, inplace=True)
        self.fc, self.wide_fc = nn.Linear(8, 6), nn.Linear(8 * 144, 6)
        self.token, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.seq = nn.Conv1d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.tied = nn.Conv2d(8, 8, 3, padding=1)
        self.tied.weight, self.tied.bias = self.b.weight, self.b.bias
        self.scale, self.shift = nn.Parameter(torch.rand(8, 1, 1) + 0.5), nn.Parameter(torch.randn(8, 1, 1))
        self.register_buffer("order", torch.tensor([3, 1, 0, 2, 7, 6, 5, 4]))
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)

    def head(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return result


def made(forward: Callable[[Any, Tensor], Tensor], seed: int = 0) -> Layers:
    """The network, its batch norm having seen data."""
    torch.manual_seed(seed)
    network = Layers(forward)
    nn.init.uniform_(network.bn.running_var, 0.5, 2.0)
    nn.init.normal_(network.bn.running_mean, std=0.2)
    nn.init.uniform_(network.bn.weight, 0.5, 1.5)
    return network.eval()


def _in_place(y: Tensor, z: Any) -> Tensor:
    y += z
    return y


def _clamped(y: Tensor) -> Tensor:
    y[:, :4].clamp_(min=0)
    return y


def _pooled(n: Any, x: Tensor) -> Tensor:
    result: Tensor = F.relu(n.b(F.relu(n.a(x)))).mean((2, 3))
    return result


def _tokens(y: Tensor) -> Tensor:
    return y.flatten(2).transpose(1, 2)


def _assigned(y: Tensor) -> Tensor:
    z = y.clone()
    z[:, 2:4] = y[:, :2] * 2
    return z


def _shuffled(y: Tensor) -> Tensor:
    n, c, h, w = y.shape
    return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


NETWORKS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    # What shares memory.
    "relu in place, read before": lambda n, x: n.head(n.b(n.relu(y := n.a(x))) + y),
    "relu_, read before": lambda n, x: n.head(n.b((y := n.a(x)).relu_()) + y),
    "F.relu in place, read before": lambda n, x: n.head(n.b(F.relu(y := n.a(x), inplace=True)) + y),
    "relu6 in place, read before": lambda n, x: n.head(n.b(n.relu6(y := n.a(x))) + y),
    "hardswish in place, read before": lambda n, x: n.head(n.b(n.swish(y := n.a(x))) + y),
    "sum in place, read before": lambda n, x: n.head(n.b(_in_place(y := n.a(x), 0.5)) + y),
    "sum of two in place": lambda n, x: n.head(_in_place(y := n.b(z := n.a(x)), z) + y * 2),
    "dropout in place": lambda n, x: n.head(n.b(n.drop(y := n.a(x))) + y),
    "a slice changed in place": lambda n, x: n.head(n.b(_clamped(y := n.a(x))) + y),
    "half of a chunk in place": lambda n, x: n.head(
        n.b(torch.cat([(p := n.a(x).chunk(2, 1))[0].relu_(), p[1]], 1))
    ),
    "a view changed in place": lambda n, x: n.wide_fc((y := n.a(x)).flatten(1).relu_()) + y.flatten(1)[:, :6],
    "an assignment": lambda n, x: n.head(n.b(_assigned(n.a(x)))),
    "batch norm, then relu in place twice": lambda n, x: n.head(n.relu(n.c(n.relu(n.bn(n.a(x)))))),
    # How arguments are given.
    "flatten by name": lambda n, x: n.wide_fc(torch.flatten(input=n.relu(n.a(x)), start_dim=1)),
    "cat along axis": lambda n, x: n.head(torch.cat([n.a(x), n.b(n.a(x))], axis=1)[:, :8]),
    "mean along axis": lambda n, x: n.fc(n.b(n.a(x)).mean(axis=(2, 3))),
    "mean by place": lambda n, x: n.fc(torch.mean(n.b(n.a(x)), (2, 3))),
    "mean with kept dims": lambda n, x: n.fc(n.b(n.a(x)).mean((-1, -2), True).flatten(1)),
    "pool with a divisor": lambda n, x: n.head(n.b(F.avg_pool2d(n.a(x), 2, 2, 0, False, True, 3))),
    "pool by name": lambda n, x: n.head(n.b(F.avg_pool2d(input=n.a(x), kernel_size=2))),
    "pool without padding counted": lambda n, x: n.head(n.b(F.avg_pool2d(n.a(x), 3, 2, 1, False, False))),
    "ceil pool": lambda n, x: n.head(n.b(F.max_pool2d(n.a(x), 3, 2, 0, 1, True))),
    "sum scaled": lambda n, x: n.head(torch.add(n.a(x), n.b(n.a(x)), alpha=2)),
    "difference scaled": lambda n, x: n.head(n.a(x).sub(n.b(n.a(x)), alpha=0.5)),
    "pad by name": lambda n, x: n.head(n.b(F.pad(input=n.a(x), pad=(1, 1), mode="constant", value=0.0))),
    "pad by sizes": lambda n, x: n.head(
        n.b(F.pad(y := n.a(x), (0, (5 - y.shape[-1] % 5) % 5, 0, (5 - y.shape[-2] % 5) % 5)))
    ),
    "pad with a value": lambda n, x: n.head(n.b(F.pad(n.a(x), (1, 0, 0, 1), value=0.7))),
    "relu by name": lambda n, x: n.head(n.b(F.relu(input=n.a(x), inplace=False))),
    "gelu of tanh": lambda n, x: n.head(n.b(F.gelu(n.a(x), approximate="tanh"))),
    "permute by places": lambda n, x: n.token(n.a(x).permute(0, 2, 3, 1)).mean((1, 2)),
    "swapaxes": lambda n, x: n.token(n.a(x).flatten(2).swapaxes(1, 2)).mean(1),
    "view of sizes": lambda n, x: n.wide_fc((y := n.relu(n.a(x))).view(y.size(0), -1)),
    "reshape of a shape": lambda n, x: n.wide_fc((y := n.relu(n.a(x))).reshape(y.shape[0], y.shape[1] * 144)),
    "interpolate by name": lambda n, x: n.head(
        n.b(F.interpolate(input=n.a(x), scale_factor=2, mode="nearest"))
    ),
    # Ranks.
    "mean of three dimensions": lambda n, x: n.token(_tokens(n.a(x))).mean((-2, -1), keepdim=True).flatten(1),
    "mean over tokens": lambda n, x: n.fc(n.token(_tokens(n.a(x))).mean(1)),
    "linear of four dimensions": lambda n, x: n.fc(n.token(n.a(x).movedim(1, -1))).mean((1, 2)),
    "layer norm": lambda n, x: n.fc(n.norm(n.token(_tokens(n.a(x)))).mean(1)),
    "layer norm over a shape": lambda n, x: n.head(n.b(F.layer_norm(y := n.a(x), y.shape[2:]))),
    "attention": lambda n, x: n.fc(n.attention(t := _tokens(n.a(x)), t, t, need_weights=False)[0].mean(1)),
    "one dimension": lambda n, x: n.fc(n.seq(n.a(x).flatten(2)).mean(-1)),
    "squeezed pool": lambda n, x: n.fc(F.adaptive_avg_pool2d(n.b(n.a(x)), (1, 1)).squeeze(-1).squeeze(-1)),
    "mean of one side": lambda n, x: n.fc(n.b(n.a(x)).mean(3).mean(2)),
    # Tuples.
    "stack next to a part": lambda n, x: n.head(
        n.b(torch.cat(p := n.a(x).chunk(2, 1), 1)) + torch.stack(p).sum(0).repeat(1, 2, 1, 1)
    ),
    "chunk, a part to a layer": lambda n, x: n.head(
        torch.cat([n.four((p := n.a(x).chunk(2, 1))[0]), p[1]], 1)
    ),
    "no rows joined to the others": lambda n, x: n.head(n.b(torch.cat([(y := n.a(x))[:, :, :0], y], 2))),
    "no channels joined to all": lambda n, x: n.head(n.b(torch.cat([(y := n.a(x))[:, :0], y], 1))),
    "split of sizes": lambda n, x: n.head(
        torch.cat([n.four((p := n.a(x).split([4, 2, 2], 1))[0]), *p[1:]], 1)
    ),
    "unbind and stack": lambda n, x: n.head(n.b(torch.stack(n.a(x).unbind(1)[::-1], 1))),
    "last part": lambda n, x: n.head(torch.cat([n.four(n.a(x).chunk(2, 1)[-1])] * 2, 1)),
    "max with places": lambda n, x: n.fc(n.b(n.a(x)).flatten(2).max(2)[0]),
    "max by field": lambda n, x: n.fc(n.b(n.a(x)).flatten(2).max(dim=2).values),
    "largest of channels": lambda n, x: n.head(n.b(n.a(x).topk(4, 1).values.repeat(1, 2, 1, 1))),
    "sorted channels": lambda n, x: n.head(n.b(torch.sort(n.a(x), 1).values)),
    "least and most": lambda n, x: n.head(n.b((y := n.a(x)) - y.aminmax(dim=1, keepdim=True).min)),
    # Numbers that are values.
    "sum with a size": lambda n, x: n.head(n.b((y := n.a(x)) + y.shape[1])),
    "product with a size": lambda n, x: n.head(n.b((y := n.a(x)) * y.size(2) / 12)),
    "a table of a value's type": lambda n, x: n.head(
        n.b((y := n.a(x)) + torch.linspace(-1, 1, 12, device=y.device).to(y.dtype))
    ),
    "cast like another": lambda n, x: n.head(n.b((y := n.a(x)) + (x > 0).repeat(1, 2, 1, 1).type_as(y))),
    "sum with a number": lambda n, x: n.head(n.b(n.a(x) + 0.3)),
    "number minus": lambda n, x: n.head(n.b(1 - n.a(x))),
    "number over": lambda n, x: n.head(n.b(1 / (n.a(x).sigmoid() + 1))),
    "sum with itself": lambda n, x: n.head(n.b((y := n.a(x)) + y)),
    "product with itself": lambda n, x: n.head(n.b((y := n.a(x)) * y)),
    "gate": lambda n, x: n.head(n.b((y := n.a(x)) * n.point(F.adaptive_avg_pool2d(y, 1)).sigmoid())),
    "sum that broadcasts": lambda n, x: n.head(n.b((y := n.a(x)) + n.point(F.adaptive_avg_pool2d(y, 1)))),
    "sum with the input": lambda n, x: n.head(n.b(torch.cat([x, x], 1) + n.a(x))),
    "sum with a parameter": lambda n, x: n.head(n.b(n.a(x) + n.shift)),
    "product with a parameter": lambda n, x: n.head(n.b(n.a(x) * n.scale)),
    "product with a number of elements": lambda n, x: n.head(n.b(y := n.a(x)) * (y.numel() / 1000)),
    "product with sizes of batch and channels": lambda n, x: n.head(
        n.b(y := n.a(x)) * (y.shape[0] * y.shape[1] / 9)
    ),
    "product with a comparison": lambda n, x: n.head(n.b(y := n.a(x)) * (y.shape[1] > 6) + y),
    "sum with a full tensor": lambda n, x: n.head(n.b((y := n.a(x)) + torch.full((1,), y.shape[1] / 4))),
    # Shared and tied layers.
    "a layer called twice": lambda n, x: n.head(n.b(F.relu(n.b(n.a(x))))),
    "tied layers": lambda n, x: n.head(n.tied(F.relu(n.b(n.a(x))))),
    "a pool used twice": lambda n, x: n.fc(
        F.adaptive_max_pool2d(n.b(y := n.a(x)), 1).flatten(1) + y.amax((2, 3))
    ),
    "one value, three readers": lambda n, x: n.head(n.b(y := F.relu(n.a(x))) + n.c(y) + y),
    "a batch norm shared by two": lambda n, x: n.head(n.bn(n.b(n.bn(n.a(x))))),
    # Parameters that the graph reads besides their layer.
    "a weight read besides": lambda n, x: n.fc(n.token(y := _pooled(n, x)) + y @ n.token.weight),
    "a weight normalized": lambda n, x: n.fc(n.token(y := _pooled(n, x)) + y @ F.normalize(n.token.weight)),
    "a weight in a distance": lambda n, x: n.fc(n.token(y := _pooled(n, x)) + torch.cdist(y, n.token.weight)),
    "a bias read besides": lambda n, x: n.fc(n.token(y := _pooled(n, x)) + n.token.bias + n.b.bias + y),
    "a bias read before": lambda n, x: n.fc(n.token(_pooled(n, x) + n.token.bias)),
    "a weight's size": lambda n, x: n.fc(n.token(_pooled(n, x) * n.token.weight.shape[1])),
    "a weight's type": lambda n, x: n.fc(n.token(_pooled(n, x).to(n.token.weight.dtype))),
    "a tied weight read": lambda n, x: n.head(
        n.c(n.tied(n.b(y := n.a(x))) + F.conv2d(y, n.tied.weight, padding=1))
    ),
    "parameters of folded layers": lambda n, x: n.fc(
        n.bn(n.b(n.c(n.a(x)))).mean((2, 3)) + n.bn.weight + n.b.bias
    ),
    "a weight without its layer": lambda n, x: n.fc(_pooled(n, x) @ n.token.weight),
    "attention of two inputs, then of one": lambda n, x: n.fc(
        n.attention(z := n.attention(t := _tokens(n.a(x)), t * 0.5, t)[0], z, z)[0].mean(1)
    ),
    "a packed weight read": lambda n, x: n.fc(
        (n.attention(t := _tokens(n.a(x)), t, t)[0] @ n.attention.in_proj_weight[8:16]).mean(1)
    ),
    # Odd geometry, and operations in between.
    "depthwise": lambda n, x: n.head(n.point(n.relu6(n.depth(n.a(x))))),
    "grouped": lambda n, x: n.head(n.grouped(n.relu(n.a(x)))),
    "shuffled groups": lambda n, x: n.head(n.grouped(_shuffled(n.grouped(n.a(x))))),
    "tall and wide": lambda n, x: n.head(n.wide(n.relu(n.tall(n.a(x))))),
    "strides that differ": lambda n, x: n.head(n.odd(n.a(x))),
    "dilated": lambda n, x: n.head(n.dilated(n.a(x))),
    "even kernel": lambda n, x: n.head(n.even(n.a(x))),
    "strided": lambda n, x: n.head(n.strided(n.strided(n.a(x)))),
    "transposed convolution": lambda n, x: n.head(n.b(n.up(n.a(x)))),
    "reflected padding": lambda n, x: n.head(n.reflected(n.a(x))),
    "group norm": lambda n, x: n.head(n.b(n.gn(n.a(x)))),
    "reordered channels": lambda n, x: n.head(n.b(n.a(x)[:, n.order])),
    "a channel picked": lambda n, x: n.head(n.b((y := n.a(x)) * y[:, 3:4])),
    "pixel shuffle": lambda n, x: n.head(n.a(F.pixel_shuffle(n.a(x).repeat(1, 2, 1, 1), 2))),
    "rolled": lambda n, x: n.head(n.b(torch.roll(n.a(x), (1, 2), dims=(2, 3)))),
    "two branches joined": lambda n, x: n.head(
        n.point(torch.cat([n.b(y := n.a(x))[:, :4], n.c(y)[:, 4:]], dim=1))
    ),
}
