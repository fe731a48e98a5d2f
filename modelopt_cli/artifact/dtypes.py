"""The element types of a safetensors file, by the names the format gives them."""

import torch

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""Name in the file to torch dtype."""

NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
"""Torch dtype to name in the file."""

_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
"""Types of the same size, which are zero where the others are."""


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of the elements in row-major order, uint8 ``(n,)``; a view where they lie so already."""
    if not tensor.numel():  # what NumPy selects nothing from has a stride of 0, which ``view`` refuses
        return torch.empty(0, dtype=torch.uint8)
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def count_nonzero(tensor: torch.Tensor) -> int:
    """Number of elements that are not zero, of any element type: torch has no kernel for some."""
    if tensor.dtype in _SIGNED:
        tensor = tensor.view(_SIGNED[tensor.dtype])
    elif tensor.is_floating_point() and tensor.itemsize == 1:
        tensor = tensor.float()
    return int(torch.count_nonzero(tensor))
