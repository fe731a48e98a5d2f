"""Float layers that compute in half precision where the hardware is made for it, float32 in and out.

A file says so of a weight: it is stored in ``bfloat16`` or ``float16``, or as integers whose scales are. Then
a layer's products are those of a half-precision operator, unless :func:`obstacle` gives a reason against it;
else the layer computes in float32 with the same weights. Integers of 4 bits go through torch's int4 operators
where an input has so few rows that reading the weight takes longest. The choice depends on the device and the
layer alone, never on a clock, so that a file gives the same values whenever it is loaded on a machine.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelopt_cli.artifact.encodings import compute_type, spread_steps
from modelopt_cli.kernels.int4 import Int4Product, int4_obstacle
from modelopt_cli.kernels.own_gradients import Mark, mark_of, wants_gradients, with_own_gradients
from modelopt_cli.kernels.saturation import is_depthwise
from modelopt_cli.program.program import Encoding

INT4_ROWS = 4
"""Rows of an input up to which int4 operators are used: with AMX they were faster up to 4, slower from 8."""
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_KINDS: tuple[type[nn.Module], ...] = (nn.Linear, *_CONVOLUTIONS)
_TRIED_ROWS, _TRIED_SIDE = 3, 5
_TOLERANCE = 2e-2


def obstacle(
    dtype: torch.dtype, device: torch.device, features: Mapping[str, Any] | None = None
) -> str | None:
    """Reason why products in a half-precision type gain nothing on a device; None where they do.

    On CPUs that is measured: with AMX, most layers took a quarter of float32's time in bfloat16, and up to
    several times as long in float16, which that AMX has not. On CUDA it follows from the compute capability.

    Args:
        dtype: float16 or bfloat16.
        device: CPU or CUDA.
        features: of the CPU, as ``torch.cpu.get_capabilities`` has them; by default this one's.
    """
    name = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        old = dtype is torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0)
        return f"this GPU has no {name} units" if old else None
    if device.type != "cpu":
        return f"not tried on {device.type}"
    known = torch.cpu.get_capabilities() if features is None else features
    unit = "amx_bf16" if dtype is torch.bfloat16 else "amx_fp16"
    return None if known.get(unit, False) else f"this CPU has no {name} units ({unit})"


class HalfKernel:
    """Computes a layer in place of its own forward pass; it builds itself at the first call.

    A copy builds its own. In training, and for values of another type, the layer's own pass runs. Outside of
    training, values are the same with gradients as without; the gradients are those of the layer's own pass.

    Args:
        dtype: of the products.
        encoding: how the layer's weight is stored.
    """

    def __init__(self, dtype: torch.dtype, encoding: Encoding) -> None:
        self.dtype, self.encoding = dtype, encoding
        self.mark: Mark | None = None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.few: Int4Product | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "mark": None, "weight": None, "bias": None, "few": None}

    def serves(self, layer: Any, x: Tensor) -> bool:
        """True if nothing but the values of a float32 product is wanted."""
        return (
            x.dtype is layer.weight.dtype is torch.float32
            and x.device == layer.weight.device
            and not (layer.training and wants_gradients(layer, x))
            and not torch.is_autocast_enabled(x.device.type)
            and not torch.compiler.is_compiling()
        )

    def build(self, layer: Any) -> None:
        """Convert the weight, unless that is done."""
        mark = mark_of(layer.weight)
        if mark == self.mark:
            return
        weight = layer.weight.detach()
        self.weight, self.few = weight.to(self.dtype), None
        if isinstance(layer, nn.Conv2d):
            self.weight = self.weight.contiguous(memory_format=torch.channels_last)
        self.bias = None if layer.bias is None else layer.bias.detach().to(self.dtype)
        steps = spread_steps(self.encoding, tuple(weight.shape)) if isinstance(layer, nn.Linear) else None
        if steps is not None and int4_obstacle(layer, self.encoding, self.dtype) is None:
            self.few = Int4Product.of(weight, steps, self.encoding.params["group"])
        self.mark = mark

    def __call__(self, layer: Any, x: Tensor) -> Tensor:
        self.build(layer)
        assert self.weight is not None
        if isinstance(layer, nn.Linear):
            rows = math.prod(x.shape[:-1])
            if self.few is not None and 0 < rows <= INT4_ROWS:
                product = self.few(x.reshape(rows, -1)).view(*x.shape[:-1], -1)
                return product if layer.bias is None else product + layer.bias
            return F.linear(x.to(self.dtype), self.weight, self.bias).float()
        channels_last = x.dim() == 4 and isinstance(layer, nn.Conv2d)
        form = torch.channels_last if channels_last else torch.preserve_format
        half = x.to(self.dtype, memory_format=form)
        y: Tensor = layer._conv_forward(half, self.weight, self.bias)
        return y.float()


def forward(self: Any, x: Tensor) -> Tensor:
    """Forward pass of a layer that :func:`attach` has given a kernel."""
    kernel: HalfKernel = self.half_kernel
    own: Callable[..., Tensor] = partial(type(self).forward, self)
    return with_own_gradients(self, own, partial(kernel, self), x) if kernel.serves(self, x) else own(x)


def attach(layer: nn.Module, encoding: Encoding | None, device: torch.device) -> None:
    """Let a float layer compute in the half-precision type that its weight is stored for, in place.

    Args:
        layer: any; only linear layers and convolutions that are not depthwise are changed.
        encoding: how its weight is stored.
        device: it is on.
    """
    detach(layer)
    dtype = wanted_type(layer, encoding)
    if dtype is None or encoding is None or obstacle(dtype, device) is not None:
        return
    own: Any = layer
    own.half_kernel = HalfKernel(dtype, encoding)
    if _differs(own, device):
        detach(layer)
        return
    own.forward = MethodType(forward, layer)


def detach(layer: nn.Module) -> None:
    """Undo :func:`attach`."""
    if vars(layer).pop("half_kernel", None) is not None:
        vars(layer).pop("forward", None)


def computed_in_half(network: nn.Module) -> int:
    """Number of layers that compute in half precision."""
    return sum("half_kernel" in vars(layer) for layer in network.modules())


def has_int4(network: nn.Module) -> int:
    """Number of layers that compute few rows through int4 operators."""
    kernels = (vars(layer).get("half_kernel") for layer in network.modules())
    return sum(kernel is not None and kernel.few is not None for kernel in kernels)


def wanted_type(layer: nn.Module, encoding: Encoding | None) -> torch.dtype | None:
    """The half-precision type that a layer is stored for, if it is of a kind that can compute in it."""
    dtype = compute_type(encoding) if type(layer) in _KINDS else None
    weight = getattr(layer, "weight", None)
    if dtype is None or not isinstance(weight, Tensor) or weight.dtype is not torch.float32:
        return None
    # Depthwise convolutions multiply little: they took twice as long.
    return None if is_depthwise(tuple(weight.shape), getattr(layer, "groups", 1)) else dtype


def _differs(layer: Any, device: torch.device) -> bool:
    """True if the kernel fails, or its values are not those of float32 up to rounding, on a small input."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(layer, nn.Linear):
        sizes = [(rows, layer.in_features) for rows in (_TRIED_ROWS, INT4_ROWS + _TRIED_ROWS)]
    else:
        side = [d * (k - 1) + _TRIED_SIDE for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        sizes = [(2, layer.in_channels, *side)]
    kernel: HalfKernel = layer.half_kernel
    try:
        with torch.inference_mode(False), torch.no_grad():
            for size in sizes:
                x = torch.randn(*size, generator=generator).to(device)
                expected, got = type(layer).forward(layer, x), kernel(layer, x)
                if not float((expected - got).abs().max()) <= _TOLERANCE * float(expected.abs().max()):
                    return True
    except (RuntimeError, NotImplementedError):
        return True
    return False
