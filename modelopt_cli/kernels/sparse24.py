"""2:4 sparse weights on CUDA: at most two nonzeros in every four neighbouring inputs of a layer.

From compute capability 8.0 on, tensor cores skip the zeros of such a weight (Mishra et al., "Accelerating
Sparse Deep Neural Networks", 2021). torch offers this for float16 and bfloat16 (through cuSPARSELt, or
through CUTLASS on 8.x) and for int8 (through cuSPARSELt). Its float32 form wants one of *two* and computes
in TF32, so a float32 layer stays dense: ``prepare(program.half(), "cuda")``, or int8, makes it faster.

Every weight that is chosen is tried once, on its device, against the dense product: the operators are
prototypes, and a driver, a build or a shape may lack them. What fails stays dense, and :func:`reason` says
why. No zeros make anything faster on a CPU.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelopt_cli.program.quantized import Weighted

GROUP, KEEP = 4, 2
HALVES = (torch.float16, torch.bfloat16)
SPARSE = "2:4 sparse"
INT8_WEIGHT, INT8_ROWS = 32, 16
"""cuSPARSELt takes int8 weights whose sides are multiples of 32, and inputs of a multiple of 16 rows."""

_TRIED_ROWS = 17
_FLOAT_TOLERANCE = 2e-2

_reasons: "WeakKeyDictionary[nn.Module, str]" = WeakKeyDictionary()
_packed: "WeakKeyDictionary[nn.Module, _Packed]" = WeakKeyDictionary()


@dataclass(frozen=True)
class Support:
    """Kernels for 2:4 sparse weights that a device has.

    Attributes:
        backend: "cusparselt", "cutlass", or None where there are none.
        reason: why there are none.
    """

    backend: str | None
    reason: str = ""


def support(capability: tuple[int, int], cusparselt: bool) -> Support:
    """The kernels of a device of this compute capability, given whether torch was built with cuSPARSELt."""
    if capability < (8, 0):
        return Support(None, f"compute capability {capability[0]}.{capability[1]} has no 2:4 kernels")
    if cusparselt:
        return Support("cusparselt")
    if capability[0] == 8:
        return Support("cutlass")
    return Support(None, "this torch has no cuSPARSELt")


def device_support(device: torch.device) -> Support:
    """The 2:4 kernels of a device."""
    if device.type != "cuda":
        return Support(None, f"no 2:4 kernels on {device.type}")
    return support(torch.cuda.get_device_capability(device), torch.backends.cusparselt.is_available())


def is_two_of_four(matrix: Tensor) -> bool:
    """True if a weight ``(out, in)`` has at most two nonzeros in every four neighbours of a row."""
    padded = F.pad(matrix != 0, (0, -matrix.shape[1] % GROUP))
    return int(padded.view(len(matrix), -1, GROUP).sum(2).max()) <= KEEP if matrix.numel() else False


def obstacle(matrix: Tensor, support: Support) -> str | None:
    """Reason why a 2:4 weight ``(out, in)`` cannot run through a device's kernels; None where it can."""
    if support.backend is None:
        return support.reason
    if matrix.dtype == torch.int8:
        return None if support.backend == "cusparselt" else "int8 needs cuSPARSELt"
    if matrix.dtype not in HALVES:
        name = str(matrix.dtype).removeprefix("torch.")
        return f"{name} has no 2:4 kernels; float16, bfloat16 and int8 have"
    rows, columns = _float_multiples(support.backend)
    if matrix.shape[0] % rows or matrix.shape[1] % columns:
        return f"its sides {tuple(matrix.shape)} are not multiples of {rows} and {columns}"
    return None


def _float_multiples(backend: str) -> tuple[int, int]:
    return (16, 16) if backend == "cusparselt" else (32, 64)


def reason(module: nn.Module) -> str | None:
    """``SPARSE`` for a layer that runs through a 2:4 kernel, else why a 2:4 layer does not.

    None for a layer whose weight is not 2:4, and before ``kernels.prepare``.
    """
    return _reasons.get(module)


# --- int8 --------------------------------------------------------------------------------------------


class IntProduct:
    """``rows @ weight.T`` for a fixed 2:4 int8 weight.

    Args:
        weight: int8 ``(out, in)`` on CUDA.
    """

    def __init__(self, weight: Tensor) -> None:
        self.out, self.inner = weight.shape
        padded = F.pad(weight, (0, -self.inner % INT8_WEIGHT, 0, -self.out % INT8_WEIGHT))
        self.packed = torch._cslt_compress(padded.contiguous())

    def __call__(self, rows: Tensor) -> Tensor:
        """Multiply int8 ``(M, in)`` into int32 ``(M, out)``."""
        m = len(rows)
        padded = F.pad(rows, (0, -self.inner % INT8_WEIGHT, 0, -m % INT8_ROWS)).contiguous()
        # The right operand column-major, which the transpose of a contiguous one is.
        product: Tensor = torch._cslt_sparse_mm(self.packed, padded.t(), out_dtype=torch.int32)
        return product.t()[:m, : self.out]


def int_product(layer: Weighted, weight: Tensor) -> IntProduct | None:
    """The 2:4 product of an int8 layer's weight, or None where that must stay dense.

    Args:
        layer: whose weight it is; :func:`reason` will say what was decided.
        weight: int8 ``(out, in)``, as the layer's kernel multiplies with it.
    """
    _reasons.pop(layer, None)
    if not is_two_of_four(weight):
        return None
    why = obstacle(weight, device_support(weight.device))
    product = None
    if why is None:
        product, why = _attempt(lambda: IntProduct(weight), lambda made: _int_error(made, weight))
    _reasons[layer] = SPARSE if product is not None else why
    return product


def _int_error(product: IntProduct, weight: Tensor) -> str | None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-128, 128, (_TRIED_ROWS, weight.shape[1]), generator=generator, dtype=torch.int8)
    rows = rows.to(weight.device)
    exact = rows.double() @ weight.double().t()  # below 2**53
    return None if torch.equal(product(rows).double(), exact) else "its 2:4 product is not exact here"


# --- float16 and bfloat16 ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Packed:
    """A packed weight and what it was packed from."""

    weight: Any
    mark: tuple[int, int | None]
    dtype: torch.dtype

    def serves(self, linear: nn.Linear, x: Tensor) -> bool:
        """True if it still is the layer's weight, and nothing but the product is wanted."""
        return (
            not (torch.is_grad_enabled() and (x.requires_grad or linear.weight.requires_grad))
            and not torch.is_autocast_enabled(x.device.type)
            and x.dtype == self.dtype
            and x.device == linear.weight.device
            and _mark(linear.weight) == self.mark
        )


def _mark(weight: Tensor) -> tuple[int, int | None]:
    """A mark that changes when a weight is replaced or written to."""
    return weight.data_ptr(), None if weight.is_inference() else weight._version


def forward(self: nn.Linear, x: Tensor) -> Tensor:
    """Forward pass of a linear layer whose weight :func:`attach` has packed."""
    packed = _packed.get(self)
    if packed is None or not packed.serves(self, x):
        return F.linear(x, self.weight, self.bias)
    return _product(x, packed.weight, self.bias)


def _product(x: Tensor, packed: Any, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return F.linear(rows, packed, bias).reshape(*x.shape[:-1], packed.shape[0])


def attach(linear: nn.Linear) -> None:
    """Let a linear layer run through a 2:4 kernel if its weight and device allow, in place.

    The layer stays an ordinary ``nn.Linear``: a copy of it, a changed weight, another device or a
    gradient that is wanted lead back to the dense product.
    """
    detach(linear)
    weight = linear.weight.detach()
    if not is_two_of_four(weight):
        return
    support = device_support(weight.device)
    why = obstacle(weight, support)
    packed = None
    if why is None:
        packed, why = _attempt(
            lambda: _pack(weight, str(support.backend)), lambda made: _float_error(made, linear)
        )
    _reasons[linear] = SPARSE if packed is not None else why
    if packed is not None:
        _packed[linear] = _Packed(packed, _mark(linear.weight), weight.dtype)
        linear.forward = MethodType(forward, linear)  # type: ignore[method-assign]


def detach(linear: nn.Linear) -> None:
    """Undo :func:`attach`."""
    _reasons.pop(linear, None)
    _packed.pop(linear, None)
    vars(linear).pop("forward", None)


def _pack(weight: Tensor, backend: str) -> Any:
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

    kinds: dict[str, Any] = {
        "cusparselt": SparseSemiStructuredTensorCUSPARSELT,
        "cutlass": SparseSemiStructuredTensorCUTLASS,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that this is a prototype
        return kinds[backend].from_dense(weight.contiguous())


def _float_error(packed: Any, linear: nn.Linear) -> str | None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_TRIED_ROWS, linear.in_features, generator=generator).to(linear.weight)
    with torch.no_grad():
        dense, sparse = F.linear(x, linear.weight, linear.bias), _product(x, packed, linear.bias)
    error, size = float((dense - sparse).abs().max()), float(dense.abs().max())
    return None if error <= _FLOAT_TOLERANCE * size else "its 2:4 product differs from the dense one"


def _attempt(make: Callable[[], Any], error: Callable[[Any], str | None]) -> tuple[Any, str]:
    """The packed weight, or None and the reason why it is not to be used."""
    try:
        made = make()
        why = error(made)
    except (RuntimeError, NotImplementedError, AssertionError) as failure:
        why = f"the 2:4 kernel fails here: {(str(failure).splitlines() or ['no reason given'])[0][:120]}"
    return (made, "") if why is None else (None, why)
