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
from modelopt_cli.data.source import Raw, Samples, Source, Stream, is_sized
from modelopt_cli.data.targets import RawTarget
from modelopt_cli.errors import DataError
from modelopt_cli.user_code import user_code

INPUT_KEYS = ("pixel_values", "images", "image", "inputs", "input", "x", "input_ids")
LABEL_KEYS = ("labels", "label", "targets", "target", "y")
"""Keys of batches and samples that are mappings; the first that is there counts."""

_END = object()
_FORMS = (
    "give a data spec, a Dataset, a DataLoader, or an iterable of batches (tensors, or tensors with labels)"
)


def as_samples(data: Any, name: str, most: int | None = None) -> Samples:
    """Data in a form that ``open_data`` takes.

    Args:
        data: a data spec; a Dataset of samples; a DataLoader; or an iterable of batches: tensors
            ``(N, ...)``, pairs of them and labels ``(N,)``, or mappings with both; one batch alone will do.
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
        return DatasetStream(name, _Pairs(data))
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
    """Samples that are tensors in memory."""

    ready = True

    def __init__(self, name: str, samples: Iterable[tuple[Tensor, Any]]) -> None:
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

    def _samples(self) -> Iterator[tuple[Tensor, Any]]:
        for batch in _batches(self._batches, self.name):
            yield from _samples_of(batch, self.name)

    def __iter__(self) -> Iterator[tuple[Tensor, RawTarget]]:
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


class _Pairs:
    """A dataset whose samples may be mappings, as one of tensors or pairs."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        for name in ("classes", "num_classes"):
            if hasattr(dataset, name):
                setattr(self, name, getattr(dataset, name))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return _pair_of(self.dataset[index])

    def __iter__(self) -> Iterator[Any]:
        return map(_pair_of, self.dataset)


def _of_loader(loader: Any, name: str) -> Samples:
    """Its dataset where the order of its batches means nothing, so that training can shuffle by itself."""
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
    return GivenDataset(name, _Pairs(dataset))


def _is_pair(data: Any) -> bool:
    """True of one batch ``(tensor, labels)``, which is no list of two batches."""
    if not isinstance(data, tuple) or len(data) != 2 or not all(isinstance(each, Tensor) for each in data):
        return False
    samples, targets = data
    if targets.dim() == 1 and samples.dim() > 1:
        return True
    alike = samples.dtype == targets.dtype and samples.shape[1:] == targets.shape[1:]
    return not alike and targets.dim() > 0 and samples.dim() > 1 and len(samples) == len(targets)


def _pair_of(item: Any) -> Any:
    """A sample or batch that is a mapping, as a tensor or a pair."""
    if not isinstance(item, Mapping):
        return item
    key = next((key for key in INPUT_KEYS if key in item), None)
    if key is None:
        raise DataError(f"has none of the keys {', '.join(INPUT_KEYS)}")
    label = next((key for key in LABEL_KEYS if key in item), None)
    return item[key] if label is None else (item[key], item[label])


def _samples_of(batch: Any, name: str) -> Iterator[tuple[Tensor, Any]]:
    """The samples of a batch, each with its label or None."""
    try:
        pair = _pair_of(batch)
    except DataError as error:
        raise DataError(error.message, where=name) from None
    inputs, labels = (pair, None) if isinstance(pair, Tensor | np.ndarray) else _split(pair, name)
    try:
        tensor = torch.as_tensor(inputs)
    except TypeError as error:
        raise DataError(f"holds an array that is no tensor: {error}", where=name, hint=_FORMS) from None
    if tensor.is_meta or tensor.layout != torch.strided:
        kind = "on the meta device, without values" if tensor.is_meta else f"of layout {tensor.layout}"
        raise DataError(f"holds a tensor {kind}", where=name, hint="give dense tensors with values")
    if tensor.dim() < 2:
        raise DataError(
            f"holds a tensor of shape {tuple(tensor.shape)} where a batch should be",
            where=name,
            hint="the first dimension of a batch counts its samples",
        )
    if labels is None:
        yield from ((sample, None) for sample in tensor.unbind(0))
        return
    targets = _targets_of(labels, name)
    if len(targets) != len(tensor):
        raise DataError(f"holds a batch of {len(tensor)} samples and {len(targets)} labels", where=name)
    yield from zip(tensor.unbind(0), targets, strict=True)


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
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor | np.ndarray):
        if len(batch) == 1:
            return batch[0], None
        if len(batch) == 2:
            return batch[0], batch[1]
    raise DataError(f"holds a batch of type {type(batch).__name__}", where=name, hint=_FORMS)


def _checked(sample: tuple[Tensor, Any], where: str) -> tuple[Tensor, RawTarget]:
    tensor, label = sample
    return pair(tensor if label is None else (tensor, label), where)
