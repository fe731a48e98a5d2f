"""Integers of fewer than 8 bits: every operation against integer arithmetic in numpy, at every width."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from kernel_cases import conv, exact_conv, generator, linear, random_uint8
from torch import Tensor

from modelopt_cli.kernels import BACKENDS
from modelopt_cli.program.quantization import QParams, qparams_from_range, quantize
from modelopt_cli.program.quantized_convolutions import (
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedConvTranspose2d,
)
from modelopt_cli.program.quantized_embedding import QuantizedEmbedding
from modelopt_cli.program.quantized_linear import DynamicLinear, QuantizedLinear
from modelopt_cli.program.quantized_operations import (
    Quantize,
    QuantizedAdd,
    QuantizedAvgPool2d,
    QuantizedMul,
)
from modelopt_cli.program.quantized_recurrent import QuantizedGRU, state_qparams

WIDTHS = range(2, 9)
BACKEND_NAMES = ("emulate", *BACKENDS)
Array = npt.NDArray[Any]

pytestmark = pytest.mark.usefixtures("inference")


def kernel(layer: Any, backend: str) -> Any:
    if backend == "emulate":
        return layer.emulate
    kernels = BACKENDS[backend]
    return kernels.build(layer, False) or layer.emulate


def assert_levels(got: Tensor, real: Array, output: QParams) -> None:
    """``got`` is ``real`` on ``output``'s levels; another level is accepted only right next to a tie."""
    assert got.dtype == torch.uint8
    level = np.clip(real / output.scale + output.zero_point, 0, 2**output.bits - 1)
    assert np.abs(got.numpy().astype(float) - level).max() <= 0.5 + 2e-3
    assert int(got.max()) == 2**output.bits - 1, "the case does not reach the largest level"
    assert got.unique().numel() > 2


def output_of(bits: int, real: Array) -> QParams:
    """QParams that clip the largest of these values."""
    q = qparams_from_range(float(np.quantile(real, 0.05)), float(np.quantile(real, 0.9)), bits)
    return q


def numpy_conv(x: Array, weight: Array, zero_point: int, stride: int, padding: int) -> Array:
    """Sums of a convolution in int64."""
    x = np.pad(x.astype(np.int64) - zero_point, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], (2, 3))
    windows = windows[:, :, ::stride, ::stride]
    return np.einsum("nchwij,ocij->nohw", windows, weight.astype(np.int64))


def real_conv(layer: Any, x: Tensor, residual: Tensor | None = None) -> Array:
    sums = numpy_conv(x.numpy(), layer.weight.numpy(), layer.input.zero_point, 2, 1)
    real = sums * layer.input.scale * layer.scale.double().numpy()[:, None, None]
    real = real + layer.bias.double().numpy()[:, None, None]
    if residual is not None:
        real = real + layer.residual.scale * (residual.numpy().astype(np.int64) - layer.residual.zero_point)
    return np.maximum(real, 0) if layer.activation == "relu" else real  # type: ignore[no-any-return]


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_convolutions(backend: str, bits: int, activation: str, residual: bool) -> None:
    top = 2**bits - 1
    other = QParams(0.7 / top, top // 2, bits) if residual else None
    options = {"in_channels": 8, "stride": 2, "activation": activation, "weight_bits": bits}
    layer = conv(**options, input=QParams(3.0 / top, top // 3, bits), residual=other)
    assert int(layer.weight.max()) == (1 << bits - 1) - 1 or bits == 8
    assert int(layer.weight.min()) >= -(1 << bits - 1)
    x = random_uint8(2, 8, 11, 9, bits=bits)
    added = [random_uint8(2, 12, 6, 5, seed=3, bits=bits)] if residual else []
    real = real_conv(layer, x, *added)
    layer.output = output_of(bits, real)
    got = kernel(layer, backend)(x, *(a.clone() for a in added))
    assert_levels(got, real, layer.output)


OTHERS: dict[str, Any] = {
    "1d": (QuantizedConv1d, {}, (11,)),
    "3d": (QuantizedConv3d, {}, (5, 6, 4)),
    "transposed": (QuantizedConvTranspose2d, {"stride": 2}, (5, 6)),
    "depthwise": (QuantizedConv2d, {"in_channels": 12, "groups": 12}, (7, 6)),
    "relu6": (QuantizedConv2d, {"activation": "relu6"}, (7, 6)),
    "silu": (QuantizedConv2d, {"activation": "silu"}, (7, 6)),
}


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("kind", OTHERS)
def test_other_convolutions(backend: str, bits: int, kind: str) -> None:
    make, options, size = OTHERS[kind]
    top = 2**bits - 1
    layer = conv(make, **options, input=QParams(3.0 / top, top // 3, bits), weight_bits=bits)
    x = random_uint8(2, layer.in_channels, *size, bits=bits)
    real = exact_conv(layer, x).numpy()
    layer.output = output_of(bits, real)
    assert_levels(kernel(layer, backend)(x), real, layer.output)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("activation", ["none", "relu", "hardswish"])
def test_linears(backend: str, bits: int, activation: str) -> None:
    top = 2**bits - 1
    options = {"activation": activation, "weight_bits": bits}
    layer = linear(in_features=24, out_features=16, **options, input=QParams(3.0 / top, top // 3, bits))
    x = random_uint8(33, 24, bits=bits)
    sums = (x.numpy().astype(np.int64) - layer.input.zero_point) @ layer.weight.numpy().astype(np.int64).T
    real = sums * layer.input.scale * layer.scale.double().numpy() + layer.bias.double().numpy()
    after: dict[str, Any] = {
        "none": lambda y: y,
        "relu": lambda y: np.maximum(y, 0),
        "hardswish": lambda y: y * np.clip(y + 3, 0, 6) / 6,
    }
    real = after[activation](real)
    layer.output = output_of(bits, real)
    assert_levels(kernel(layer, backend)(x), real, layer.output)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_dynamic_linears(backend: str, bits: int) -> None:
    layer = DynamicLinear(24, 10, False, weight_bits=4, input_bits=bits)
    layer.weight.copy_(torch.randint(-8, 8, (10, 24), generator=generator(0)))
    layer.scale.copy_(torch.rand(10, generator=generator(1)) + 0.5)
    x = torch.randn(33, 24, generator=generator(2))
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = (high - low) / (2**bits - 1)
    zero_point = round(-low / scale)
    steps = np.clip(np.rint(x.numpy() * np.float32(1 / scale)) + zero_point, 0, 2**bits - 1).astype(np.int64)
    assert (steps.min(), steps.max()) == (0, 2**bits - 1)
    sums = (steps - zero_point) @ layer.weight.numpy().astype(np.int64).T
    got = kernel(layer, backend)(x)
    np.testing.assert_allclose(got.numpy(), sums * scale * layer.scale.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", WIDTHS)
def test_quantize_rounds_half_to_even_and_clamps(bits: int) -> None:
    top = 2**bits - 1
    q = QParams(0.5, top // 2, bits)
    x = torch.arange(-300, 301) / 4
    expected = np.clip(np.rint(x.numpy().astype(float) / 0.5) + top // 2, 0, top)
    assert np.array_equal(quantize(x, q).numpy(), expected)
    assert np.array_equal(Quantize(q)(x).numpy(), expected)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("operation", ["add", "mul", "average"])
def test_operations_without_weights(bits: int, operation: str) -> None:
    top = 2**bits - 1
    a, b = (random_uint8(2, 6, 8, 8, seed=seed, bits=bits) for seed in (1, 2))
    qa, qb = QParams(1.5 / top, top // 3, bits), QParams(0.8 / top, top // 2, bits)
    real_a = 1.5 / top * (a.numpy().astype(np.int64) - top // 3)
    real_b = 0.8 / top * (b.numpy().astype(np.int64) - top // 2)
    if operation == "add":
        real = np.maximum(real_a + real_b, 0)
        output = output_of(bits, real)
        got = QuantizedAdd(qa, qb, output, "relu")(a, b)
    elif operation == "mul":
        real = real_a * real_b
        output = output_of(bits, real)
        got = QuantizedMul(output)(torch.from_numpy(real_a).float(), torch.from_numpy(real_b).float())
    else:
        real = real_a.reshape(2, 6, 4, 2, 4, 2).mean((3, 5))
        output = output_of(bits, real)
        windows: dict[str, Any] = {"kernel_size": (2, 2), "stride": (2, 2)}
        got = QuantizedAvgPool2d(qa, output, **windows)(a)
    assert_levels(got, real, output)


@pytest.mark.parametrize("bits", WIDTHS)
def test_an_embedding_gives_its_rows(bits: int) -> None:
    layer = QuantizedEmbedding(9, 4, weight_bits=bits)
    half = 1 << bits - 1
    layer.weight.copy_(torch.randint(-half, half, (9, 4), generator=generator(0)))
    layer.scale.copy_(torch.rand(9, generator=generator(1)))
    layer.check()
    expected = layer.weight.numpy() * layer.scale.numpy()[:, None]
    assert np.array_equal(layer(torch.tensor([3, 8])).numpy(), expected[[3, 8]])


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_a_layer_refuses_a_weight_of_more_bits(bits: int) -> None:
    layer = linear(weight_bits=bits)
    layer.check()
    layer.weight[0, 0] = 1 << bits - 1
    with pytest.raises(ValueError, match=f"not an integer of {bits} bits"):
        layer.check()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_recurrent_layers_round_inputs_and_states_to_their_width(bits: int) -> None:
    """A step by hand: products of integers, gates in float64."""
    top = 2**bits - 1
    source, state = QParams(2.0 / top, top // 2, bits), state_qparams(bits)
    assert (state.scale, state.zero_point) == (1 / ((1 << bits - 1) - 1), 1 << bits - 1)
    layer = QuantizedGRU(6, 5, 1, True, True, False, source, weight_bits=bits, state_bits=bits)
    half = 1 << bits - 1
    for number, linear_layer in enumerate(layer.children()):
        assert isinstance(linear_layer, QuantizedLinear)
        assert linear_layer.weight_bits == bits
        shape = linear_layer.weight.shape
        linear_layer.weight.copy_(torch.randint(-half, half, shape, generator=generator(number)))
        linear_layer.scale.copy_(torch.rand(15, generator=generator(5 + number)) / half)
        assert linear_layer.bias is not None
        linear_layer.bias.copy_(torch.randn(15, generator=generator(7 + number)))
    x = torch.randn(2, 1, 6, generator=generator(9))
    start = torch.rand(1, 2, 5, generator=generator(10)) * 2 - 1

    def product(name: str, value: Array, q: QParams) -> Array:
        part: Any = layer.get_submodule(name)
        steps = np.clip(np.rint(value * np.float32(1 / q.scale)) + q.zero_point, 0, top).astype(np.int64)
        sums = (steps - q.zero_point) @ part.weight.numpy().astype(np.int64).T
        return sums * q.scale * part.scale.double().numpy() + part.bias.double().numpy()  # type: ignore[no-any-return]

    i = np.split(product("ih_l0", x[:, 0].numpy(), source), 3, -1)
    h = np.split(product("hh_l0", start[0].numpy(), state), 3, -1)
    sigmoid = lambda y: 1 / (1 + np.exp(-y))  # noqa: E731
    update = sigmoid(i[1] + h[1])
    new = np.tanh(i[2] + sigmoid(i[0] + h[0]) * h[2])
    expected = new + update * (start[0].numpy() - new)
    _, last = layer(x, start)
    np.testing.assert_allclose(last[0].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_files_name_bits_only_where_they_are_not_eight() -> None:
    wide = linear()
    assert wide.config()["input"] == [0.02, 113]
    assert "weight_bits" not in wide.config()
    narrow = linear(input=QParams(0.02, 11, 4), weight_bits=3)
    assert narrow.config()["input"] == [0.02, 11, 4]
    assert narrow.config()["weight_bits"] == 3
    for layer in (wide, narrow):
        again = QuantizedLinear.from_config(layer.config())
        assert (again.input, again.weight_bits) == (layer.input, layer.weight_bits)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ((0.1, 16, 4), r"zero_point must be in 0\.\.15"),
        ((0.1, 0, 9), "bits must be 2 to 8"),
        ((0.1, 0, 1), "bits must be 2 to 8"),
        ((0.1, 0, True), "bits must be 2 to 8"),
    ],
)
def test_scales_and_zero_points_fit_their_bits(values: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        QParams(*values)
    if values[2] is not True:
        with pytest.raises(ValueError, match=problem):
            QuantizedLinear.from_config({**linear().config(), "input": list(values)})
