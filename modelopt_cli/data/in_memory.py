"""Samples given as Python objects: tensors, batches, Datasets, DataLoaders and iterators."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from modelopt_cli.data.batch_samples import (
    FORMS,
    BatchStream,
    batches_of,
    checked_pair,
    own_collate,
    samples_of,
)
from modelopt_cli.data.dataset_sources import DatasetSource, DatasetStream, TorchvisionSource, of_loader
from modelopt_cli.data.raw_inputs import RawInputs, several
from modelopt_cli.data.source import Raw, Samples, Source, Stream
from modelopt_cli.data.targets import RawTarget
from modelopt_cli.errors import DataError
from modelopt_cli.user_code import user_code


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
        return DatasetStream(name, data, own_collate(data))
    if isinstance(data, Dataset):
        return _of_dataset(data, name)
    if isinstance(data, Tensor | np.ndarray | Mapping) or _is_pair(data):
        return InMemory(name, samples_of(data, name))
    if not isinstance(data, Iterable):
        raise DataError(f"is of type {type(data).__name__}", where=name, hint=FORMS)
    if isinstance(data, Iterator | Sequence):
        samples = itertools.chain.from_iterable(samples_of(batch, name) for batch in batches_of(data, name))
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
        return checked_pair(self._samples[index], self.where(index))


class GivenDataset(DatasetSource):
    """A map-style Dataset, which goes to loader processes as it is."""

    def __init__(self, name: str, dataset: Any, collate: Any = None) -> None:
        super().__init__(name, "", {}, dataset, collate)

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _of_loader(loader: Any, name: str) -> Samples:
    """The dataset of a loader whose order means nothing, so that training can shuffle by itself."""
    dataset, collate = of_loader(loader)
    return BatchStream(name, loader) if dataset is None else _of_dataset(dataset, name, collate)


def _of_dataset(dataset: Any, name: str, collate: Any = None) -> Source:
    with user_code("cannot be read", name, DataError):
        size = len(dataset)
    if size == 0:
        raise DataError("holds no samples", where=name)
    with user_code("cannot be read", f"{name} sample 0", DataError):
        first = dataset[0]
    collate = collate or own_collate(dataset)
    is_picture = isinstance(first, tuple | list) and len(first) == 2 and isinstance(first[0], Image.Image)
    if is_picture and collate is None:
        return TorchvisionSource(name, dataset)
    return GivenDataset(name, dataset, collate)


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
