"""Batches as the user's own code makes them, taken apart into samples."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modelopt_cli.data.raw_inputs import RawInputs, label_of, read_inputs, several, without_label
from modelopt_cli.data.source import Stream, is_sized
from modelopt_cli.data.targets import RawTarget, raw_target
from modelopt_cli.errors import DataError
from modelopt_cli.user_code import user_code

_END = object()
FORMS = (
    "give a data spec, a Dataset, a DataLoader, or an iterable of batches (tensors, or tensors with labels)"
)


class BatchStream(Stream):
    """Batches that can be gone through again and again, sample by sample."""

    def __init__(self, name: str, batches: Iterable[Any]) -> None:
        self.name, self._batches, self.sized = name, batches, is_sized(batches)
        first = next(self._samples(), None)
        if first is None:
            raise DataError("holds no samples", where=name)
        self.labelled = first[1] is not None

    def _samples(self) -> Iterator[tuple[RawInputs, Any]]:
        for batch in batches_of(self._batches, self.name):
            yield from samples_of(batch, self.name)

    def __iter__(self) -> Iterator[tuple[RawInputs, RawTarget]]:
        for index, sample in enumerate(self._samples()):
            yield checked_pair(sample, self.where(index))


def batches_of(batches: Iterable[Any], name: str) -> Iterator[Any]:
    """The batches of the user's iterable; what it raises becomes one line."""
    with user_code("cannot be read", name, DataError):
        items = iter(batches)
    for number in itertools.count():
        with user_code("cannot be read", f"{name} batch {number}", DataError):
            batch = next(items, _END)
        if batch is _END:
            return
        yield batch


def has_label(item: Any) -> bool:
    """True if an item of a dataset has a label."""
    if isinstance(item, Mapping):
        return label_of(item) is not None
    return not isinstance(item, Tensor) and not (isinstance(item, tuple | list) and len(item) == 1)


def pair(item: Any, where: str) -> tuple[RawInputs, RawTarget]:
    """The inputs of a sample, and its raw target or why it has none.

    Args:
        item: inputs, or a pair of inputs and target, or a mapping with both. Inputs are a tensor, or several
            by place or by name.
        where: the sample, for messages.

    Raises:
        DataError: it is something else.
    """
    target: RawTarget = DataError("has no label")
    inputs = item
    if isinstance(item, Mapping):
        label = label_of(item)
        inputs, target = without_label(item, label), target if label is None else raw_target(item[label])
    elif isinstance(item, tuple | list) and len(item) == 1:
        (inputs,) = item
    elif isinstance(item, tuple | list) and len(item) == 2:
        inputs, target = item[0], raw_target(item[1])
    elif not isinstance(item, Tensor):
        raise DataError(
            "is not a pair of inputs and target",
            where=where,
            hint="return (inputs, target); several inputs stand in a tuple or a mapping",
        )
    return read_inputs(inputs, where), target


def checked_pair(sample: tuple[RawInputs, Any], where: str) -> tuple[RawInputs, RawTarget]:
    """Inputs and raw target of a sample that was taken from a batch."""
    inputs, label = sample
    return pair((inputs,) if label is None else (inputs, label), where)


def own_collate(*owners: Any) -> Callable[[list[Any]], Any] | None:
    """The ``collate_fn`` of the first of these objects that has one."""
    functions = (getattr(owner, "collate_fn", None) for owner in owners)
    return next((each for each in functions if callable(each)), None)


def put_together(
    collate: Callable[[list[Any]], Any], items: list[Any], where: str
) -> list[tuple[RawInputs, Any]]:
    """The samples of the batch that the user's own function makes of items, each with its label or None.

    Raises:
        DataError: it fails, or makes a batch of other samples.
    """
    with user_code("its collate_fn failed", where, DataError):
        batch = collate(items)
    alone = isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[0], tuple | list)
    if alone and len(batch[0]) == len(items) and not _has_several(items[0]):
        samples = list(zip(batch[0], targets_of(batch[1], where), strict=False))
    else:
        samples = list(samples_of(batch, where))
    if len(samples) != len(items):
        hint = "it must keep their number and order"
        raise DataError(f"its collate_fn made {len(samples)} samples of {len(items)}", where=where, hint=hint)
    return samples


def _has_several(item: Any) -> bool:
    """True of an item with several inputs."""
    return isinstance(item, Mapping) or (isinstance(item, tuple | list) and several(item[0]))


def samples_of(batch: Any, name: str) -> Iterator[tuple[RawInputs, Any]]:
    """The samples of a batch, each with its label or None."""
    inputs, labels = _split(batch, name)
    samples = _unbound(inputs, name)
    if labels is None:
        yield from ((sample, None) for sample in samples)
        return
    targets = targets_of(labels, name)
    if len(targets) != len(samples):
        raise DataError(f"holds a batch of {len(samples)} samples and {len(targets)} labels", where=name)
    yield from zip(samples, targets, strict=True)


def _unbound(inputs: Any, name: str) -> Sequence[RawInputs]:
    """The inputs of a batch, those of each sample by itself."""
    if isinstance(inputs, Mapping):
        parts = [_batch(part, name, 1) for part in inputs.values()]
        return [dict(zip(inputs, sample, strict=True)) for sample in _together(parts, name)]
    if isinstance(inputs, tuple | list):
        return _together([_batch(part, name, 1) for part in inputs], name)
    return _batch(inputs, name, 2).unbind(0)


def _together(parts: Sequence[Tensor], name: str) -> list[tuple[Tensor, ...]]:
    counts = {len(part) for part in parts}
    if len(counts) > 1:
        sizes = " and ".join(str(len(part)) for part in parts)
        raise DataError(f"holds a batch whose inputs have {sizes} samples", where=name)
    return list(zip(*(part.unbind(0) for part in parts), strict=True))


def _batch(value: Any, name: str, least: int) -> Tensor:
    """An input of a batch as a tensor of at least so many dimensions."""
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"holds an array that is no tensor: {error}", where=name, hint=FORMS) from None
    if tensor.is_meta or tensor.layout != torch.strided:
        kind = "on the meta device, without values" if tensor.is_meta else f"of layout {tensor.layout}"
        raise DataError(f"holds a tensor {kind}", where=name, hint="give dense tensors with values")
    if tensor.dim() < least:
        raise DataError(
            f"holds a tensor of shape {tuple(tensor.shape)} where a batch should be",
            where=name,
            hint="the first dimension of a batch counts its samples",
        )
    return tensor


def targets_of(batch: Any, name: str) -> Sequence[Any]:
    """The targets of a batch, one for each sample."""
    if isinstance(batch, Tensor | np.ndarray) and batch.ndim:
        return batch.tolist() if batch.ndim == 1 else list(batch)
    if isinstance(batch, Mapping) and batch:
        parts = [targets_of(part, name) for part in batch.values()]
        if len({len(part) for part in parts}) == 1:
            return [dict(zip(batch, part, strict=True)) for part in zip(*parts, strict=True)]
    if isinstance(batch, list | tuple):
        return batch
    hint = "the labels of a batch are one for each sample; a DataLoader needs a batch_size"
    raise DataError(f"holds a batch with labels of type {type(batch).__name__}", where=name, hint=hint)


def _split(batch: Any, name: str) -> tuple[Any, Any]:
    """The inputs of a batch and its labels, or None."""
    if isinstance(batch, Tensor | np.ndarray):
        return batch, None
    if isinstance(batch, Mapping):
        label = label_of(batch)
        try:
            return without_label(batch, label), None if label is None else batch[label]
        except DataError as error:
            raise DataError(error.message, where=name, hint=error.hint) from None
    if isinstance(batch, tuple | list) and len(batch) in (1, 2):
        inputs = batch[0]
        if isinstance(inputs, Tensor | np.ndarray) or several(inputs):
            return inputs, batch[1] if len(batch) == 2 else None
    raise DataError(f"holds a batch of type {type(batch).__name__}", where=name, hint=FORMS)
