"""Batches to try a network with, of the shape and element type of its input."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from modelopt_cli.program.input_spec import InputSpec

DTYPES = {
    "float32": torch.float32,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
_TOKENS = 100


def zeros(input_spec: InputSpec, batch: int, device: str | torch.device = "cpu") -> Tensor:
    """A batch of zeros; on the meta device, of nothing."""
    return torch.zeros(batch, *input_spec.shape, dtype=DTYPES[input_spec.dtype], device=device)


def noise(input_spec: InputSpec, batch: int, *, seed: int, below: int = 2) -> Tensor:
    """Standard normal numbers, or whole ones from 0 up to, not including, ``below``; bytes up to 255."""
    generator, dtype = torch.Generator().manual_seed(seed), DTYPES[input_spec.dtype]
    if dtype.is_floating_point:
        return torch.randn(batch, *input_spec.shape, generator=generator)
    end = {torch.bool: 2, torch.uint8: 256}.get(dtype, below)
    return torch.randint(end, (batch, *input_spec.shape), generator=generator).to(dtype)


def tokens_of(modules: Iterable[nn.Module]) -> int:
    """Number of token ids that every embedding among ``modules`` takes; 100 where there is no embedding."""
    return min((m.num_embeddings for m in modules if isinstance(m, nn.Embedding)), default=_TOKENS)
