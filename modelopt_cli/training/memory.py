"""Samples that are preprocessed once and kept, where there is room for all of them."""

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F

from modelopt_cli.data import Data
from modelopt_cli.data.arrays import ArraySource
from modelopt_cli.data.dataset_sources import DatasetSource
from modelopt_cli.data.preprocess import ImageTransform
from modelopt_cli.data.sample_batches import Batch
from modelopt_cli.data.targets import ClassTargets, RawTarget, TargetFormat
from modelopt_cli.program.input_batch import Inputs, make_inputs, select, tensors_of
from modelopt_cli.program.input_spec import Preprocess
from modelopt_cli.program.samples import DTYPES

IN_MEMORY = 1 << 30
"""Bytes of preprocessed samples that are kept; larger data is read and preprocessed again in every epoch."""

_AT_ONCE = 1024
_kept: "weakref.WeakKeyDictionary[Data, Kept | None]" = weakref.WeakKeyDictionary()

Kept: TypeAlias = tuple[Inputs, Tensor | list[Any]]


def in_memory(data: Data, workers: int = 0) -> Kept | None:
    """All inputs and targets, kept for as long as ``data`` is.

    Targets are classes, int64 ``(N,)``, or a list of those of another form, checked but not collated. None
    where they need more than ``IN_MEMORY`` or are of different sizes, for an iterable-style dataset, and for
    the user's own dataset, which may be random.

    Raises:
        DataError: as :meth:`Data.batches`.
    """
    if data.size is None or isinstance(data.source, DatasetSource):
        return None
    if data.size * _bytes_of_one(data) > IN_MEMORY:
        return None
    if data not in _kept:
        _kept[data] = _from_array(data) or _one_by_one(data, workers)
    return _kept[data]


def _bytes_of_one(data: Data) -> int:
    """Bytes of a preprocessed sample: its inputs, and its target where that is more than a class."""
    inputs = 4 * sum(torch.Size(each.shape).numel() for each in data.input.tensors)
    if isinstance(data.targets, ClassTargets) or not data.gives_targets:
        return inputs
    target = data.get(0)[1]
    parts = target.values() if isinstance(target, dict) else [target]
    return inputs + sum(part.nbytes for part in parts if isinstance(part, Tensor))


def batch_of(data: Data, kept: Kept, indices: Tensor | slice) -> Batch:
    """The batch of some of the samples that :func:`in_memory` keeps of ``data``, by their places."""
    inputs, targets = kept
    if isinstance(targets, Tensor):
        return select(inputs, indices), targets[indices]
    places = range(len(targets))[indices] if isinstance(indices, slice) else indices.tolist()
    return select(inputs, indices), data.collated([targets[place] for place in places], places)


class _Apart(TargetFormat):
    """The targets of a batch as a list, so that they can be collated with others."""

    def __init__(self, targets: TargetFormat) -> None:
        self._targets = targets
        self.of_inputs, self.names = targets.of_inputs, targets.names

    def place(self, raw: RawTarget, picture: Image.Image) -> Any:
        return self._targets.place(raw, picture)

    def check(self, raw: RawTarget, inputs: Any, classes: int | None) -> Any:
        return self._targets.check(raw, inputs, classes)

    def collate(self, targets: Sequence[Any]) -> list[Any]:
        return list(targets)


def uncollated(data: Data) -> Data:
    """The same samples, of whose batches the targets are lists, checked but not collated."""
    return replace(data, targets=_Apart(data.targets))


def _one_by_one(data: Data, workers: int) -> Kept | None:
    """All samples, read in order; None where one is of another size than the data say."""
    inputs = make_inputs(
        data.input, lambda each: torch.empty(len(data), *each.shape, dtype=DTYPES[each.dtype])
    )
    targets: list[Any] = []
    at_once = 1 if any(each.free for each in data.input.tensors) else _AT_ONCE
    for some, theirs in uncollated(data).batches(at_once, workers=workers):
        for kept, tensor in zip(tensors_of(inputs), tensors_of(some), strict=True):
            if tensor.shape[1:] != kept.shape[1:]:
                return None
            kept[len(targets) : len(targets) + len(tensor)] = tensor
        targets.extend(theirs)
    as_classes = isinstance(data.targets, ClassTargets) or not data.gives_targets
    return inputs, torch.tensor(list(map(int, targets)), dtype=torch.int64) if as_classes else targets


def _from_array(data: Data) -> Kept | None:
    """Samples of 8-bit images that are neither cut nor resized, computed by the thousand; None for others."""
    source, transform = data.source, data.transform
    if not isinstance(source, ArraySource) or type(transform) is not ImageTransform:
        return None
    if not isinstance(data.targets, ClassTargets) or source.num_classes is None:
        return None
    preprocess, (height, width) = transform.preprocess, source.images.shape[1:3]
    if source.channels != preprocess.channels or not _is_uncut(preprocess, height, width):
        return None
    indices: Sequence[int] = data.indices if data.indices is not None else range(len(source))
    labels = torch.from_numpy(source.labels[np.asarray(indices)].astype(np.int64))
    if data.input.shape != (preprocess.channels, height, width) or _outside(labels, data.classes):
        return None  # reading them one by one says which
    images = torch.empty(len(indices), preprocess.channels, height, width)
    for start in range(0, len(indices), _AT_ONCE):
        some = source.images[np.asarray(indices[start : start + _AT_ONCE])]
        pixels = torch.from_numpy(some).view(len(some), height, width, -1).movedim(3, 1)
        scaled = F.convert_image_dtype(pixels, torch.float)
        images[start : start + len(some)] = F.normalize(scaled, list(preprocess.mean), list(preprocess.std))
    return images, labels


def _is_uncut(preprocess: Preprocess, height: int, width: int) -> bool:
    """True if the network takes all of the image at its own size."""
    resized = preprocess.resize in (None, (height, width), min(height, width))
    return resized and (preprocess.crop is None or preprocess.crop == height == width)


def _outside(labels: Tensor, classes: int | None) -> bool:
    return classes is not None and bool((labels >= classes).any())
