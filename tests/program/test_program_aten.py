"""Every operator that export records, written as a call on the allow-list, against the operator itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from modelopt_cli.errors import CaptureError
from modelopt_cli.program.aten import REFUSALS, ROWS
from modelopt_cli.program.input_spec import InputSpec
from modelopt_cli.program.normal import normalize
from modelopt_cli.program.translation import Translation

X = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
ATEN = torch.ops.aten


def weights() -> Tensor:
    return torch.linspace(-1, 1, 72).reshape(4, 2, 3, 3).sin()


def recorded(function: Callable[[Tensor], Any]) -> fx.GraphModule:
    return make_fx(function, pre_dispatch=True, tracing_mode="symbolic")(X)


def translated(graph: fx.Graph) -> nn.Module:
    (place,) = graph.find_nodes(op="placeholder")
    written = Translation({}, {place.name: "x"}, [])
    written.graph.output(tuple(map(written.fetched, written.run(graph))))
    normalize(written.graph, nn.Module(), InputSpec(tuple(X.shape[1:])), written.constants)
    return fx.GraphModule(written.constants, written.graph)


def check(function: Callable[[Tensor], Any]) -> set[str]:
    """Compare at another batch size than was traced; returns the operators that were recorded."""
    module = recorded(function)
    graph = module.graph
    names = {n.target._schema.name.partition("::")[2] for n in graph.nodes if hasattr(n.target, "_schema")}
    again = translated(graph)
    x = torch.randn(5, *X.shape[1:])
    expected = function(x.clone())
    expected = expected if isinstance(expected, tuple) else (expected,)
    for mine, theirs in zip(again(x.clone()), expected, strict=True):
        assert torch.equal(mine, theirs)
        assert mine.dtype == theirs.dtype
    return names


def written_into(
    change: Callable[[Tensor], Any], start: Callable[[Tensor], Tensor] = lambda x: x
) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        y = start(x) * 2
        change(y)
        return y + 1

    return function


def put(x: Tensor) -> None:
    x[:, :, torch.tensor([2, 0])] = x[:, :, :2] + 1


def put_and_added(x: Tensor) -> Tensor:
    places = (torch.tensor([1, 0]),)
    return x.index_put(places, x[:2] + 1) + x.index_put(places, x[:2], accumulate=True)


UPSAMPLED = {
    "upsample_nearest1d": lambda x: F.interpolate(x[:, 0], 12),
    "upsample_nearest2d": lambda x: F.interpolate(x, scale_factor=2.0),
    "upsample_nearest3d": lambda x: F.interpolate(x[None], (4, 12, 8)),
    "_upsample_nearest_exact1d": lambda x: F.interpolate(x[:, 0], 11, mode="nearest-exact"),
    "_upsample_nearest_exact2d": lambda x: F.interpolate(x, (7, 9), mode="nearest-exact"),
    "_upsample_nearest_exact3d": lambda x: F.interpolate(x[None], (4, 12, 8), mode="nearest-exact"),
    "upsample_linear1d": lambda x: F.interpolate(x[:, 0], scale_factor=1.5, mode="linear"),
    "upsample_bilinear2d": lambda x: F.interpolate(x, (9, 7), mode="bilinear", align_corners=True),
    "upsample_bicubic2d": lambda x: F.interpolate(x, scale_factor=(2.0, 1.5), mode="bicubic"),
    "upsample_trilinear3d": lambda x: F.interpolate(x[None], (4, 12, 8), mode="trilinear"),
    "_upsample_bilinear2d_aa": lambda x: F.interpolate(x, (3, 4), mode="bilinear", antialias=True),
    "_upsample_bicubic2d_aa": lambda x: F.interpolate(x, (3, 4), mode="bicubic", antialias=True),
}
EXAMPLES: dict[str, Callable[[Tensor], Any]] = {
    **UPSAMPLED,
    "t_": written_into(lambda y: y.t_(), lambda x: x.flatten(1)),
    "transpose_": written_into(lambda y: y.transpose_(1, 2)),
    "swapaxes_": written_into(lambda y: y.swapaxes_(1, 2)),
    "swapdims_": written_into(lambda y: y.swapdims_(1, 2)),
    "squeeze_": written_into(lambda y: y.squeeze_(1), lambda x: x[:, :1]),
    "unsqueeze_": written_into(lambda y: y.unsqueeze_(-1)),
    "_unsafe_view": lambda x: ATEN._unsafe_view(x, [x.shape[0], -1]),
    "_unsafe_index": lambda x: ATEN._unsafe_index(x, [None, torch.tensor([2, 0])]),
    "convolution": lambda x: (
        ATEN.convolution(x, weights(), None, [1, 2], [1, 1], [1, 1], False, [0, 0], 2)
        + ATEN.convolution(x, weights(), torch.ones(4), [1, 2], [1, 1], [1, 1], True, [0, 1], 2)[..., 1:5]
    ),
    "_native_batch_norm_legit_no_training": lambda x: ATEN._native_batch_norm_legit_no_training(
        x, torch.arange(4.0), torch.ones(4), torch.ones(4), torch.arange(1.0, 5), 0.1, 1e-3
    )[0],
    "native_layer_norm": lambda x: ATEN.native_layer_norm(x, [6, 8], None, torch.ones(6, 8), 1e-3)[0],
    "native_group_norm": lambda x: ATEN.native_group_norm(
        x, torch.arange(4.0), None, x.shape[0], 4, 48, 2, 1e-3
    )[0],
    "_softmax": lambda x: ATEN._softmax(x, 1, False),
    "_log_softmax": lambda x: ATEN._log_softmax(x, -1, False),
    "max_pool2d_with_indices": lambda x: (
        *ATEN.max_pool2d_with_indices(x, [3, 2], [2, 1], [1, 0], 1, True),
        ATEN.max_pool2d_with_indices(x, [2, 2])[0],
    ),
    "max_pool3d_with_indices": lambda x: ATEN.max_pool3d_with_indices(x, [2, 2, 2]),
    "adaptive_max_pool1d": lambda x: ATEN.adaptive_max_pool1d(x[:, 0], [3]),
    "adaptive_max_pool2d": lambda x: ATEN.adaptive_max_pool2d(x, [3, 2]),
    "adaptive_max_pool3d": lambda x: ATEN.adaptive_max_pool3d(x[:, None], [2, 3, 2])[1],
    "_adaptive_avg_pool2d": lambda x: ATEN._adaptive_avg_pool2d(x, [3, 2]),
    "_adaptive_avg_pool3d": lambda x: ATEN._adaptive_avg_pool3d(x[:, None], [2, 3, 2]),
    "_scaled_dot_product_flash_attention_for_cpu": lambda x: (
        ATEN._scaled_dot_product_flash_attention_for_cpu(x, x + 1, x * 2, 0.0, True)[0]
        + ATEN._scaled_dot_product_flash_attention_for_cpu(x, x, x, attn_mask=torch.eye(6), scale=0.3)[0]
    ),
    "addmm": lambda x: torch.addmm(
        torch.ones(5), x.mean((2, 3)), weights()[:, 1, :, 1] @ torch.ones(3, 5), beta=2, alpha=0.5
    ),
    "mm": lambda x: torch.mm(x.mean((2, 3)), weights()[:, 1, :, 1].clone().t().t()),
    "detach": lambda x: x.detach() + 1,
    "detach_": lambda x: (x * 2).detach_() + 1,
    "alias": lambda x: ATEN.alias(x) + 1,
    "lift_fresh_copy": lambda x: x * torch.tensor([1.0, 0.5]).repeat(4),
    "to": lambda x: x.to(torch.int64) + x.to("cpu"),
    "_to_copy": lambda x: ATEN._to_copy(x, dtype=torch.float64),
    "__and__": lambda x: (x > 0) & (x < 1),
    "__or__": lambda x: (x > 0) | (x < -1),
    "__xor__": lambda x: (x > 0) ^ (x < 1),
    "slice": lambda x: x[:, 1:3, ..., 2:-1:2] + ATEN.slice(x, -2, 1, 5, 4)[:, 2:, :, :1],
    "select": lambda x: x[:, 1] + x.select(-2, 3).mean(1)[:, None, None],
    "index": lambda x: x[:, torch.tensor([2, 0])] + x[:, 2:][:, torch.tensor([1, 0])],
    "index_put": put_and_added,
    "index_put_": written_into(put),
    "sym_size": lambda x: x.reshape(x.shape[0], -1) * x.shape[0],
    "sym_numel": lambda x: x / x.numel(),
    "embedding": lambda x: F.embedding((x > 0).long(), torch.eye(5), padding_idx=1),
    "einsum": lambda x: torch.einsum("nchw,nchv->nwv", x, x),
    "scalar_tensor": lambda x: x + ATEN.scalar_tensor(x.shape[0]),
    "zeros": lambda x: x + torch.zeros(x.shape[0], 1, 1, 1, dtype=torch.int32),
    "empty": lambda x: torch.empty(x.shape[0], 4).fill_(2) + x.mean((2, 3)),
    "ones": lambda x: x + torch.ones(x.shape[0], 1, 1, 1),
    "full": lambda x: x / torch.full((x.shape[0], 1, 1, 1), 3),
    "arange": lambda x: x + torch.arange(x.shape[0], dtype=torch.float32)[:, None, None, None],
    "eye": lambda x: torch.eye(x.shape[0]) @ x.flatten(1),
    "new_empty": lambda x: x.new_empty(x.shape[0], 2).zero_(),
    "empty_like": lambda x: torch.empty_like(x).copy_(x + 1),
    "log_sigmoid": F.logsigmoid,
    "im2col": lambda x: F.unfold(x, 3, padding=1, stride=2),
    "col2im": lambda x: F.fold(F.unfold(x, 2), (6, 8), 2),
    "affine_grid_generator": lambda x: F.affine_grid(
        x[:, 0, :2, :3], [x.shape[0], 4, 6, 8], align_corners=False
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_row(name: str) -> None:
    assert name in check(EXAMPLES[name])


BY_NAME: dict[str, Callable[[Tensor], Any]] = {
    "activations": lambda x: (
        F.gelu(x, approximate="tanh") + F.silu(x) + F.hardtanh(x, -2, 2) + F.elu(x, 0.5) + F.leaky_relu(x)
        + F.softplus(x, 2) + F.glu(x, 1).repeat(1, 2, 1, 1) + F.hardswish(x) + F.mish(x)
    ),
    "arithmetic": lambda x: torch.add(x, x, alpha=2) + (2 - x) / (x.abs() + 1) ** 0.5 + x.exp().rsqrt(),
    "parts": lambda x: torch.cat(
        [*x.chunk(2, 1), *x.split([1, 3], 1), x.unbind(2)[4][:, :, None].repeat(1, 1, 6, 1)], 1
    ),
    "pools": lambda x: (
        F.max_pool2d(x, 2) + F.avg_pool2d(x, 2, ceil_mode=True) + F.adaptive_avg_pool2d(x, (3, 4))
    ),
    "pooled places": lambda x: F.max_pool2d(x, 3, 2, 1, return_indices=True),
    "norms": lambda x: (
        F.layer_norm(x, (8,), eps=1e-3) + F.group_norm(x, 2) + F.instance_norm(x) + F.normalize(x)
    ),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "sorted": lambda x: (x.sort(-1).values, x.topk(3, 1)[1], x.max(2).indices, x.argmax(1)),
    "statistics": lambda x: (x.std((2, 3), correction=0), x.var(1), x.mean(1, keepdim=True), x.amax((1, 2))),
    "vector norm": lambda x: torch.linalg.vector_norm(x, 3, dim=1) + x.norm(dim=1),
    "shapes": lambda x: (
        x.unflatten(1, (2, 2)).movedim(1, 3).flatten(3).transpose(1, 2).contiguous().roll(1, 2)
    ),
    "masks": lambda x: torch.where(x > 0, x, 0.5).masked_fill(x.isnan(), 0).tril(1),
    "padding": lambda x: (
        F.pad(x, (1, 2, 0, 0), mode="reflect")
        + F.pad(x, (1, 2), value=3.0)
        + F.pad(x, (3, 0, 0, 0), mode="circular")
    ),
    "convolution": lambda x: (
        F.conv2d(x, torch.ones(2, 4, 3, 3), padding="same")[:, :, 1:-1]
        + F.conv_transpose2d(x, torch.ones(4, 2, 1, 3))[:, :, 1:5, 1:-1]
    ),
    "softmax": lambda x: x.softmax(1) + F.log_softmax(x, -1) + torch.softmax(x, 2, dtype=torch.float32),
    "dropout": lambda x: F.dropout(x, 0.3, False) + F.dropout2d(x, 0.3, False),
    "complex": lambda x: torch.fft.rfft(x).abs() + torch.special.expit(x[..., :5]),
}  # fmt: skip


@pytest.mark.parametrize("function", BY_NAME.values(), ids=BY_NAME)
def test_operators_that_need_no_row(function: Callable[[Tensor], Any]) -> None:
    assert not check(function) & {"item"}


IN_PLACE: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda y: y[:, 0].add_(1),
    "column": lambda y: y[..., 2].copy_(y[..., 0]),
    "filled": lambda y: y[:, 1:3].fill_(2.5),
    "zeroed": lambda y: y[:, :, ::2].zero_(),
    "masked": lambda y: y.masked_fill_(y > 1, 0.0),
}


@pytest.mark.parametrize("change", IN_PLACE.values(), ids=IN_PLACE)
def test_changes_in_place_stay_so(change: Callable[[Tensor], Any]) -> None:
    check(written_into(change))


def test_what_depends_on_no_input_is_computed_once() -> None:
    def function(x: Tensor) -> Tensor:
        mask = torch.ones(8, 8).tril()
        mask[0] += 1
        return x @ (mask / torch.arange(1, 9)[:, None])

    module = translated(recorded(function).graph)
    assert [n.op for n in module.graph.nodes] == ["placeholder", "get_attr", "call_function", "output"]
    assert torch.equal(module(X)[0], function(X))


def test_a_size_that_is_one_for_the_traced_batch_is_not_dropped() -> None:
    names = check(lambda x: x[: x.shape[0] - 1].sum((1, 2, 3)))
    assert "slice" in names


REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "number": (lambda x: x * ATEN.item(x.mean()), "depends on the values in a tensor"),
    "mask": (lambda x: x[x > 0], "the size of a tensor depends on the values in another"),
    "nonzero": (lambda x: x.nonzero(), "the size of a tensor depends on the values in another"),
    "chance": (lambda x: x + torch.rand(4, 6, 8), "draws random numbers"),
    "no counterpart": (lambda x: x.polygamma(1), "calls torch.polygamma"),
    "in place": (lambda x: (x * 2).cauchy_(), "calls torch.cauchy"),
}


@pytest.mark.parametrize(("function", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(function: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        translated(recorded(function).graph)


def test_every_refusal_has_a_name_of_torch() -> None:
    assert all(hasattr(ATEN, name) for name in REFUSALS)
