"""Holding out validation samples from those of training."""

from dataclasses import replace

import torch

from modelopt_cli.data import Data
from modelopt_cli.errors import DataError, UsageError

_SEED = 20240301


def hold_out(data: Data, fraction: float) -> tuple[Data, Data]:
    """Training and validation samples: a random ``fraction`` of ``data``, at least one, is held out.

    Which samples that are depends on their number and on ``fraction`` alone, not on a training's seed: what
    one command held out, the next one on the same data does not train on either.

    Raises:
        UsageError: the data is a stream, whose samples cannot be told apart.
        DataError: nothing would be left to train on.
    """
    if data.size is None:
        raise UsageError(
            f"{data.name} has no length to hold a share of", where="--val-fraction", hint="give --val"
        )
    size = len(data)
    held = max(1, round(fraction * size))
    if held >= size:
        raise DataError(f"{size} samples are too few to hold some out", where=data.name, hint="give --val")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(_SEED)).tolist()
    pool = data.indices if data.indices is not None else range(size)
    val, train = (tuple(pool[i] for i in sorted(part)) for part in (order[:held], order[held:]))
    return replace(data, indices=train), replace(data, indices=val)
