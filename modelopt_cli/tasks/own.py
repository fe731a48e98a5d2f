"""A metric of one's own: ``FILE.py:CALLABLE``.

It is called with the network's outputs for a batch and the batch's targets, and returns one number for each
sample, whose mean is the metric. Attributes of the callable may say more: ``higher_is_better`` (True),
``unit`` ("") and ``digits`` (4) of the table, and ``loss``, a function of the same arguments to a scalar, by
which a network can be trained.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from modelopt_cli.data.targets import RawTarget, TargetFormat, Targets
from modelopt_cli.errors import DataError, InputError
from modelopt_cli.user_code import load_callable


class AnyTargets(TargetFormat):
    """Targets as the data has them: stacked where they are numbers or of one shape, else a list."""

    def check(self, raw: RawTarget, inputs: Any, classes: int | None) -> Any:
        """The target itself; see :class:`TargetFormat`."""
        if raw is None:
            raise DataError("has no target")
        return raw

    def collate(self, targets: Sequence[Any]) -> Targets:
        """Targets of a batch."""
        try:
            collated = default_collate(list(targets))
        except (TypeError, RuntimeError, KeyError):
            return list(targets)
        return collated if isinstance(collated, Tensor | dict) else list(targets)


def targets(names: tuple[str, ...] | None = None) -> AnyTargets:
    """The format of the targets."""
    return AnyTargets()


def judged(outputs: Any, wanted: Targets, inputs: Any) -> Any:
    """The network's outputs as they are."""
    return outputs


def load(text: str) -> Any:
    """The callable that ``FILE.py:CALLABLE`` names."""
    place, _, name = text.rpartition(":")
    return load_callable(place, name, InputError)


def scores(metric: Any, outputs: Any, wanted: Targets, samples: int) -> Tensor:
    """The numbers that a metric gives the samples of a batch, ``(N,)``, float64.

    Raises:
        InputError: it returns something else.
    """
    result = metric(outputs, wanted)
    try:
        numbers = torch.as_tensor(result).detach().double().cpu()
    except (TypeError, ValueError, RuntimeError):
        numbers = torch.empty(0, 0)
    if numbers.shape != (samples,):
        form = tuple(numbers.shape) if numbers.dim() != 2 else type(result).__name__
        raise InputError(
            f"the metric returned {form} for {samples} samples where one number for each should be"
        )
    return numbers
