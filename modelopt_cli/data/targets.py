"""Targets: what the outputs for a sample are held against, from a source of data to a loss or a metric.

1. A source hands over a *raw target* with each sample (``RawTarget``), as it is in the data:

   - ``int``: a class, from 0;
   - ``float``: a number;
   - ``str``: a text;
   - a tensor without a batch dimension: a vector of numbers, one 0 or 1 for each class, a mask ``(H, W)`` of
     class ids, an image ``(C, H, W)``, token ids ``(T,)``;
   - a dictionary of any of these: ``{"boxes": (K, 4), "labels": (K,)}``, or a tuple of them, by place;
   - a picture, decoded, or an ``ImageFile`` that is decoded where targets are read;
   - ``None``: this sample has no target, which a task may allow;
   - a ``DataError``: the reason why there is none. It is raised only where targets are read.

   Which of these a task takes, its row in ``modelopt_cli.tasks`` says.
2. Where the sample comes as a picture that is still to be cropped and resized, the task's ``TargetFormat``
   says what of the target lies in it (``place``): that is moved along, see ``data.moving``.
3. The format checks a raw target next to the sample's input, as the network gets it. It
   returns what the task computes with, or raises a ``DataError``, to which the sample's name is added.
4. The same format collates the checked targets of a batch into ``Targets``: one tensor ``(N, ...)``, a
   dictionary of such tensors, or a list of anything, one for each sample. Where targets are not read, or
   there are none, they are -1 for every sample.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from modelopt_cli.data.decode import ImageFile
from modelopt_cli.data.moving import Motion
from modelopt_cli.errors import DataError
from modelopt_cli.settings import option
from modelopt_cli.text import short

RawTarget: TypeAlias = (
    int
    | float
    | str
    | list[str]
    | Tensor
    | tuple[Any, ...]
    | dict[str, Any]
    | Image.Image
    | ImageFile
    | DataError
    | None
)
Targets: TypeAlias = Tensor | dict[str, Tensor] | list[Any]


_SHOWN = 3
"""Numbers of a label that a message shows."""


class UnlikeOthers(DataError):
    """The target of a sample cannot be in one batch with those of others.

    Args:
        message: what is unlike.
        place: of the sample in the batch.
    """

    def __init__(self, message: str, place: int = 0) -> None:
        super().__init__(message)
        self.place = place


class TargetFormat(ABC):
    """The form in which a task takes its targets.

    Attributes:
        of_inputs: True if a sample without a target has one in its inputs.
        names: of the parts of a target that is a tuple.
    """

    of_inputs: bool = False
    names: tuple[str, ...] = ()

    def named(self, raw: RawTarget) -> RawTarget:
        """A target that is a tuple as a dictionary, by the names of its parts, or else their places."""
        if not isinstance(raw, tuple):
            return raw
        names = self.names or tuple(map(str, range(len(raw))))
        if len(raw) > len(names):
            raise DataError(f"target has {len(raw)} parts", hint=f"give {', '.join(names)}")
        return dict(zip(names, raw, strict=False))

    def place(self, raw: RawTarget, picture: Image.Image) -> Any:
        """The target of a picture that is still to be cropped and resized, as ``data.moving`` moves it along.

        :meth:`check` gets what becomes of it.

        Raises:
            DataError: it is of another form, or does not belong to a picture of this size.
        """
        return raw

    @abstractmethod
    def check(self, raw: RawTarget, inputs: Any, classes: int | None) -> Any:
        """The target of one sample, as :meth:`collate` takes it.

        Args:
            raw: as the source hands it over, but for a ``DataError``.
            inputs: the sample's input, or inputs by name, without a batch dimension.
            classes: number of the network's classes, or None where that is not known.

        Raises:
            DataError: it is of another form; the message need not name the sample.
        """

    def moved(self, targets: Targets, motion: Motion) -> Targets:
        """The targets of a batch, collated, whose pictures were moved: what lies in them moves along.

        Raises:
            UsageError: nothing tells how.
        """
        return targets

    @abstractmethod
    def collate(self, targets: Sequence[Any]) -> Targets:
        """The targets of a batch, from those of its samples; at least one.

        Raises:
            UnlikeOthers: names the one that does not go with the others.
        """


def indices_hint(*numbers: int, classes: int | None) -> str:
    """Next step where a class is none of a network's: the number right behind them speaks of a count from 1.

    Args:
        numbers: of the classes that it does not have.
        classes: how many it has, where that is known.
    """
    if classes is not None and set(numbers) == {classes}:
        return "classes count from 0: if the data's count from 1, take 1 off each"
    return "classes count from 0; check that the data's are those the network was trained on"


class ClassTargets(TargetFormat):
    """One class for each sample, an int64 tensor ``(N,)``."""

    def check(self, raw: RawTarget, inputs: Any, classes: int | None) -> int:
        """The class; see :class:`TargetFormat`."""
        label = whole_label(raw)
        if label < 0 or (classes is not None and label >= classes):
            wrong = "below 0" if classes is None else f"outside 0..{classes - 1}"
            raise DataError(f"label {label} is {wrong}", hint=indices_hint(label, classes=classes))
        return label

    def collate(self, targets: Sequence[int]) -> Tensor:
        """The classes ``(N,)``, int64."""
        return torch.tensor(targets, dtype=torch.int64)


CLASS_TARGETS = ClassTargets()


def whole_label(raw: Any) -> int:
    """A class as an int, from an int, a NumPy integer or a one-element integer tensor.

    Raises:
        DataError: it is something else.
    """
    if isinstance(raw, Tensor) and raw.numel() == 1 and not raw.is_floating_point():
        raw = raw.item()
    if isinstance(raw, bool) or not isinstance(raw, int | np.integer):
        raise DataError(f"label is {_shown(raw)}, not an integer", hint=_task_hint(raw))
    return int(raw)


def _shown(raw: Any) -> str:
    """A label that is no class: its value where that is short, else its form."""
    if isinstance(raw, Tensor):
        if raw.numel() == 1:
            return f"{raw.item():g}"
        if raw.dim() == 1:
            first = ", ".join(f"{value:g}" for value in raw[:_SHOWN].tolist())
            return f"{len(raw)} numbers ({first}{', ...' if len(raw) > _SHOWN else ''})"
        return f"a tensor of shape {'x'.join(map(str, raw.shape))}"
    return short(repr(raw)) if raw is None or isinstance(raw, bool | float | str) else type(raw).__name__


def _task_hint(raw: Any) -> str:
    """Next step where a label is no class: fractions are what regression takes, other forms other tasks."""
    numbers = isinstance(raw, float) or (
        isinstance(raw, Tensor) and raw.is_floating_point() and raw.dim() < 2
    )
    if numbers:
        return f"if the network is to return such numbers, say {option('task', 'regress')}"
    return f"if it is right, say with {option('task')} what the network is for"


def raw_target(value: Any) -> RawTarget:
    """Turn a target of the user's own code into the form in which sources hand targets over.

    NumPy's numbers and arrays become Python's numbers and tensors, tensors come to the CPU, and what no task
    could take becomes the reason for that.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, np.ndarray):
        if value.dtype.kind in "biuf":
            return torch.from_numpy(np.array(value))
    elif isinstance(value, Mapping):
        parts = {str(name): raw_target(part) for name, part in value.items()}
        return next((part for part in parts.values() if isinstance(part, DataError)), parts)
    elif value is None or isinstance(value, int | float | str | Image.Image | ImageFile | DataError):
        return value
    elif isinstance(value, list | tuple):
        if value and all(isinstance(each, str) for each in value):
            return list(value)  # names, of boxes
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            return torch.tensor(value)
        if isinstance(value, tuple):
            several = tuple(raw_target(part) for part in value)
            return next((part for part in several if isinstance(part, DataError)), several)
    return DataError(f"label is {type(value).__name__}, not an integer")


def classes_of(targets: Targets) -> Tensor:
    """Targets that are classes, int64 ``(N,)``.

    Raises:
        DataError: they are none.
    """
    if not isinstance(targets, Tensor) or targets.dim() != 1 or targets.is_floating_point():
        raise DataError("labels must be one integer for each sample")
    return targets


def unread(count: int) -> Tensor:
    """Targets of so many samples where they are not read."""
    return torch.full((count,), -1, dtype=torch.int64)


def target_count(targets: Targets) -> int:
    """Number of samples that targets belong to."""
    return len(next(iter(targets.values())) if isinstance(targets, dict) else targets)


def targets_to(targets: Targets, device: str | torch.device) -> Targets:
    """Targets on a device, whatever tensors they hold."""
    moved: Targets = _each(targets, lambda tensor: tensor.to(device, non_blocking=True))
    return moved


def select_targets(targets: Targets, indices: Tensor | slice) -> Targets:
    """The targets of some samples, by their places in the batch."""
    if not isinstance(targets, list):
        selected: Targets = _each(targets, lambda tensor: tensor[indices])
        return selected
    places = range(len(targets))[indices] if isinstance(indices, slice) else indices.tolist()
    return [targets[place] for place in places]


def _each(value: Any, change: Any) -> Any:
    """The same structure with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _each(part, change) for name, part in value.items()}
    return [_each(part, change) for part in value] if isinstance(value, list) else value
