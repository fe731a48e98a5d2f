"""Choosing a kernel for every quantized layer: by device, by what the backend can do, by exactness."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modelopt_cli.errors import EnvironmentFailure, UsageError
from modelopt_cli.kernels import cuda, half_layers, onednn, reference, sparse24
from modelopt_cli.kernels.fp32 import PackedForm, packable
from modelopt_cli.kernels.lowering import LOWERINGS
from modelopt_cli.kernels.max_pool import max_pool
from modelopt_cli.kernels.readers import overwritable_residuals, read_as_rows
from modelopt_cli.kernels.saturation import never_saturates, never_wraps
from modelopt_cli.program import Program
from modelopt_cli.program.quantized import Quantized, Weighted
from modelopt_cli.program.quantized_convolutions import QuantizedConv2d, QuantizedConvolution
from modelopt_cli.program.quantized_linear import DynamicLinear, QuantizedLinear
from modelopt_cli.program.quantized_operations import (
    Quantize,
    QuantizedMaxPool,
    QuantizedMaxPool1d,
    QuantizedMaxPool2d,
    QuantizedMaxPool3d,
)
from modelopt_cli.settings import option, parse_device

Run = Callable[..., Tensor]


Builder = Callable[..., Run | None]


@dataclass(frozen=True)
class KernelSet:
    """One backend: the kernels of a kind of device.

    Attributes:
        builders: for a class of layer, what builds its kernel from it. A layer that has none here is computed
            as another convolution, if it has that form (``lowering``); where there is no kernel, it computes
            by its own float32 emulation.
        exact: true of a layer whose int32 sums cannot go wrong there; others run through ``reference``.
        available: true if this machine has what it needs.
        device: type of device whose default it is, if it is one.
        float_linear: applied to each float linear layer: attaches sparse kernels, or takes them off.
        halves: float layers compute in the half-precision type that their weight is stored for.
        floats: makes what computes an int8 network with the float layers in it packed, if they can be.
    """

    builders: Mapping[type[Quantized], Builder]
    exact: Callable[[Weighted], bool] = lambda layer: True
    available: Callable[[], bool] = lambda: True
    device: str | None = None
    float_linear: Callable[[nn.Linear], None] = sparse24.detach
    halves: bool = True
    floats: Callable[[], Callable[[Program], Program]] | None = None

    @property
    def present(self) -> bool:
        """True if this machine has what they need, their device included."""
        there = self.device is None or torch.get_device_module(self.device).is_available()
        return bool(there) and self.available()

    def build(self, layer: Quantized, may_overwrite_residual: bool) -> Run | None:
        """The kernel of a layer, or None where its emulation is to be used."""
        builder = self.builders.get(type(layer))
        if builder is None:
            return self._lowered(layer, may_overwrite_residual)
        if isinstance(layer, Weighted) and not (self.available() and self.exact(layer)):
            return BACKENDS["reference"].build(layer, False)
        if isinstance(layer, QuantizedConvolution):
            return builder(layer, may_overwrite_residual=may_overwrite_residual)
        return builder(layer)

    def _lowered(self, layer: Quantized, may_overwrite_residual: bool) -> Run | None:
        lower = LOWERINGS.get(type(layer))
        if lower is None:
            return None
        lowered = lower(layer)
        if lowered is None:
            return BACKENDS["reference"].build(layer, False)
        kernel = self.build(lowered.conv, may_overwrite_residual)
        return None if kernel is None else lowered.around(kernel)


def _never_goes_wrong(layer: Weighted) -> bool:
    return never_saturates(layer.weight, getattr(layer, "groups", 1)) and never_wraps(layer.weight)


def _exactly(layer: QuantizedConvolution, may_overwrite_residual: bool) -> Run:
    return partial(reference.convolution, layer)


BACKENDS: dict[str, KernelSet] = {
    "onednn": KernelSet(
        {
            QuantizedConv2d: onednn.conv2d,
            QuantizedLinear: onednn.linear,
            DynamicLinear: onednn.dynamic_linear,
            **dict.fromkeys((QuantizedMaxPool1d, QuantizedMaxPool2d, QuantizedMaxPool3d), max_pool),
        },
        exact=_never_goes_wrong,
        available=torch.backends.mkldnn.is_available,
        device="cpu",
        floats=PackedForm,
    ),
    "cuda": KernelSet(
        {
            QuantizedConv2d: lambda layer, may_overwrite_residual: cuda.conv2d(layer),
            QuantizedLinear: cuda.linear,
            DynamicLinear: cuda.dynamic_linear,
        },
        exact=lambda layer: never_wraps(layer.weight),
        device="cuda",
        float_linear=sparse24.attach,
    ),
    "reference": KernelSet(
        {
            **dict.fromkeys((QuantizedConv2d, *LOWERINGS), _exactly),
            QuantizedLinear: lambda layer: partial(reference.linear, layer),
            DynamicLinear: lambda layer: partial(reference.dynamic_linear, layer),
        },
        halves=False,
    ),
}
"""Name of a backend to its kernels."""


def backend_of(device: torch.device) -> KernelSet:
    """The default kernels of a device; those of the CPU where its type has none."""
    by_device = {row.device: row for row in BACKENDS.values()}
    return by_device.get(device.type, by_device["cpu"])


class Kernel:
    """Kernel of a quantized layer, chosen and built for the layer's device at the first call.

    It is plain data until then. A copied or pickled layer keeps its choice and builds its own; a layer whose
    tensors were replaced, moved or written to builds again.

    Args:
        backend: a key of ``BACKENDS``; None for that of the device.
        may_overwrite_residual: nobody reads the residual after the layer.
        name: of the layer, for messages.
    """

    def __init__(self, backend: str | None, may_overwrite_residual: bool, name: str) -> None:
        self.backend, self.name = backend, name
        self.may_overwrite_residual = may_overwrite_residual
        self._built: _Built | None = None
        self._taken: torch.Size | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_built": None, "_taken": None}

    def __call__(self, layer: Quantized, *args: Tensor) -> Tensor:
        built, x = self._built, args[0]
        if x.shape != self._taken:
            if not layer.takes(x.shape):
                problem = f"takes {layer.input_form}, not {tuple(x.shape)}"
                raise self._refusal(problem, "give the network a batch (N, *program.input.shape)")
            self._taken = x.shape
        if built is None or not built.serves(layer):
            built = self.build(layer, x.device)
        if x.device != built.device:
            problem = f"is on {built.device}, its input on {x.device}"
            raise self._refusal(problem, "move the input with .to(device)")
        return built.run(*args)

    def _refusal(self, problem: str, hint: str) -> UsageError:
        return UsageError(problem, where=f"layer {self.name}", hint=hint)

    def build(self, layer: Quantized, device: torch.device) -> "_Built":
        """Build now what the first call would build."""
        tensors = tuple((name, tensor, _version(tensor)) for name, tensor in layer._buffers.items())
        device = next((tensor.device for _, tensor, _ in tensors if tensor is not None), device)
        kernels = BACKENDS[self.backend] if self.backend else backend_of(device)
        run = kernels.build(layer, self.may_overwrite_residual)
        self._built = _Built(run or layer.emulate, device, tensors)
        return self._built

    @property
    def run(self) -> Run | None:
        """The function that was built, or None before the first call."""
        return None if self._built is None else self._built.run


class _Built(NamedTuple):
    """The function that computes a layer, its device, and the tensors it was built from.

    Each tensor has its name and a number that grows with every write to it; inference tensors have none.
    """

    run: Run
    device: torch.device
    tensors: tuple[tuple[str, Tensor | None, int | None], ...]

    def serves(self, layer: Quantized) -> bool:
        """True if the layer's tensors are still those it was built from."""
        buffers = layer._buffers
        for name, known, version in self.tensors:
            if buffers[name] is not known or (version is not None and known._version != version):  # type: ignore[union-attr]
                return False
        return True


def _version(tensor: Tensor | None) -> int | None:
    return None if tensor is None or tensor.is_inference() else tensor._version


def require_device(device: str | torch.device) -> None:
    """Make sure that a device is there.

    Raises:
        UsageError: it is of a kind that nothing here runs on.
        EnvironmentFailure: it is not there.
    """
    try:
        target = torch.device(parse_device(str(device)))
    except ValueError as error:
        raise UsageError(str(error), where=option("device")) from None
    if target.type != "cuda":
        return
    if not torch.cuda.is_available():
        raise EnvironmentFailure(
            "no CUDA device is available", where=option("device", device), hint="use cpu"
        )
    if (target.index or 0) >= (count := torch.cuda.device_count()):
        raise EnvironmentFailure(f"there is no such device, of {count}", where=option("device", device))


def prepare(program: Program, device: str | torch.device = "cpu", backend: str | None = None) -> Program:
    """Move a Program to a device and give each quantized layer its kernel there, in place.

    Args:
        program: any Program. One without quantized layers is only moved; on CUDA, its half-precision
            linear layers of 2:4 sparse weight get their kernels, too.
        device: "cpu" or a CUDA device.
        backend: a key of ``BACKENDS``; by default that of the device.

    Returns:
        The same Program.

    Raises:
        EnvironmentFailure: the device is not there.
    """
    require_device(device)
    target = torch.device(device)
    program.to(target)
    kernels = BACKENDS[backend] if backend else backend_of(target)
    overwritable, rows = overwritable_residuals(program), read_as_rows(program)
    for name, module in program.named_modules():
        if isinstance(module, Quantize):
            module.for_rows = name in rows
        if isinstance(module, Weighted | QuantizedMaxPool):
            module.kernel = kernel = Kernel(backend, name in overwritable, name)
            kernel.build(module, target)
            continue
        if type(module) is nn.Linear:
            kernels.float_linear(module)
        half_layers.attach(
            module, program.encodings.get(f"{name}.weight") if kernels.halves else None, target
        )
    program.kernel = _of_floats(program, kernels)
    return program


def _of_floats(program: Program, kernels: KernelSet) -> Callable[[Program], Program] | None:
    """The kernel of an int8 network with float layers; a float network's form is chosen where it is timed."""
    integer = any(isinstance(module, Quantized) for module in program.modules())
    if not (integer and kernels.floats is not None and kernels.available() and packable(program)):
        return None
    return kernels.floats()
