"""Small networks with attention, each around one thing that channel pruning has to follow."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from channels_networks import OUT, Case, Net, parameter
from torch import Tensor, nn

TOKENS = (5, 7)
Attend = Callable[[Any, Tensor, Tensor], Tensor]


def _attends(call: Attend, projection: str, other: int = 0, *, apart: bool = True, **options: Any) -> Case:
    """Attention of 3 heads over the outputs of one linear layer, or of a second with ``other`` features.

    ``apart`` says that the two lose features by themselves.
    """

    def make() -> nn.Module:
        return Net(
            lambda n, x: n.fc(call(n.attention, n.a(x), n.b(x.flip(1)))),
            a=nn.Linear(7, 12),
            b=nn.Linear(7, other or 1),
            attention=nn.MultiheadAttention(12, 3, **({"batch_first": True} | options)),
            fc=nn.Linear(12, 4),
        )

    second = {"b": other} if other and apart else {}
    return Case(
        make,
        TOKENS,
        {"a": 12, **second, f"attention.{projection}": 3, "attention.out_proj": 12},
        OUT,
    )


def _layer(kind: str, **options: Any) -> Case:
    """A layer of ``nn.Transformer`` as it is."""
    decodes = kind == "TransformerDecoderLayer"

    def forward(n: Any, x: Tensor) -> Tensor:
        x = n.a(x)
        result: Tensor = n.fc(n.layer(n.queries.expand(x.size(0), -1, -1), x) if decodes else n.layer(x))
        return result

    def make() -> nn.Module:
        layer = getattr(nn, kind)(12, 3, 10, **options)
        return Net(forward, a=nn.Linear(7, 12), layer=layer, fc=nn.Linear(12, 4), queries=parameter(1, 3, 12))

    own = {"layer.self_attn.out_proj": 12, "layer.multihead_attn.q_proj": 3} if decodes else {}
    return Case(make, TOKENS, {"a": 12, "layer.self_attn.in_proj": 3, "layer.linear1": 10, **own}, OUT)


ATTENTION: dict[str, Case] = {
    "keys and values of another layer": _attends(lambda n, a, b: n(a, b, b)[0], "q_proj", 12),
    "keys and values of other widths": _attends(lambda n, a, b: n(a, b, b)[0], "q_proj", 8, kdim=8, vdim=8),
    "positions in queries and keys": _attends(
        lambda n, a, b: n(q := a + b, q, a)[0], "qk_proj", 12, apart=False
    ),
    "three inputs by name": _attends(
        lambda n, a, b: n(value=a, key=b * 2, query=b, need_weights=False)[0], "q_proj", 12
    ),
    "sequence first": _attends(
        lambda n, a, b: n(t := a.transpose(0, 1), t, t)[0].transpose(0, 1), "in_proj", batch_first=False
    ),
    "one attention, called in two ways": _attends(
        lambda n, a, b: n(a, a, a)[0] + n(a, b, b)[0], "q_proj", 12, apart=False
    ),
}
"""Networks that lose heads without any change to what the others compute."""

TRANSFORMERS: dict[str, Case] = {
    "an encoder layer": _layer("TransformerEncoderLayer", batch_first=True),
    "an encoder layer, sequence first": _layer("TransformerEncoderLayer", norm_first=True),
    "a decoder layer": _layer("TransformerDecoderLayer", batch_first=True),
}
"""Networks whose layer norms take their statistics over what is left."""


def _stays(call: Attend, why: str, **options: Any) -> Case:
    reason = f"MultiheadAttention, {why}"
    frozen = {"a": f"goes through attention ({reason}".replace(", ", "), ", 1), "attention": reason}
    case = _attends(call, "in_proj", **options)
    return Case(case.make, TOKENS, {}, OUT | frozen)


UNDIVIDED: dict[str, Case] = {
    "attention weights are used": _stays(
        lambda n, a, b: a + n(a, a, a)[1].sum(2, keepdim=True), "whose attention weights are used"
    ),
    "a key and a value of its own": _stays(
        lambda n, a, b: n(a, a, a)[0], "which adds keys and values of its own", add_bias_kv=True
    ),
    "a key of zeros": _stays(
        lambda n, a, b: n(a, a, a)[0], "which adds keys and values of its own", add_zero_attn=True
    ),
    "weights that are read outside": _stays(
        lambda n, a, b: n(a, a, a)[0] * n.in_proj_weight.sum(), "whose weights are read outside of it, too"
    ),
}
"""Attention that has to keep its heads, and why."""


def _heads(x: Tensor, count: int = 3) -> Tensor:
    return x.unflatten(-1, (count, 4)).transpose(1, 2)


def _joined(n: Any, y: Tensor) -> Tensor:
    result: Tensor = n.fc(n.o(y.transpose(1, 2).flatten(2)))
    return result


def _normed(n: Any, x: Tensor) -> Tensor:
    """Henry et al., EMNLP 2020, with layer norms: of each head by itself."""
    q, k, v = n.qkv(x).reshape(x.shape[0], 5, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
    return _joined(n, F.scaled_dot_product_attention(n.norm(q), F.rms_norm(k, (4,), n.scale), v))


def _grouped(n: Any, x: Tensor) -> Tensor:
    """Ainslie et al., EMNLP 2023: two heads of queries for each of keys."""
    q, k, v = _heads(n.q(x), 6), _heads(n.k(x)), _heads(n.v(x))
    same = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    return _joined(n, same + F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


def _one_key(n: Any, x: Tensor) -> Tensor:
    """Shazeer 2019: one head of keys for all of queries."""
    q, k, v = _heads(n.q(x)), n.k(x).unsqueeze(1), n.v(x).unsqueeze(1)
    y = F.scaled_dot_product_attention(q, k, v)
    return _joined(n, y + (q @ k.transpose(2, 3)).softmax(-1) @ v)


def _batched(n: Any, x: Tensor) -> Tensor:
    """Heads as samples of a batch."""
    batch, length, _ = x.shape
    q, k, v = (_heads(layer(x)).reshape(batch * 3, -1, 4) for layer in (n.q, n.k, n.v))
    y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v).view(batch, 3, length, 4)
    return _joined(n, y)


def _linear(n: Any, x: Tensor) -> Tensor:
    """Cai et al., ICCV 2023: ReLU attention, whose sums of weights come from a column of ones."""
    q, k, v = (_heads(layer(x)) for layer in (n.q, n.k, n.v))
    y = F.relu(q) @ (F.relu(k).transpose(-1, -2) @ F.pad(v, (0, 1), value=1.0))
    return _joined(n, y[..., :-1] / (y[..., -1:] + 1e-2))


def _covariance(n: Any, x: Tensor) -> Tensor:
    """El-Nouby et al., NeurIPS 2021: attention between the features of each head."""
    q, k, v = (layer(x).unflatten(-1, (3, 4)).permute(0, 2, 3, 1) for layer in (n.q, n.k, n.v))
    weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * n.tau).softmax(-1)
    return n.fc(n.o((weights @ v).permute(0, 3, 1, 2).flatten(2)))  # type: ignore[no-any-return]


def _biased(n: Any, x: Tensor) -> Tensor:
    """Bao et al., ICLR 2022: a bias put together, without one for the keys."""
    bias = torch.cat([n.q_bias, n.k_bias, n.v_bias])
    q, k, v = (
        F.linear(x, n.qkv.weight, bias).reshape(x.shape[0], 5, 3, 3, -1).permute(2, 0, 3, 1, 4).unbind(0)
    )
    return _joined(n, F.scaled_dot_product_attention(q, k, v))


def _language(n: Any, x: Tensor) -> Tensor:
    """Radford et al. 2019, as Hugging Face writes it: weights are transposed, and a mask is causal."""

    def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.addmm(bias, x.view(-1, x.size(-1)), weight).view(*x.shape[:-1], -1)

    q, k, v = (_heads(part) for part in product(x, n.qkv, n.bias).split(12, dim=2))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return n.fc(F.relu(product(y.transpose(1, 2).flatten(2), n.o, n.o_bias)))  # type: ignore[no-any-return]


def _rotary(n: Any, x: Tensor) -> Tensor:
    """Su et al. 2021: queries and keys are turned by their place."""

    def turned(x: Tensor) -> Tensor:
        return x * n.cos + torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1) * n.sin

    q, k, v = (_heads(layer(x)) for layer in (n.q, n.k, n.v))
    return _joined(n, F.scaled_dot_product_attention(turned(q), turned(k), v))


def _with_buffers(net: Net, **buffers: Tensor) -> Net:
    for name, tensor in buffers.items():
        net.register_buffer(name, tensor)
    return net


def _packed(**more: Any) -> dict[str, Any]:
    return {"qkv": nn.Linear(7, 36), "o": nn.Linear(12, 6), "fc": nn.Linear(6, 4), **more}


def _three(queries: int = 12, keys: int = 12, **more: Any) -> dict[str, Any]:
    layers = {"q": nn.Linear(7, queries), "k": nn.Linear(7, keys), "v": nn.Linear(7, keys)}
    return {**layers, "o": nn.Linear(queries, 6), "fc": nn.Linear(6, 4), **more}


_OF_THREE, _OF_PACKED = {"q": 3, "o": 6}, {"qkv": 3, "o": 6}
ATTENTION |= {
    "queries and keys normed in each head": Case(
        lambda: Net(_normed, **_packed(norm=nn.LayerNorm(4), scale=parameter(4))), TOKENS, _OF_PACKED, OUT
    ),
    "fewer heads of keys": Case(lambda: Net(_grouped, **_three(24)), TOKENS, _OF_THREE, OUT),
    "one head of keys": Case(
        lambda: Net(_one_key, **_three(keys=4)),
        TOKENS,
        _OF_THREE,
        OUT | {"k": "is broadcast in a product", "v": "is broadcast in a product"},
    ),
    "heads in the batch": Case(lambda: Net(_batched, **_three()), TOKENS, _OF_THREE, OUT),
    "linear attention": Case(lambda: Net(_linear, **_three()), TOKENS, _OF_THREE, OUT),
    "attention between features": Case(
        lambda: Net(_covariance, **_three(tau=parameter(3, 1, 1))), TOKENS, _OF_THREE, OUT
    ),
    "a bias of parts": Case(
        lambda: _with_buffers(
            Net(
                _biased,
                **_packed(qkv=nn.Linear(7, 36, bias=False), q_bias=parameter(12), v_bias=parameter(12)),
            ),
            k_bias=torch.zeros(12),
        ),
        TOKENS,
        _OF_PACKED,
        OUT,
    ),
    "a language model's weights": Case(
        lambda: Net(
            _language,
            qkv=parameter(7, 36),
            bias=parameter(36),
            o=parameter(12, 6),
            o_bias=parameter(6),
            fc=nn.Linear(6, 4),
        ),
        TOKENS,
        _OF_PACKED,
        OUT,
    ),
    "turned queries and keys": Case(
        lambda: _with_buffers(Net(_rotary, **_three()), cos=torch.rand(5, 4), sin=torch.rand(5, 4)),
        TOKENS,
        _OF_THREE,
        OUT,
    ),
}
