"""Small networks with attention, each around one thing that channel pruning has to follow."""

from collections.abc import Callable
from typing import Any

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
