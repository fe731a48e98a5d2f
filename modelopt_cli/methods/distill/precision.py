"""In which floating-point type the losses are computed."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def full_precision(*tensors: Tensor) -> Iterator[Sequence[Tensor]]:
    """Gives the tensors in one floating-point type, and switches autocast off while they are used.

    The type is the widest of theirs, and at least float32: bfloat16 becomes float32, float64 stays. Autocast
    would make each product of matrices bfloat16 again.
    """
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
    with torch.autocast(tensors[0].device.type, enabled=False):
        yield [t.to(dtype) for t in tensors]
