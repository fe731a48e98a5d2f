"""2:4 kernels: when they are chosen, what they compute, and what leads back to the dense product.

Without a CUDA device torch's two int8 operators are stood in for by dense ones of the same arguments and
checks; what only a device can show is skipped.
"""

import copy
from typing import Any

import pytest
import torch
from kernel_cases import assert_matches, conv, dynamic, exact_conv, exact_linear, linear, random_uint8
from torch import Tensor, nn

from modelopt_cli.artifact.encodings import compact
from modelopt_cli.kernels import cuda, prepare, sparse24
from modelopt_cli.kernels.sparse24 import SPARSE, Support, is_two_of_four, obstacle, reason, support
from modelopt_cli.measure.sparsity import sparsity_note
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.capture import capture
from modelopt_cli.program.quantization import dynamic_qparams, quantize

NEEDS_CUDA = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def two_of_four(weight: Tensor) -> Tensor:
    """A weight with the two smallest of every four input channels zeroed; a rest of two stays."""
    rows = weight.movedim(1, -1).clone()
    whole = rows.shape[-1] // 4 * 4
    groups = rows[..., :whole].unflatten(-1, (-1, 4))
    rank = groups.abs().float().argsort(-1).argsort(-1)
    rows[..., :whole] = (groups * (rank >= 2)).flatten(-2)
    return rows.movedim(-1, 1)


@pytest.mark.parametrize(
    ("capability", "cusparselt", "backend"),
    [
        ((7, 5), True, None),
        ((8, 0), True, "cusparselt"),
        ((8, 6), False, "cutlass"),
        ((8, 9), False, "cutlass"),
        ((9, 0), True, "cusparselt"),
        ((9, 0), False, None),
        ((12, 0), True, "cusparselt"),
    ],
)
def test_which_kernels_a_device_has(
    capability: tuple[int, int], cusparselt: bool, backend: str | None
) -> None:
    found = support(capability, cusparselt)
    assert found.backend == backend
    assert bool(found.reason) == (backend is None)


@pytest.mark.parametrize(
    ("dtype", "shape", "backend", "why"),
    [
        (torch.float16, (32, 64), "cusparselt", None),
        (torch.bfloat16, (16, 48), "cusparselt", None),
        (torch.float16, (10, 64), "cusparselt", "sides (10, 64) are not multiples of 16 and 16"),
        (torch.float16, (32, 64), "cutlass", None),
        (torch.bfloat16, (16, 64), "cutlass", "multiples of 32 and 64"),
        (torch.float16, (32, 32), "cutlass", "multiples of 32 and 64"),
        (torch.int8, (10, 7), "cusparselt", None),
        (torch.int8, (32, 128), "cutlass", "int8 needs cuSPARSELt"),
        (torch.float32, (64, 64), "cusparselt", "float32 has no 2:4 kernels"),
        (torch.float32, (64, 64), "cutlass", "float32 has no 2:4 kernels"),
        (torch.float16, (64, 64), None, "nothing there"),
    ],
)
def test_what_a_kernel_takes(
    dtype: torch.dtype, shape: tuple[int, int], backend: Any, why: str | None
) -> None:
    found = obstacle(torch.zeros(shape, dtype=dtype), Support(backend, "" if backend else "nothing there"))
    assert found is None if why is None else why in str(found)


def test_these_limits_are_those_of_torch() -> None:
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

    for backend, kind in (
        ("cusparselt", SparseSemiStructuredTensorCUSPARSELT),
        ("cutlass", SparseSemiStructuredTensorCUTLASS),
    ):
        limits = kind._DTYPE_SHAPE_CONSTRAINTS
        for dtype in sparse24.HALVES:
            at_least = (limits[dtype].sparse_min_rows, limits[dtype].sparse_min_cols)
            assert sparse24._float_multiples(backend) == at_least
    int8 = SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS[torch.int8]
    assert {int8.sparse_min_rows, int8.sparse_min_cols} == {sparse24.INT8_WEIGHT}
    assert int8.dense_min_rows == sparse24.INT8_ROWS


def test_what_counts_as_two_of_four() -> None:
    weight = two_of_four(torch.randn(8, 18))
    assert is_two_of_four(weight)  # the last two of 18 are a group of their own
    assert not is_two_of_four(torch.ones(8, 18))
    weight[3, 4:7] = 1
    assert not is_two_of_four(weight)
    assert not is_two_of_four(torch.zeros(0, 4))
    assert is_two_of_four(torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0]]))  # four in a row, across two groups


# --- int8 ----------------------------------------------------------------------------------------------


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Lets the CPU pass for a device with cuSPARSELt; the shapes it was called with."""
    calls: list[tuple[int, ...]] = []

    def compress(weight: Tensor) -> Tensor:
        assert weight.dtype == torch.int8
        assert weight.is_contiguous()
        assert weight.shape[0] % 32 == weight.shape[1] % 32 == 0
        assert is_two_of_four(weight)
        return weight

    def multiply(packed: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
        assert right.dtype == torch.int8
        assert right.t().is_contiguous()
        assert right.shape[0] == packed.shape[1]
        assert right.shape[1] % 16 == 0
        assert out_dtype == torch.int32
        calls.append(tuple(right.shape))
        return (packed.long() @ right.long()).to(torch.int32)

    monkeypatch.setattr(torch, "_cslt_compress", compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)
    monkeypatch.setattr(sparse24, "device_support", lambda device: Support("cusparselt"))
    return calls


def test_int8_linears_multiply_exactly(device: list[tuple[int, ...]]) -> None:
    for sizes in ((24, 10), (64, 32), (10, 5)):
        layer = linear(*sizes)
        layer.weight.copy_(two_of_four(layer.weight))
        x = random_uint8(3, 5, sizes[0])
        kernel = cuda.linear(layer)
        assert reason(layer) == SPARSE
        tried = len(device)
        assert_matches(kernel(x), exact_linear(layer, x, layer.input), layer.output)
        assert len(device) == tried + 1


def test_int8_dynamic_linears_multiply_exactly(device: list[tuple[int, ...]]) -> None:
    layer = dynamic(40, 12)
    layer.weight.copy_(two_of_four(layer.weight))
    x = torch.randn(6, 40)
    q = dynamic_qparams(x)
    got = cuda.dynamic_linear(layer)(x)
    assert reason(layer) == SPARSE
    assert_matches(got, exact_linear(layer, quantize(x, q), q), None)


@pytest.mark.parametrize(("channels", "kernel"), [(8, (3, 3)), (16, (1, 1)), (12, (5, 3))])
def test_int8_convolutions_are_two_of_four_along_their_channels(
    device: list[tuple[int, ...]], channels: int, kernel: tuple[int, int]
) -> None:
    layer = conv(in_channels=channels, kernel_size=kernel)
    layer.weight.copy_(two_of_four(layer.weight))
    x = random_uint8(2, channels, 9, 9)
    got = cuda.conv2d(layer)(x)
    assert reason(layer) == SPARSE
    assert_matches(got, exact_conv(layer, x), layer.output)


def test_dense_int8_weights_stay_where_they_were(device: list[tuple[int, ...]]) -> None:
    layer = linear(64, 32)
    x = random_uint8(4, 64)
    assert_matches(cuda.linear(layer)(x), exact_linear(layer, x, layer.input), layer.output)
    assert reason(layer) is None
    assert not device


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (lambda *_, **__: torch.zeros(32, 32, dtype=torch.int32), "its 2:4 product is not exact here"),
        (
            lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no such arch\nC++")),
            "fails here: no such arch",
        ),
    ],
    ids=["wrong", "raises"],
)
def test_a_kernel_that_fails_its_trial_is_not_used(
    device: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, fault: Any, why: str
) -> None:
    monkeypatch.setattr(torch, "_cslt_sparse_mm", fault)
    layer = linear(64, 32)
    layer.weight.copy_(two_of_four(layer.weight))
    x = random_uint8(4, 64)
    kernel = cuda.linear(layer)
    assert why in str(reason(layer))
    assert_matches(kernel(x), exact_linear(layer, x, layer.input), layer.output)


def test_without_the_kernels_the_reason_is_kept() -> None:
    layer = linear(64, 32)
    layer.weight.copy_(two_of_four(layer.weight))
    cuda.linear(layer)
    assert reason(layer) == "no 2:4 kernels on cpu"


# --- half precision ------------------------------------------------------------------------------------


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Lets the CPU pass for a device: a packed weight is the weight itself; those that were packed."""
    made: list[Tensor] = []

    def pack(weight: Tensor, backend: str) -> Tensor:
        made.append(weight.clone())
        return made[-1]

    monkeypatch.setattr(sparse24, "_pack", pack)
    monkeypatch.setattr(sparse24, "device_support", lambda device: Support("cusparselt"))
    return made


def half_linear() -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(32, 16).to(torch.bfloat16)
    with torch.no_grad():
        layer.weight.copy_(two_of_four(layer.weight))
    return layer


def test_a_half_linear_runs_through_its_packed_weight(packing: list[Tensor]) -> None:
    layer = half_linear()
    x = torch.randn(2, 3, 32, dtype=torch.bfloat16)
    expected = layer(x)
    sparse24.attach(layer)
    assert reason(layer) == SPARSE
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected)
        packing[0].zero_()  # so it shows which weight is used
        torch.testing.assert_close(layer(x), layer.bias.expand(2, 3, 16))
    sparse24.detach(layer)
    assert reason(layer) is None
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected)


def test_all_else_than_inference_goes_through_the_dense_weight(packing: list[Tensor]) -> None:
    layer = half_linear()
    x = torch.randn(5, 32, dtype=torch.bfloat16)
    sparse24.attach(layer)
    packing[0].zero_()
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.any()
    with torch.inference_mode():
        copied = copy.deepcopy(layer)
        assert reason(copied) is None
        torch.testing.assert_close(copied(x), nn.functional.linear(x, layer.weight, layer.bias))
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(layer(x), copied(x))
    with torch.no_grad():
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
        assert layer.float()(x.float()).dtype == torch.float32
    assert set(layer.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize("change", ["dense", "float32", "sides"])
def test_what_has_no_kernel_is_left_alone(packing: list[Tensor], change: str) -> None:
    layer = half_linear()
    if change == "dense":
        nn.init.ones_(layer.weight)
    elif change == "float32":
        layer.float()
    else:
        layer.weight = nn.Parameter(layer.weight[:10])
        layer.bias = None  # type: ignore[assignment]
    sparse24.attach(layer)
    assert "forward" not in vars(layer)
    assert not packing
    expected = {"dense": None, "float32": "float32 has no 2:4 kernels; float16, bfloat16 and int8 have"}
    assert reason(layer) == expected.get(change, "its sides (10, 32) are not multiples of 16 and 16")


def test_a_half_product_that_is_wrong_is_not_used(
    packing: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse24, "_pack", lambda weight, backend: weight * 1.5)
    layer = half_linear()
    sparse24.attach(layer)
    assert reason(layer) == "its 2:4 product differs from the dense one"
    assert "forward" not in vars(layer)


# --- what is said about it -----------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(4, 32, 3), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(self.conv(x).mean((2, 3)))
        return result


def program(prune: bool = True) -> Program:
    torch.manual_seed(0)
    net = Net().eval()
    if prune:
        with torch.no_grad():
            for layer in (net.conv, net.fc):
                layer.weight.copy_(two_of_four(layer.weight))
    made = capture(net, InputSpec((4, 8, 8)))
    made.encodings = compact(made, ["conv.weight", "fc.weight"] if prune else [])
    return made


def test_a_cpu_is_said_to_gain_nothing() -> None:
    note = sparsity_note(prepare(program()), "cpu")
    assert note == (
        "50 % of the weights in its 2 pruned layers are zero; that makes the file smaller, not the network "
        "faster: a CPU multiplies zeros, too"
    )
    assert sparsity_note(program(prune=False)) is None


def test_a_device_is_said_to_run_what_it_runs(packing: list[Tensor]) -> None:
    made = program()
    fc = made.get_submodule("fc")
    assert isinstance(fc, nn.Linear)
    sparse24.attach(fc)
    note = str(sparsity_note(made, "cuda"))
    assert "faster: float32 has no 2:4 kernels" in note
    assert "only 2:4 weights of linear layers" in note
    sparse24.attach(fc.half())
    note = str(sparsity_note(made, "cuda"))
    assert "1 of them run through 2:4 kernels, 1 not: only 2:4 weights" in note


def test_on_a_cpu_nothing_is_attached() -> None:
    made = prepare(program().half())
    fc = made.get_submodule("fc")
    assert "forward" not in vars(fc)
    assert reason(fc) is None


# --- on a device ---------------------------------------------------------------------------------------


class TestDevice:
    pytestmark = NEEDS_CUDA

    def test_int8_products_are_exact_or_stay_dense(self) -> None:
        for layer, kernel in ((linear(256, 128), cuda.linear), (conv(in_channels=64), cuda.conv2d)):
            layer.weight.copy_(two_of_four(layer.weight))
            is_conv = kernel is cuda.conv2d
            x = random_uint8(2, 64, 9, 9) if is_conv else random_uint8(33, 256)
            real = exact_conv(layer, x) if is_conv else exact_linear(layer, x, layer.input)
            run = kernel(layer.cuda())
            assert reason(layer)
            assert_matches(run(x.cuda()), real, layer.output)

    def test_half_linears_agree_with_the_dense_product(self) -> None:
        layer = nn.Linear(256, 128).half().cuda()
        with torch.no_grad():
            layer.weight.copy_(two_of_four(layer.weight))
        x = torch.randn(5, 7, 256, device="cuda", dtype=torch.float16)
        with torch.inference_mode():
            expected = layer(x)
            sparse24.attach(layer)
            assert reason(layer)
            torch.testing.assert_close(layer(x), expected, rtol=1e-2, atol=1e-2)
