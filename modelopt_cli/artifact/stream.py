"""Tensors on their way into a file, one at a time."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from modelopt_cli.program.program import Encoding

Item = tuple[str, Tensor, Encoding]
"""A parameter's name, its values and how it is to be stored."""


@dataclass(frozen=True)
class TensorStream:
    """A state dict whose tensors are made when their turn comes, so that they need not fit into memory.

    Attributes:
        items: makes them, in state-dict order, the same on every call.
        tied: names that stand for the tensor of another.
    """

    items: Callable[[], Iterator[Item]]
    tied: Mapping[str, str] = field(default_factory=dict)


def tied_names(state: Mapping[str, Tensor], encodings: Mapping[str, Encoding]) -> dict[str, str]:
    """Names that share their storage with another: an encoded one owns it, else the first.

    Args:
        state: tensors in memory; one on the meta device is tied to none.
        encodings: how they are stored.
    """
    owners: dict[tuple[Any, ...], str] = {}
    tied = {}
    for name in sorted(state, key=lambda name: name not in encodings):
        tensor = state[name]
        if not _has_address(tensor):
            continue
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        owner = owners.setdefault(key, name)
        if owner != name:
            tied[name] = owner
    return tied


def _has_address(tensor: Tensor) -> bool:
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
        return False  # refused when its turn comes
    return tensor.numel() > 0 and not tensor.is_meta
