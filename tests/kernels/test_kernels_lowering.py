"""Convolutions that are computed as 2-D ones: every backend has the integer sums of float64, exactly."""

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_cases import assert_matches, conv, exact_conv, exact_sums, random_uint8
from torch import Tensor

from modelopt_cli.kernels import BACKENDS, never_saturates
from modelopt_cli.program.quantization import QParams
from modelopt_cli.program.quantized_convolutions import (
    QuantizedConv1d,
    QuantizedConv3d,
    QuantizedConvTranspose1d,
    QuantizedConvTranspose2d,
)

SIDES = {1: (19,), 2: (7, 6), 3: (5, 6, 7)}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "rows": (QuantizedConv1d, {}),
    "rows, strided": (QuantizedConv1d, {"kernel_size": 5, "stride": 3, "padding": 2}),
    "rows, dilated": (QuantizedConv1d, {"dilation": 4, "padding": 4}),
    "rows, depthwise": (QuantizedConv1d, {"in_channels": 12, "groups": 12}),
    "rows, grouped": (QuantizedConv1d, {"groups": 2, "has_bias": False}),
    "rows, pointwise": (QuantizedConv1d, {"kernel_size": 1, "padding": 0}),
    "rows, one channel": (QuantizedConv1d, {"in_channels": 1, "kernel_size": 9, "stride": 4}),
    "rows, one channel, dilated": (
        QuantizedConv1d,
        {"in_channels": 1, "kernel_size": 3, "dilation": 4, "padding": 6, "has_bias": False},
    ),
    "rows, one channel, added": (
        QuantizedConv1d,
        {"in_channels": 1, "residual": QParams(0.017, 77), "activation": "relu"},
    ),
    "rows, odd": (QuantizedConv1d, {"in_channels": 7, "out_channels": 5}),
    "rows, windows in the padding": (QuantizedConv1d, {"padding": 5}),
    "rows, added": (QuantizedConv1d, {"residual": QParams(0.017, 77), "activation": "relu"}),
    "volumes": (QuantizedConv3d, {}),
    "volumes, strided": (
        QuantizedConv3d,
        {"kernel_size": (3, 5, 2), "stride": (2, 1, 3), "padding": (1, 2, 0)},
    ),
    "volumes, dilated": (QuantizedConv3d, {"dilation": (2, 1, 2), "padding": 2}),
    "volumes, grouped": (QuantizedConv3d, {"groups": 4, "has_bias": False}),
    "volumes, depthwise": (QuantizedConv3d, {"in_channels": 12, "groups": 12}),
    "volumes, pointwise": (QuantizedConv3d, {"kernel_size": 1, "padding": 0}),
    "volumes, flat": (QuantizedConv3d, {"kernel_size": (1, 3, 3), "padding": (0, 1, 1)}),
    "volumes, only depth": (QuantizedConv3d, {"kernel_size": (3, 1, 1), "padding": (1, 0, 0)}),
    "volumes, odd": (QuantizedConv3d, {"in_channels": 3, "out_channels": 5}),
    "volumes, odd and even": (QuantizedConv3d, {"in_channels": 3, "kernel_size": 2}),
    "volumes, one channel": (QuantizedConv3d, {"in_channels": 1}),
    "volumes, added": (QuantizedConv3d, {"residual": QParams(0.017, 77), "activation": "relu"}),
    "transposed rows": (QuantizedConvTranspose1d, {"kernel_size": 4, "stride": 2, "padding": 1}),
    "transposed rows, wide": (QuantizedConvTranspose1d, {"kernel_size": 16, "stride": 8, "padding": 4}),
    "transposed": (QuantizedConvTranspose2d, {"kernel_size": 2, "stride": 2, "padding": 0}),
    "transposed, overlapping": (
        QuantizedConvTranspose2d,
        {"kernel_size": (3, 5), "stride": (2, 3), "padding": (1, 2), "output_padding": (1, 2)},
    ),
    "transposed, grouped": (QuantizedConvTranspose2d, {"kernel_size": 4, "stride": 2, "groups": 4}),
    "transposed, stride 1": (QuantizedConvTranspose2d, {"dilation": (2, 1), "padding": (4, 0)}),
    "transposed, stride 1, added row": (
        QuantizedConvTranspose2d,
        {"dilation": (2, 1), "padding": (0, 1), "output_padding": (1, 0)},
    ),
    "transposed, depthwise": (
        QuantizedConvTranspose2d,
        {"in_channels": 12, "groups": 12, "kernel_size": 4, "stride": 2},
    ),
    "transposed, multiplier": (
        QuantizedConvTranspose2d,
        {"in_channels": 6, "groups": 6, "kernel_size": 3, "stride": 2, "output_padding": 1},
    ),
    "transposed, dilated": (
        QuantizedConvTranspose2d,
        {"stride": 2, "dilation": 3, "padding": 2, "output_padding": 2},
    ),
    "transposed, stride beyond the kernel": (
        QuantizedConvTranspose1d,
        {"kernel_size": 2, "stride": 5, "padding": 0, "output_padding": 4},
    ),
    "transposed, no bias": (QuantizedConvTranspose2d, {"has_bias": False, "in_channels": 3, "stride": 2}),
    "transposed, padded beyond the kernel": (QuantizedConvTranspose1d, {"padding": 4, "stride": 2}),
}
KERNELS = ["emulate", *BACKENDS]


pytestmark = pytest.mark.usefixtures("inference")


def kernel(layer: Any, name: str) -> Any:
    run = layer.emulate if name == "emulate" else BACKENDS[name].build(layer, False)
    assert run is not None
    return run


def inputs(layer: Any, batch: int = 2) -> list[Tensor]:
    x = random_uint8(batch, layer.in_channels, *SIDES[layer.rank])
    if layer.residual is None:
        return [x]
    return [x, random_uint8(*exact_sums(layer, x).shape, seed=9)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", KERNELS)
def test_outputs(name: str, backend: str) -> None:
    kind, options = CASES[name]
    for zero_point, activation in ((113, options.get("activation", "none")), (0, "relu"), (255, "silu")):
        layer = conv(kind, **options | {"input": QParams(0.02, zero_point), "activation": activation})
        args = inputs(layer)
        before = [x.clone() for x in args]
        assert_matches(kernel(layer, backend)(*args), exact_conv(layer, *args), layer.output)
        assert all(map(torch.equal, args, before))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_are_the_same_integers(name: str, backend: str) -> None:
    kind, options = CASES[name]
    plain = {"input": QParams(1.0, 200), "output": None, "activation": "none", "has_bias": False}
    layer = conv(kind, **{k: v for k, v in options.items() if k != "residual"} | plain)
    layer.scale.fill_(1.0)
    (x,) = inputs(layer)
    assert torch.equal(kernel(layer, backend)(x).double(), exact_sums(layer, x))


@settings(max_examples=30, deadline=None)
@given(
    groups=st.sampled_from([1, 2, 3]),
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    kernel_size=st.integers(1, 5),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    dilation=st.integers(1, 3),
    zero_point=st.integers(0, 255),
    batch=st.integers(1, 3),
)
def test_any_rows(
    groups: int, channels: tuple[int, int], zero_point: int, batch: int, **geometry: int
) -> None:
    with torch.inference_mode():
        layer = conv(
            QuantizedConv1d,
            in_channels=groups * channels[0],
            out_channels=groups * channels[1],
            groups=groups,
            input=QParams(0.02, zero_point),
            output=None,
            **geometry,
        )
        (x,) = inputs(layer, batch)
        for backend in KERNELS:
            assert_matches(kernel(layer, backend)(x), exact_conv(layer, x), None)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from([QuantizedConvTranspose1d, QuantizedConvTranspose2d]),
    groups=st.sampled_from([1, 2, 3]),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    data=st.data(),
    zero_point=st.integers(0, 255),
)
def test_any_transposed(
    kind: Any, groups: int, channels: tuple[int, int], data: st.DataObject, zero_point: int
) -> None:
    windows: dict[str, list[int]] = {}
    for length in SIDES[kind.rank]:
        kernel_size, stride, dilation = (data.draw(st.integers(1, most)) for most in (6, 4, 2))
        side = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
        side["padding"] = data.draw(st.integers(0, dilation * (kernel_size - 1)))
        side["output_padding"] = data.draw(st.integers(0, max(stride, dilation) - 1))
        outputs = (length - 1) * stride - 2 * side["padding"] + dilation * (kernel_size - 1)
        assume(outputs + side["output_padding"] >= 0)
        for name, value in side.items():
            windows.setdefault(name, []).append(value)
    with torch.inference_mode():
        layer = conv(
            kind,
            in_channels=groups * channels[0],
            out_channels=groups * channels[1],
            groups=groups,
            input=QParams(0.02, zero_point),
            output=None,
            **{name: tuple(values) for name, values in windows.items()},
        )
        x = random_uint8(2, layer.in_channels, *SIDES[kind.rank])
        for backend in KERNELS:
            assert_matches(kernel(layer, backend)(x), exact_conv(layer, x), None)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("transposed")])
def test_transposed_convolutions_reach_the_kernels(name: str) -> None:
    """All but those padded beyond the kernel, and at no more work than the zeros between inputs would be."""
    kind, options = CASES[name]
    layer = conv(kind, **options)
    lowered = _lowered(layer)
    assert (lowered is None) == ("padded" in name)
    if lowered is not None:
        outputs = math.prod(lowered.conv.stride)
        assert outputs == 1
        assert lowered.conv.weight.numel() <= layer.weight.numel() * math.prod(layer.stride)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("volumes")])
def test_volumes_never_saturate(name: str) -> None:
    """Taps along depth are channels that are multiplied together, so the bound on pairs holds across them."""
    kind, options = CASES[name]
    layer = conv(kind, **options)
    lowered = _lowered(layer).conv
    assert never_saturates(lowered.weight, lowered.groups)
    weight = torch.randint(-9, 9, layer.weight.shape)
    assert torch.equal(layer.turned(layer.turned(weight)), weight)


@settings(max_examples=40, deadline=None)
@given(
    groups=st.sampled_from([1, 2, 3]),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel_size=st.tuples(*[st.integers(1, 3)] * 3),
    stride=st.tuples(*[st.integers(1, 2)] * 3),
    padding=st.tuples(*[st.integers(0, 2)] * 3),
    dilation=st.tuples(*[st.integers(1, 2)] * 3),
    zero_point=st.integers(0, 255),
)
def test_any_volumes(groups: int, channels: tuple[int, int], zero_point: int, **geometry: Any) -> None:
    with torch.inference_mode():
        layer = conv(
            QuantizedConv3d,
            in_channels=groups * channels[0],
            out_channels=groups * channels[1],
            groups=groups,
            input=QParams(0.02, zero_point),
            output=None,
            **geometry,
        )
        (x,) = inputs(layer)
        for backend in KERNELS:
            assert_matches(kernel(layer, backend)(x), exact_conv(layer, x), None)


def test_rows_are_not_copied() -> None:
    layer = conv(QuantizedConv1d, kernel_size=1, padding=0)
    x = random_uint8(2, 19, 8).transpose(1, 2)  # channels last in memory
    seen: list[Tensor] = []
    lowered = _lowered(layer)
    y = lowered.around(lambda image: (seen.append(image), image)[1])(x)
    assert seen[0].shape == (2, 8, 1, 19)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert seen[0].data_ptr() == x.data_ptr() == y.data_ptr()
    assert lowered.conv.weight.data_ptr() == layer.weight.data_ptr()


def _lowered(layer: Any) -> Any:
    from modelopt_cli.kernels.lowering import LOWERINGS

    return LOWERINGS[type(layer)](layer)
