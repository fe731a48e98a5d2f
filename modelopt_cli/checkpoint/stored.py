"""How many bytes the tensors of a state dict take."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def state_bytes(state: Mapping[str, Tensor]) -> int:
    """Bytes of the tensors of a state dict; one that appears under two names counts once."""
    seen: dict[tuple[Any, ...], int] = {}
    for name, tensor in state.items():
        # Empty and meta tensors have no address of their own.
        pointer = tensor.data_ptr() if tensor.device.type != "meta" else 0
        address = pointer or hash(name)
        key = (address, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()))
        seen[key] = tensor.numel() * tensor.element_size()
    return sum(seen.values())
