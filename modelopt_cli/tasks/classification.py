"""One class for each sample: of an image, a text, a sound."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modelopt_cli.data.targets import CLASS_TARGETS, ClassTargets, RawTarget, Targets, indices_hint
from modelopt_cli.errors import DataError
from modelopt_cli.settings import did_you_mean
from modelopt_cli.tasks.task import Misfit
from modelopt_cli.tasks.task_output import finite, require


class NamedClassTargets(ClassTargets):
    """Classes by number, or by their names where the network has names for them."""

    def __init__(self, names: Sequence[str]) -> None:
        self._numbers = {name: number for number, name in enumerate(names)}

    def check(self, raw: RawTarget, inputs: Any, classes: int | None) -> int:
        """The class; see :class:`TargetFormat`."""
        if isinstance(raw, str):
            if raw not in self._numbers:
                raise DataError(f"the network has no class {raw!r}", hint=did_you_mean(raw, self._numbers))
            raw = self._numbers[raw]
        return super().check(raw, inputs, classes)


def targets(names: tuple[str, ...] | None = None) -> ClassTargets:
    """The format of the targets."""
    return CLASS_TARGETS if names is None else NamedClassTargets(names)


def judged(logits: Any, labels: Targets, inputs: Any) -> Tensor:
    """Logits ``(N, C)``, float32.

    Raises:
        InputError: the network is no classifier, or gives NaN.
        Misfit: a label is not one of its classes.
        DataError: the labels are no integers.
    """
    checked = class_logits(logits, len(labels))
    check_labels(labels, checked.shape[1])
    return checked


def class_logits(logits: Any, samples: int) -> Tensor:
    """Logits ``(N, C)`` of a classifier, float32; raises InputError where it is none."""
    fits = isinstance(logits, Tensor) and logits.dim() == 2 and len(logits) == samples
    require(fits, logits, samples, "a classifier", "classes", "give a classification network")
    return finite(logits)


def check_labels(labels: Targets, classes: int) -> None:
    """Refuse labels that are not ``(N,)`` integers from 0, below ``classes``.

    Raises:
        DataError: they are of another form.
        Misfit: naming the first that is outside.
    """
    if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point():
        raise DataError("labels must be one integer for each sample")
    outside = ((labels < 0) | (labels >= classes)).nonzero().flatten()
    if outside.numel():
        place = int(outside[0])
        raise Misfit(
            place,
            f"label {int(labels[place])} is not among the network's {classes} classes",
            indices_hint(int(labels[place]), classes=classes),
        )


def ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """Rank of each label among the classes, from 0.

    It is the number of classes with a larger logit, plus those with an equal logit and a lower index. A tie
    goes to the lowest index, then, whatever the kernel or the device.

    Args:
        logits: ``(N, C)``.
        labels: ``(N,)``, int64.

    Returns:
        ``(N,)``, int64.
    """
    own = logits.gather(1, labels.long().unsqueeze(1))
    before = torch.arange(logits.shape[1], device=logits.device) < labels.unsqueeze(1)
    return ((logits > own) | ((logits == own) & before)).sum(1)


def is_among_largest(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """True for each sample whose label is among the ``count`` classes with the largest logits, ``(N,)``."""
    return ranks(logits, labels) < count


def predicted(logits: Any) -> Tensor | None:
    """The class with the largest logit, the lowest of several, int64 ``(N,)`` on the CPU.

    None where there are no logits ``(N, C)``.

    Raises:
        InputError: one is NaN.
    """
    if not isinstance(logits, Tensor) or logits.dim() != 2 or not logits.shape[1]:
        return None
    logits = finite(logits)
    classes = logits.shape[1]
    index = torch.arange(classes, device=logits.device)
    largest = logits == logits.amax(1, keepdim=True)
    return torch.where(largest, index, classes).amin(1).cpu()


def row_labels(labels: Targets, logits: Tensor) -> Targets:
    """The labels themselves or, where samples are mixed, their probabilities."""
    return labels
