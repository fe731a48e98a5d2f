"""Every backend computes what the integers say, whatever the geometry, zero point or activation."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    ACTIVATIONS,
    assert_matches,
    conv,
    dynamic,
    exact_conv,
    exact_linear,
    linear,
    random_uint8,
)
from torch import Tensor, fx, nn

from modelopt_cli.errors import EnvironmentFailure
from modelopt_cli.kernels import BACKENDS, cuda, onednn, prepare, require_device
from modelopt_cli.kernels.im2col import im2col
from modelopt_cli.kernels.max_pool import max_pool
from modelopt_cli.kernels.readers import overwritable_residuals
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.quantization import QParams, dynamic_qparams, quantize
from modelopt_cli.program.quantized_convolutions import QuantizedConv2d
from modelopt_cli.program.quantized_linear import DynamicLinear, QuantizedLinear
from modelopt_cli.program.quantized_operations import Quantize, QuantizedAdd, QuantizedMaxPool2d

CONVS: dict[str, Any] = {
    "emulate": lambda layer: layer.emulate,
    "onednn in place": partial(onednn.conv2d, may_overwrite_residual=True),
}
CONVS |= {
    name: partial(row.builders[QuantizedConv2d], may_overwrite_residual=False)
    for name, row in BACKENDS.items()
}
LINEARS, DYNAMICS = (
    {"emulate": lambda layer: layer.emulate} | {name: row.builders[kind] for name, row in BACKENDS.items()}
    for kind in (QuantizedLinear, DynamicLinear)
)

GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"has_bias": False},
    "pointwise": {"kernel_size": (1, 1), "padding": (0, 0)},
    "stride": {"stride": (2, 1)},
    "dilation": {"dilation": (2, 3), "padding": (2, 3)},
    "uneven": {"kernel_size": (5, 2), "padding": (2, 1), "stride": (1, 2)},
    "groups": {"groups": 4},
    "depthwise": {"in_channels": 12, "groups": 12},
    "multiplier": {"in_channels": 6, "groups": 6},
    "odd in": {"in_channels": 7},
    "odd out": {"out_channels": 5},
    "rgb": {"in_channels": 3, "kernel_size": (7, 7), "stride": (2, 2), "padding": (3, 3)},
    "one out": {"out_channels": 1, "kernel_size": (1, 1), "padding": (0, 0)},
    "float out": {"output": None},
}


pytestmark = pytest.mark.usefixtures("inference")


def _laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "sliced":
        return torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, : x.shape[1]]
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels last" else x.contiguous()


def check_conv(
    layer: QuantizedConv2d,
    kernel: str,
    batch: int = 2,
    side: tuple[int, int] = (11, 9),
    layout: str = "channels last",
) -> None:
    x = random_uint8(batch, layer.in_channels, *side)
    args = [x]
    if layer.residual is not None:
        args.append(random_uint8(*exact_conv(layer, x).shape, seed=9))
    args = [_laid_out(x, layout) for x in args]
    real = exact_conv(layer, *args)
    run = CONVS[kernel](layer)
    assert run is not None
    assert_matches(run(*args), real, layer.output)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("kernel", CONVS)
def test_conv_geometry(kernel: str, geometry: str) -> None:
    check_conv(conv(**GEOMETRIES[geometry]), kernel)


@pytest.mark.parametrize("zero_point", [0, 128, 255])
@pytest.mark.parametrize("kernel", CONVS)
@pytest.mark.parametrize("groups", [1, 2])
def test_conv_zero_point(kernel: str, zero_point: int, groups: int) -> None:
    check_conv(conv(input=QParams(0.02, zero_point), groups=groups, output=None), kernel)
    check_conv(conv(input=QParams(0.02, zero_point), groups=groups, output=QParams(0.03, zero_point)), kernel)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kernel", CONVS)
@pytest.mark.parametrize("output", [QParams(0.02, 20), None], ids=["uint8", "float"])
def test_conv_activation(kernel: str, activation: str, output: QParams | None) -> None:
    check_conv(conv(activation=activation, output=output), kernel)


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("kernel", CONVS)
@pytest.mark.parametrize("geometry", ["plain", "stride", "depthwise", "odd out", "pointwise", "one out"])
@pytest.mark.parametrize("layout", ["channels last", "contiguous", "sliced"])
def test_conv_residual(kernel: str, activation: str, geometry: str, layout: str) -> None:
    layer = conv(activation=activation, residual=QParams(0.017, 77), **GEOMETRIES[geometry])
    check_conv(layer, kernel, layout=layout)
    if layer.stride == (1, 1):
        check_conv(layer, kernel, side=(1, 1), layout=layout)


@pytest.mark.parametrize("activation", ["relu6", "hardswish", "silu", "gelu"])
@pytest.mark.parametrize("kernel", CONVS)
def test_conv_residual_with_what_onednn_cannot_fuse(kernel: str, activation: str) -> None:
    check_conv(conv(activation=activation, residual=QParams(0.017, 77)), kernel)


@pytest.mark.parametrize("kernel", CONVS)
def test_conv_packed_for_one_shape_is_right_for_others(kernel: str) -> None:
    layer = conv()
    run = CONVS[kernel](layer)
    assert run is not None
    for shape in [(2, 8, 9, 9), (1, 8, 5, 12), (3, 8, 16, 3)]:
        x = random_uint8(*shape)
        assert_matches(run(x), exact_conv(layer, x), layer.output)


@pytest.mark.parametrize("residual", [None, QParams(0.03, 7)], ids=["alone", "added"])
@pytest.mark.parametrize("padding", [(3, 0), (0, 3), (3, 3), (4, 5)], ids=str)
@pytest.mark.parametrize("kernel", CONVS)
def test_windows_in_the_padding_alone(
    kernel: str, padding: tuple[int, int], residual: QParams | None
) -> None:
    layer = conv(in_channels=1, out_channels=2, padding=padding, input=QParams(0.02, 128), residual=residual)
    check_conv(layer, kernel, 3, (8, 10))


@settings(max_examples=25, deadline=None)
@given(
    groups=st.sampled_from([1, 2, 3]),
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    zero_point=st.integers(0, 255),
    batch=st.integers(1, 3),
)
def test_any_conv(
    groups: int, channels: tuple[int, int], kernel: Any, zero_point: int, batch: int, **geometry: Any
) -> None:
    with torch.inference_mode():
        layer = conv(
            in_channels=groups * channels[0],
            out_channels=groups * channels[1],
            groups=groups,
            kernel_size=kernel,
            input=QParams(0.02, zero_point),
            output=None,
            **geometry,
        )
        for name in CONVS:
            check_conv(layer, name, batch, (8, 10))


@pytest.mark.parametrize("kernel", LINEARS)
@pytest.mark.parametrize("zero_point", [0, 128, 255])
@pytest.mark.parametrize("shape", [(1, 24), (20, 24), (2, 5, 24), (3, 7)], ids=str)
@pytest.mark.parametrize("output", [QParams(0.02, 90), None], ids=["uint8", "float"])
def test_linear(kernel: str, zero_point: int, shape: tuple[int, ...], output: QParams | None) -> None:
    layer = linear(shape[-1], input=QParams(0.02, zero_point), output=output, bias=zero_point != 255)
    x = random_uint8(*shape)
    assert_matches(LINEARS[kernel](layer)(x), exact_linear(layer, x, layer.input), output)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kernel", LINEARS)
def test_linear_activation(kernel: str, activation: str) -> None:
    layer = linear(activation=activation)
    x = random_uint8(6, 24)
    assert_matches(LINEARS[kernel](layer)(x), exact_linear(layer, x, layer.input), layer.output)


@pytest.mark.parametrize("low", [-3.0, 0.0, 2.0], ids=["mixed", "from zero", "far from zero"])
@pytest.mark.parametrize("kernel", DYNAMICS)
@pytest.mark.parametrize("shape", [(1, 24), (20, 24), (2, 5, 24), (2, 9)], ids=str)
def test_dynamic_linear(kernel: str, low: float, shape: tuple[int, ...]) -> None:
    layer = dynamic(shape[-1])
    x = low + 4 * torch.rand(shape, generator=torch.Generator().manual_seed(1))
    q = dynamic_qparams(x)
    assert q.scale == pytest.approx((max(float(x.max()), 0) - min(float(x.min()), 0)) / 255)
    assert_matches(DYNAMICS[kernel](layer)(x), exact_linear(layer, quantize(x, q), q), None)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("backend", [*BACKENDS, None])
def test_dynamic_linear_lets_what_is_not_finite_show(value: float, backend: Any) -> None:
    layer = dynamic()
    if backend:
        graph = fx.Graph()
        graph.output(graph.call_module("fc", (graph.placeholder("x"),)))
        prepare(Program({"fc": layer}, graph, input_spec=InputSpec((24,))), backend=backend)
    x = torch.ones(2, 24)
    x[1, 3] = value
    y = layer(x)
    assert y[0].isfinite().all()
    assert not y[1].isfinite().any()


def test_empty_dynamic_input() -> None:
    assert dynamic_qparams(torch.empty(0)).zero_point == 0


@pytest.mark.parametrize(
    "options",
    [(2, 2, 0), (3, 2, 1), (3, 1, 1), (5, 3, 2), ((3, 2), (1, 2), (1, 0)), (1, 2, 0), (2, None, 0)],
    ids=str,
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_max_pool(options: tuple[Any, Any, Any], channels_last: bool) -> None:
    pair = lambda v: v if isinstance(v, tuple) else (v, v)  # noqa: E731
    kernel, stride, padding = pair(options[0]), pair(options[1] or options[0]), pair(options[2])
    x = random_uint8(2, 5, 19, 23)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    expected = F.max_pool2d(x.double(), kernel, stride, padding)
    layer = QuantizedMaxPool2d(kernel, stride, padding, (1, 1), False)
    run = max_pool(layer)
    assert (run is None) == (kernel == (1, 1))
    for form in (run, layer.emulate):
        if form is not None:
            y = form(x)
            assert y.dtype == torch.uint8
            assert torch.equal(y.double(), expected)
            assert y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize(("dilation", "ceil"), [((2, 1), False), ((1, 1), True)])
def test_rare_max_pool(dilation: tuple[int, int], ceil: bool) -> None:
    layer = QuantizedMaxPool2d((3, 3), (2, 2), (1, 1), dilation, ceil)
    assert max_pool(layer) is None
    x = random_uint8(1, 3, 20, 20)
    assert torch.equal(layer(x).double(), F.max_pool2d(x.double(), 3, 2, 1, dilation, ceil))


@pytest.mark.parametrize("shape", [(2, 3, 9, 8), (1, 1, 5, 5)], ids=str)
@pytest.mark.parametrize("geometry", [((3, 3), (1, 1), (1, 1), (1, 1)), ((2, 3), (2, 1), (0, 2), (2, 1))])
def test_im2col_is_unfold(shape: tuple[int, ...], geometry: Any) -> None:
    kernel, stride, padding, dilation = geometry
    x = torch.randn(shape)
    rows, (n, oh, ow) = im2col(x, kernel, stride, padding, dilation, 0)
    expected = F.unfold(x, kernel, dilation, padding, stride)  # N, (C, KH, KW), positions
    expected = expected.unflatten(1, (shape[1], -1)).permute(0, 3, 2, 1).reshape(n * oh * ow, -1)
    assert torch.equal(rows, expected)


class _Residual(nn.Module):
    """A convolution with a residual, which is read again afterwards, or not."""

    def __init__(self, form: str) -> None:
        super().__init__()
        q = QParams(0.03, 100)
        same = {"in_channels": 8, "out_channels": 8, "input": q, "output": q}
        self.form = form
        self.quantize = Quantize(q)
        self.stem, self.one = conv(**same), conv(**same, seed=2)
        self.two = conv(**same, residual=q, activation="relu", seed=3)
        self.add = QuantizedAdd(q, q, q)

    def forward(self, x: Tensor) -> Any:
        stem = self.stem(self.quantize(x))
        if self.form == "early":
            return self.two(self.one(stem), stem)
        if self.form == "own input":
            return self.two(stem, stem)
        if self.form == "twice":
            return self.two(self.two(self.one(stem), stem), self.one(stem))
        if self.form == "view":
            return torch.cat([self.two(self.one(stem), stem), stem.flatten(2).view(stem.shape)], 1)
        if self.form == "both":
            return self.two(self.one(stem), stem), stem
        return self.add(self.two(self.one(stem), stem), stem)


@pytest.mark.parametrize("form", ["early", "own input", "twice", "view", "both", "late"])
def test_residual_is_overwritten_only_where_nobody_reads_it(form: str) -> None:
    net = _Residual(form)
    tracer = fx.Tracer()
    tracer.is_leaf_module = lambda module, name: True  # type: ignore[method-assign]
    program = Program(net, tracer.trace(net), input_spec=InputSpec((8, 9, 9)))
    x = torch.randn(2, 8, 9, 9, generator=torch.Generator().manual_seed(4))
    expected = prepare(program, backend="reference")(x)
    assert overwritable_residuals(program) == ({"two"} if form == "early" else set())
    got = prepare(program)(x)
    pairs = zip(got, expected, strict=True) if form == "both" else [(got, expected)]
    for a, b in pairs:
        # Ties may be rounded the other way in float32, and a convolution spreads that a little.
        assert (a.int() - b.int()).abs().max() <= 2
        assert (a != b).float().mean() < 0.01


def test_overwriting_saves_the_copy() -> None:
    layer = conv(residual=QParams(0.02, 50))
    x, residual = random_uint8(1, 8, 6, 6), random_uint8(1, 12, 6, 6, seed=2)
    kept, lost = (
        t.contiguous(memory_format=torch.channels_last) for t in (residual.clone(), residual.clone())
    )
    onednn.conv2d(layer, may_overwrite_residual=False)(x, kept)  # type: ignore[misc]
    onednn.conv2d(layer, may_overwrite_residual=True)(x, lost)  # type: ignore[misc]
    assert torch.equal(kept, residual)
    assert not torch.equal(lost, residual)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_on_a_cuda_device(geometry: str) -> None:
    layer = conv(**GEOMETRIES[geometry])
    x = random_uint8(2, layer.in_channels, 11, 9)
    real = exact_conv(layer, x)
    assert_matches(cuda.conv2d(layer.cuda())(x.cuda()), real, layer.output)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_linears_on_a_cuda_device() -> None:
    static, moving = linear(), dynamic()
    x = random_uint8(2, 5, 24)
    real = exact_linear(static, x, static.input)
    assert_matches(cuda.linear(static.cuda())(x.cuda()), real, static.output)
    floats = torch.randn(3, 24)
    q = dynamic_qparams(floats)
    real = exact_linear(moving, quantize(floats, q), q)
    assert_matches(cuda.dynamic_linear(moving.cuda())(floats.cuda()), real, None)


@pytest.mark.parametrize(
    ("device", "gpus", "says"),
    [
        ("cpu", 0, None),
        ("cuda", 0, "device='cuda': no CUDA device is available; use cpu"),
        ("cuda", 1, None),
        ("cuda:1", 2, None),
        ("cuda:2", 2, "device='cuda:2': there is no such device, of 2"),
    ],
)
def test_a_device_is_there_or_named(
    device: str, gpus: int, says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if says is None:
        require_device(device)
        return
    with pytest.raises(EnvironmentFailure) as caught:
        require_device(device)
    assert str(caught.value) == says


def test_linears_that_share_a_weight_share_its_packed_form() -> None:
    with torch.inference_mode(False):
        weight = torch.randint(-60, 60, (10, 24), dtype=torch.int8)
        packed = onednn._packed_weight(weight)
        assert onednn._packed_weight(weight) is packed
        weight += 1
        assert onednn._packed_weight(weight) is not packed
