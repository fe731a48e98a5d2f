"""Seeded noise in the shape of the network's input, for latency and smoke tests."""

import re

import numpy as np
import torch
from torch import Tensor

from modelopt_cli.data.data_spec import DataSpec
from modelopt_cli.data.source import Source
from modelopt_cli.errors import DataError
from modelopt_cli.program.input_spec import INPUT_TYPE, InputSpec, InputType
from modelopt_cli.program.samples import DTYPES

_SHAPE = re.compile(r"([1-9]\d{0,6}(?:x[1-9]\d{0,6})*)(?::(\w+))?", re.ASCII)
_EXAMPLE = "write synthetic:3x224x224, or synthetic:128:int64"
_LARGEST = 2**28


class SyntheticSource(Source):
    """Standard normal noise, or integers; a sample depends on the seed and its index alone."""

    ready = True
    labelled = False

    def __init__(
        self, name: str, shape: tuple[int, ...], count: int, seed: int, dtype: InputType, below: int
    ) -> None:
        self.name, self.shape, self.count = name, shape, count
        self.seed, self.dtype, self.below = seed, dtype, below

    def __len__(self) -> int:
        return self.count

    def load(self, index: int) -> tuple[Tensor, int]:
        """Noise of the given shape, and -1 for the label it does not have."""
        # NumPy's generator: torch's uses only 32 bits of its seed, too few for a seed and an index.
        generator = np.random.default_rng((self.seed % 2**64, index))
        if DTYPES[self.dtype].is_floating_point:
            return torch.from_numpy(generator.standard_normal(self.shape, dtype=np.float32)), -1
        end = {"bool": 2, "uint8": 256}.get(self.dtype, self.below)
        return torch.from_numpy(generator.integers(end, size=self.shape)).to(DTYPES[self.dtype]), -1


def open_synthetic(spec: DataSpec, network: InputSpec | None, seed: int) -> Source:
    """``synthetic:3x224x224?n=256``, ``synthetic:128:int64?below=999``; without a shape, the network's."""
    shape, dtype = (network.shape, network.dtype) if network is not None else (None, INPUT_TYPE)
    if spec.target:
        match = _SHAPE.fullmatch(spec.target)
        if match is None or (match[2] or dtype) not in DTYPES:
            raise DataError(f"{spec.target!r} is not a shape", where=spec.text, hint=_EXAMPLE)
        shape, dtype = tuple(map(int, match[1].split("x"))), match[2] or dtype  # type: ignore[assignment]
    if shape is None:
        raise DataError("needs a shape here", where=spec.text, hint=_EXAMPLE)
    if torch.Size(shape).numel() > _LARGEST:
        raise DataError("is larger than a sample can be", where=spec.text, hint=_EXAMPLE)
    count, below = (_number(spec, name) for name in ("n", "below"))
    return SyntheticSource(spec.text, shape, count, seed, dtype, below)


def _number(spec: DataSpec, name: str) -> int:
    value = spec.option(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
        raise DataError(f"{name} is {value!r}, not a number above 0", where=spec.text)
    return value
