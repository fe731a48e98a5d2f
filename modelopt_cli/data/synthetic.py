"""Seeded noise in the shape of the network's input, for latency and smoke tests."""

import re

import numpy as np
import torch
from torch import Tensor

from modelopt_cli.data.source import Source
from modelopt_cli.data.spec import DataSpec, check_options
from modelopt_cli.errors import DataError

_SHAPE = re.compile(r"[1-9]\d{0,6}(x[1-9]\d{0,6})*")
_COUNT = 256
_LARGEST = 2**28


class SyntheticSource(Source):
    """Standard normal noise; a sample depends on the seed and its index alone."""

    ready = True
    labelled = False

    def __init__(self, name: str, shape: tuple[int, ...], count: int, seed: int) -> None:
        self.name = name
        self.shape = shape
        self.count = count
        self.seed = seed

    def __len__(self) -> int:
        return self.count

    def load(self, index: int) -> tuple[Tensor, int]:
        """Noise of the given shape, and -1 for the label it does not have."""
        # NumPy's generator: torch's uses only 32 bits of its seed, too few for a seed and an index.
        generator = np.random.default_rng((self.seed % 2**64, index))
        return torch.from_numpy(generator.standard_normal(self.shape, dtype=np.float32)), -1


def open_synthetic(spec: DataSpec, shape: tuple[int, ...] | None, seed: int) -> Source:
    """``synthetic:3x224x224?n=256``; without a shape, the network's."""
    check_options(spec, ("n",))
    if spec.target:
        if not _SHAPE.fullmatch(spec.target):
            raise DataError(
                f"{spec.target!r} is not a shape", where=spec.text, hint="write synthetic:3x224x224"
            )
        shape = tuple(int(side) for side in spec.target.split("x"))
    if shape is None:
        raise DataError("needs a shape here", where=spec.text, hint="write synthetic:3x224x224")
    if torch.Size(shape).numel() > _LARGEST:
        raise DataError("is larger than a sample can be", where=spec.text, hint="write synthetic:3x224x224")
    count = spec.options.get("n", _COUNT)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise DataError(f"n is {count!r}, not a number of samples", where=spec.text)
    return SyntheticSource(spec.text, shape, count, seed)
