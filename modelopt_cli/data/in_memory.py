"""Samples given as Python objects: tensors, batches, Datasets, DataLoaders and iterators."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.dataloader import default_collate

from modelopt_cli.data.dataset_sources import DatasetSource, DatasetStream, TorchvisionSource, pair
from modelopt_cli.data.raw_inputs import RawInputs, label_of, several, without_label
from modelopt_cli.data.source import Raw, Samples, Source, Stream, is_sized
from modelopt_cli.data.targets import RawTarget
from modelopt_cli.errors import DataError
from modelopt_cli.user_code import user_code

_END = object()
_FORMS = (
    "give a data spec, a Dataset, a DataLoader, or an iterable of batches (tensors, or tensors with labels)"
)


def as_samples(data: Any, name: str, most: int | None = None) -> Samples:
    """Data in a form that ``open_data`` takes.

    Args:
        data: a data spec; a Dataset of samples; a DataLoader; or an iterable of batches: tensors
            ``(N, ...)``, pairs of inputs and labels ``(N,)``, or mappings with both; inputs are a tensor, or
            several by place or by name. One batch alone will do.
        name: of the argument, for messages and the history.
        most: how many samples of an iterator, which can be gone through but once, are kept.

    Raises:
        DataError: it is none of these, or empty.
    """
    if isinstance(data, str | Source | Stream):
        return data
    if hasattr(data, "__fspath__"):
        return str(data)
    if isinstance(data, DataLoader):
        return _of_loader(data, name)
    if isinstance(data, IterableDataset):
        return DatasetStream(name, data)
    if isinstance(data, Dataset):
        return _of_dataset(data, name)
    if isinstance(data, Tensor | np.ndarray | Mapping) or _is_pair(data):
        return InMemory(name, _samples_of(data, name))
    if not isinstance(data, Iterable):
        raise DataError(f"is of type {type(data).__name__}", where=name, hint=_FORMS)
    if isinstance(data, Iterator | Sequence):
        samples = itertools.chain.from_iterable(_samples_of(batch, name) for batch in _batches(data, name))
        return InMemory(name, itertools.islice(samples, most if isinstance(data, Iterator) else None))
    return BatchStream(name, data)


class InMemory(Source):
    """Samples whose inputs are tensors in memory."""

    ready = True

    def __init__(self, name: str, samples: Iterable[tuple[RawInputs, Any]]) -> None:
        self.name = name
        self._samples = list(samples)
        if not self._samples:
            raise DataError("holds no samples", where=name)
        labels = [label for _, label in self._samples]
        self.labelled = labels[0] is not None
        if self.labelled and all(isinstance(label, int) for label in labels):
            self.num_classes = max(labels) + 1

    def __len__(self) -> int:
        return len(self._samples)

    def load(self, index: int) -> tuple[Raw, RawTarget]:
        """The sample at ``index``."""
        return _checked(self._samples[index], self.where(index))


class BatchStream(Stream):
    """Batches that can be gone through again and again, sample by sample."""

    def __init__(self, name: str, batches: Iterable[Any]) -> None:
        self.name, self._batches, self.sized = name, batches, is_sized(batches)
        first = next(self._samples(), None)
        if first is None:
            raise DataError("holds no samples", where=name)
        self.labelled = first[1] is not None

    def _samples(self) -> Iterator[tuple[RawInputs, Any]]:
        for batch in _batches(self._batches, self.name):
            yield from _samples_of(batch, self.name)

    def __iter__(self) -> Iterator[tuple[RawInputs, RawTarget]]:
        for index, sample in enumerate(self._samples()):
            yield _checked(sample, self.where(index))


class GivenDataset(DatasetSource):
    """A map-style Dataset, which goes to loader processes as it is."""

    def __init__(self, name: str, dataset: Any) -> None:
        super().__init__(name, "", {}, dataset)

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _of_loader(loader: Any, name: str) -> Samples:
    """The dataset of a loader whose order means nothing, so that training can shuffle by itself."""
    plain = type(loader.sampler) in (SequentialSampler, RandomSampler) and hasattr(loader.dataset, "__len__")
    if plain and loader.collate_fn is default_collate:
        return _of_dataset(loader.dataset, name)
    return BatchStream(name, loader)


def _batches(batches: Iterable[Any], name: str) -> Iterator[Any]:
    """The batches of the user's iterable; what it raises becomes one line."""
    with user_code("cannot be read", name, DataError):
        items = iter(batches)
    for number in itertools.count():
        with user_code("cannot be read", f"{name} batch {number}", DataError):
            batch = next(items, _END)
        if batch is _END:
            return
        yield batch


def _of_dataset(dataset: Any, name: str) -> Source:
    with user_code("cannot be read", name, DataError):
        size = len(dataset)
    if size == 0:
        raise DataError("holds no samples", where=name)
    with user_code("cannot be read", f"{name} sample 0", DataError):
        first = dataset[0]
    if isinstance(first, tuple | list) and len(first) == 2 and isinstance(first[0], Image.Image):
        return TorchvisionSource(name, dataset)
    return GivenDataset(name, dataset)


def _is_pair(data: Any) -> bool:
    """True of one batch ``(inputs, labels)``, which is no list of two batches."""
    if not isinstance(data, tuple) or len(data) != 2 or not isinstance(data[1], Tensor):
        return False
    inputs, targets = data
    if isinstance(inputs, Mapping) or several(inputs):
        return bool(targets.dim() > 0)
    if not isinstance(inputs, Tensor):
        return False
    if targets.dim() == 1 and inputs.dim() > 1:
        return True
    alike = inputs.dtype == targets.dtype and inputs.shape[1:] == targets.shape[1:]
    return not alike and targets.dim() > 0 and inputs.dim() > 1 and len(inputs) == len(targets)


def _samples_of(batch: Any, name: str) -> Iterator[tuple[RawInputs, Any]]:
    """The samples of a batch, each with its label or None."""
    inputs, labels = _split(batch, name)
    samples = _unbound(inputs, name)
    if labels is None:
        yield from ((sample, None) for sample in samples)
        return
    targets = _targets_of(labels, name)
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
        raise DataError(f"holds an array that is no tensor: {error}", where=name, hint=_FORMS) from None
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


def _targets_of(batch: Any, name: str) -> Sequence[Any]:
    """The targets of a batch, one for each sample."""
    if isinstance(batch, Tensor | np.ndarray) and batch.ndim:
        return batch.tolist() if batch.ndim == 1 else list(batch)
    if isinstance(batch, Mapping) and batch:
        parts = [_targets_of(part, name) for part in batch.values()]
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
    raise DataError(f"holds a batch of type {type(batch).__name__}", where=name, hint=_FORMS)


def _checked(sample: tuple[RawInputs, Any], where: str) -> tuple[RawInputs, RawTarget]:
    inputs, label = sample
    return pair((inputs,) if label is None else (inputs, label), where)
