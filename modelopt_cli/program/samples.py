"""Batches to try a network with, of the shapes and element types of its inputs."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from modelopt_cli.program.input_batch import Inputs, make_inputs
from modelopt_cli.program.input_spec import InputSpec

DTYPES = {
    "float32": torch.float32,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
_TOKENS = 100


def zeros(input_spec: InputSpec, batch: int, device: str | torch.device = "cpu") -> Inputs:
    """A batch of zeros; on the meta device, of nothing."""
    return make_inputs(
        input_spec,
        lambda each: torch.zeros(batch, *each.shape, dtype=DTYPES[each.dtype], device=device),
    )


def noise(input_spec: InputSpec, batch: int, *, seed: int, below: int = 2) -> Inputs:
    """Standard normal numbers, or whole ones from 0 up to, not including, ``below``; bytes up to 255.

    An input called a mask (``attention_mask``) has zeros and ones: networks count the ones for positions.
    """
    generator = torch.Generator().manual_seed(seed)
    return make_inputs(input_spec, lambda each: _noise(each, batch, generator, below))


def _noise(input_spec: InputSpec, batch: int, generator: torch.Generator, below: int) -> Tensor:
    dtype = DTYPES[input_spec.dtype]
    if dtype.is_floating_point:
        return torch.randn(batch, *input_spec.shape, generator=generator)
    is_mask = input_spec.name.endswith("mask")
    end = 2 if is_mask else {torch.bool: 2, torch.uint8: 256}.get(dtype, below)
    return torch.randint(end, (batch, *input_spec.shape), generator=generator).to(dtype)


def tokens_of(modules: Iterable[nn.Module]) -> int:
    """Number of token ids that every embedding among ``modules`` takes; 100 where there is no embedding."""
    rows = (getattr(module, "num_embeddings", None) for module in modules)  # int8 embeddings have them, too
    return min((count for count in rows if isinstance(count, int)), default=_TOKENS)
