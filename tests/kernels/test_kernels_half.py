"""Layers in half precision, and int4 operators: chosen by device and layer, right to rounding, copied."""

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelopt_cli.artifact import predicted_bytes, read_program, write_program
from modelopt_cli.artifact.codecs.base import Steps
from modelopt_cli.artifact.encodings import spread_steps
from modelopt_cli.errors import UsageError
from modelopt_cli.kernels import half_layers, prepare
from modelopt_cli.kernels.half_layers import INT4_ROWS, computed_in_half, has_int4, obstacle
from modelopt_cli.kernels.int4 import Int4Product, int4_obstacle
from modelopt_cli.measure.half_note import half_note
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.quantize.apply import apply
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.stored_weights import WeightSteps, encode_weight
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.capture import capture

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _without_gradients(one_thread: None) -> Iterator[None]:
    with torch.no_grad():
        yield


class Net(nn.Module):
    """Convolutions, one of them depthwise, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, groups=32)
        self.point, self.hidden, self.head = nn.Conv2d(32, 64, 1), nn.Linear(64, 48), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(self.depth(self.stem(x).relu()).relu()).relu().mean((2, 3))
        return self.head(self.hidden(x).relu())  # type: ignore[no-any-return]


def made(**options: Any) -> Program:
    torch.manual_seed(0)
    program = capture(Net().eval(), InputSpec((3, 8, 8)), verify=False)
    return apply(program, QuantizeConfig(**options), Context()).program


def images() -> Tensor:
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def has_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that computes in any half-precision type, as every CPU can, however slowly."""
    monkeypatch.setattr(half_layers, "obstacle", lambda *_: None)


@pytest.mark.parametrize(
    ("dtype", "features", "reason"),
    [
        (torch.bfloat16, {"amx_bf16": True}, None),
        (torch.bfloat16, {"avx512_bf16": True}, "this CPU has no bfloat16 units (amx_bf16)"),
        (torch.float16, {"amx_bf16": True}, "this CPU has no float16 units (amx_fp16)"),
        (torch.float16, {"amx_fp16": True}, None),
    ],
    ids=str,
)
def test_the_rule_for_cpus(dtype: torch.dtype, features: dict[str, bool], reason: str | None) -> None:
    assert obstacle(dtype, CPU, features) == reason


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)], ids=str)
def test_the_rule_for_gpus(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert obstacle(torch.float16, torch.device("cuda")) is None
    expected = None if capability == (8, 0) else "this GPU has no bfloat16 units"
    assert obstacle(torch.bfloat16, torch.device("cuda")) == expected


@pytest.mark.parametrize(("scheme", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_casts_are_stored_in_half_and_compute_in_it(
    scheme: str, dtype: torch.dtype, has_units: None, tmp_path: Path
) -> None:
    program, x = made(scheme=scheme), images()
    written = write_program(program, tmp_path / "file")
    assert written.file_bytes == predicted_bytes(program)
    weights = {n: w for n, w in program.state_dict().items() if n.endswith("weight")}
    assert all(torch.equal(w, w.to(dtype).float()) for w in weights.values())
    back = prepare(read_program(tmp_path / "file"))
    assert torch.equal(read_program(tmp_path / "file")(x), program(x))
    assert computed_in_half(back) == 4  # all but the depthwise one
    # Each product by hand, in the type; sums of it are rounded once more.
    layer: Any = back.get_submodule("hidden")
    rows = torch.randn(9, 64, generator=torch.Generator().manual_seed(2))
    exact = rows.to(dtype).double() @ layer.weight.double().t() + layer.bias.to(dtype).double()
    got = layer(rows)
    assert got.dtype == torch.float32
    assert torch.equal(got, got.to(dtype).float())
    error = torch.finfo(dtype).eps * exact.abs().clamp(min=0.1)
    assert bool(((got.double() - exact).abs() <= error).all())
    assert not torch.equal(back(x), program(x))
    torch.testing.assert_close(back(x), program(x), rtol=0.05, atol=0.02)
    note = half_note(back)
    assert note == f"4 of its layers compute in {str(dtype).removeprefix('torch.')}"
    again = prepare(read_program(tmp_path / "file"))
    assert torch.equal(again(x), back(x))


def test_without_units_the_same_weights_compute_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False})
    program, x = made(scheme="bf16"), images()
    expected = program(x)
    prepare(program)
    assert computed_in_half(program) == 0
    assert torch.equal(program(x), expected)
    assert half_note(program) == (
        "stored for bfloat16, and computed in float32: this CPU has no bfloat16 units (amx_bf16)"
    )


def test_copies_compute_the_same_and_other_backends_in_float32(has_units: None) -> None:
    program, x = made(scheme="bf16"), images()
    expected = program(x)
    prepare(program)
    half = program(x)
    assert torch.equal(copy.deepcopy(program)(x), half)
    assert torch.equal(prepare(copy.deepcopy(program), "cpu", "reference")(x), expected)
    buffer = io.BytesIO()
    torch.save(program, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    torch.testing.assert_close(loaded(x), half, rtol=0.05, atol=0.02)


def test_values_are_the_same_with_gradients_which_are_those_of_the_layer(has_units: None) -> None:
    program = prepare(made(scheme="bf16")).requires_grad_(True)
    layer: Any = program.get_submodule("hidden")
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    half = layer(x.detach())
    with torch.enable_grad():
        got, real = layer(x), nn.functional.linear(x, layer.weight, layer.bias)
        assert torch.equal(got, half)
        assert not torch.equal(got, real)
        wanted = (x, layer.weight, layer.bias)
        for mine, theirs in zip(
            torch.autograd.grad(got.sum(), wanted), torch.autograd.grad(real.sum(), wanted), strict=True
        ):
            assert torch.equal(mine, theirs)
    layer.train()
    with torch.enable_grad():
        assert torch.equal(layer(x), real)


def test_a_changed_weight_is_cast_again(has_units: None) -> None:
    layer: Any = prepare(made(scheme="bf16")).get_submodule("hidden")
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(2))
    before = layer(x)
    layer.weight.mul_(2)
    assert float((layer(x) - before).abs().max()) > 0.1


def test_a_kernel_that_is_wrong_is_not_used(has_units: None, monkeypatch: pytest.MonkeyPatch) -> None:
    call = half_layers.HalfKernel.__call__
    monkeypatch.setattr(half_layers.HalfKernel, "__call__", lambda *args: call(*args) * 1.1)
    assert computed_in_half(prepare(made(scheme="bf16"))) == 0


def test_weights_beyond_float16_are_refused() -> None:
    torch.manual_seed(0)
    net = Net().eval()
    net.hidden.weight[0, 0] = 1e6
    program = capture(net, InputSpec((3, 8, 8)), verify=False)
    with pytest.raises(UsageError, match=r"hidden\.weight.* beyond the half-precision type"):
        apply(program, QuantizeConfig("fp16"), Context())


@pytest.mark.parametrize("option", [{"weight_bits": 4}, {"act_bits": 16}, {"group_size": 8}], ids=str)
def test_casts_have_no_bits_to_choose(option: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="scheme bf16 casts weights to bfloat16"):
        QuantizeConfig("bf16", **option)


# --- int4 ---------------------------------------------------------------------------------------------


def stored(
    outputs: int, inputs: int, group: int | None, asymmetric: bool = False, bits: int = 4
) -> tuple[nn.Linear, Any]:
    layer = nn.Linear(inputs, outputs)
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(3)) + 0.2
    rounded, encoding = encode_weight(weight, WeightSteps(bits, group, asymmetric, half_scales=True))
    layer.weight.data = rounded
    return layer, encoding


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("inputs", "group"), [(128, 32), (256, 64), (128, 128), (192, None)], ids=str)
def test_int4_products_are_those_of_the_integers(inputs: int, group: int | None, asymmetric: bool) -> None:
    layer, encoding = stored(32, inputs, group, asymmetric)
    assert int4_obstacle(layer, encoding, torch.bfloat16) is None
    steps = spread_steps(encoding, (32, inputs))
    assert isinstance(steps, Steps)
    product = Int4Product.of(layer.weight, steps, encoding.params["group"])
    assert product.packed.numel() * product.packed.itemsize == 32 * inputs // 2
    # The integers themselves: one row of ones for each input feature would show them; so do unit rows.
    got = torch.cat([product(rows) for rows in torch.eye(inputs).split(16)])
    scale, zero = steps.scale.expand(32, inputs), steps.zero_point
    integers = encoding.integers.double()
    exact = integers * scale.double()
    added = torch.zeros_like(exact) if zero is None else -(zero.expand(32, inputs).double() * scale.double())
    expected = (exact + added.to(torch.bfloat16).double()).t()
    assert bool(((got.double() - expected).abs() <= 2**-7 * expected.abs().clamp(min=0.05)).all())


@pytest.mark.parametrize(
    ("shape", "options", "reason"),
    [
        ((32, 128, 32), {"bits": 3}, "no 4-bit integers"),
        ((30, 128, 32), {}, "30 outputs are no multiple of 16"),
        ((32, 128, 16), {}, "groups are not of 32, 64, 128, 256"),
        ((32, 160, 64), {}, "groups are not of 32, 64, 128, 256 features that divide 160"),
        ((32, 40, None), {}, "groups are not of 32, 64, 128, 256 features that divide 40"),
    ],
    ids=str,
)
def test_int4_operators_take_only_shapes_that_fit(
    shape: tuple[int, int, int | None], options: dict[str, int], reason: str
) -> None:
    layer, encoding = stored(*shape, **options)
    found = int4_obstacle(layer, encoding, torch.bfloat16)
    assert found is not None
    assert reason in found
    assert int4_obstacle(layer, encoding, torch.float32) is not None


def test_few_rows_go_through_int4_and_many_through_bfloat16(
    has_units: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = {"scheme": "int8-weight", "weight_bits": 4, "act_bits": 16, "group_size": 32, "edge_bits": 4}
    program = made(**options)
    assert program.encodings["hidden.weight"].parts["scale"].dtype == torch.bfloat16
    write_program(program, tmp_path / "file", code="packed")
    back = prepare(read_program(tmp_path / "file"))
    assert has_int4(back) == 1  # the head has too few outputs
    rows: list[int] = []
    call = Int4Product.__call__
    monkeypatch.setattr(Int4Product, "__call__", lambda self, x: rows.append(len(x)) or call(self, x))
    layer: Any = back.get_submodule("hidden")
    for count in (1, INT4_ROWS, INT4_ROWS + 1, 0):
        x = torch.randn(count, 64, generator=torch.Generator().manual_seed(2))
        expected = nn.functional.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=0.02, atol=0.03)
    assert rows == [1, INT4_ROWS]
    x = torch.randn(2, 2, 64, generator=torch.Generator().manual_seed(2))
    assert layer(x).shape == (2, 2, 48)
    assert "1 of them through int4 operators" in str(half_note(back))
    assert torch.equal(prepare(read_program(tmp_path / "file"))(images()), back(images()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
def test_int4_products_on_cuda(asymmetric: bool) -> None:
    layer, encoding = stored(64, 256, 64, asymmetric)
    steps = spread_steps(encoding, (64, 256))
    assert steps is not None
    layer.cuda()
    product = Int4Product.of(layer.weight, steps, 64)
    x = torch.randn(3, 256, device="cuda")
    torch.testing.assert_close(product(x), x @ layer.weight.t(), rtol=0.02, atol=0.1)
