"""Training batches: shuffled again in each epoch, augmented, and the same for any number of processes."""

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modelopt_cli.data import Data
from modelopt_cli.data import sample_batches as samples
from modelopt_cli.data.dataset_sources import DatasetSource
from modelopt_cli.data.targets import Targets, unread
from modelopt_cli.data.workers import in_order
from modelopt_cli.errors import UsageError
from modelopt_cli.program.input_batch import Inputs, concatenate, each_of, select, tensors_of
from modelopt_cli.settings import option
from modelopt_cli.training.augment import BatchAugmentation, Moved, batch_augmentation, image_augmentation
from modelopt_cli.training.catalog import AUGMENTATIONS
from modelopt_cli.training.config import TrainConfig
from modelopt_cli.training.distributed import World
from modelopt_cli.training.memory import Kept, batch_of, in_memory, uncollated
from modelopt_cli.training.random_numbers import seeded, uniform

_ALONE = World()


class Batch(NamedTuple):
    """The part of one global batch that is this process's.

    Attributes:
        inputs: what the network is given, N at least 1.
        labels: the targets, int64 ``(N,)`` of classes.
        weight: N over the samples of the global batch, so 1.0 in a single process. The mean loss of each part
            times its weight, summed over the processes, is the mean loss of the batch. 0.0 where nothing fell
            to this process, and it got a stand-in to take part in what all processes do.
        samples: int64 ``(N,)``, their indices in the data.
        variant: the number that their augmentation was drawn by; 0 where nothing is drawn.
    """

    inputs: Inputs
    labels: Targets
    weight: float
    samples: Tensor
    variant: int

    @property
    def size(self) -> int:
        """Samples here that belong to the batch: N, or 0 for a stand-in."""
        return len(self.samples) if self.weight else 0


def steps_per_epoch(data: Data, batch_size: int) -> int:
    """Number of batches. A single sample left over joins the last one: batch norm cannot train on one.

    Raises:
        UsageError: the data is iterable-style, and nobody knows.
    """
    if data.size is None:
        raise UsageError(
            "is iterable-style and has no length, which training needs",
            where=data.name,
            hint="give a dataset with __getitem__ and __len__",
        )
    full, last_batch = divmod(data.size, batch_size)
    return full + (last_batch > 1 or full == 0)


def training_batches(
    data: Data,
    *,
    batch_size: int,
    epoch: int,
    seed: int,
    augment: str = TrainConfig.augment,
    cycle: int = 0,
    workers: int = 0,
    world: World = _ALONE,
    start_step: int = 0,
) -> Iterator[Batch]:
    """Batches of one epoch, from ``start_step`` on; what comes before it is not even read.

    The order depends on the seed and the epoch, a sample's augmentation on the seed, the variant and the
    sample's index in ``data``: neither on ``workers``, on ``world`` nor on ``start_step``. Where the
    preprocessed samples fit into ``IN_MEMORY`` they are read once and kept for as long as ``data`` is. The
    user's own datasets are read every time, for they may be random, with the generators of torch, NumPy and
    Python seeded for each sample.
    An iterable-style dataset is read in its own order, from its start, in every process.

    Args:
        data: labelled samples.
        batch_size: samples of a global batch.
        epoch: from 0.
        seed: of order and augmentation.
        augment: a key of ``AUGMENTATIONS``.
        cycle: epochs with augmentations of their own, which are then repeated in turn; 0: always new ones.
        workers: decoding processes, for what is not kept.
        world: the processes that share each batch.
        start_step: of the epoch, from 0.

    Raises:
        DataError: as :meth:`Data.batches`.
        UsageError: the augmentation does not suit the data.
    """
    loaded = image_augmentation(augment, data)
    variant = epoch % cycle if cycle else epoch
    epoch_of = _Epoch(
        data if loaded is None else replace(data, transform=loaded),
        batch_augmentation(augment, data),
        batch_size,
        epoch,
        variant if is_drawn(augment, data) else 0,
        seed,
        world,
        drawn=loaded is not None or isinstance(data.source, DatasetSource),
    )
    if data.size is None:
        if loaded is not None:
            raise UsageError(f"{augment} needs images by number", where=option("augment"))
        return itertools.islice(_streamed(epoch_of), start_step, None)
    kept = None if epoch_of.drawn else in_memory(data, workers)
    return _batches(_Steps(epoch_of, kept, start_step), 0 if kept else workers)


def is_drawn(augment: str, data: Data) -> bool:
    """True if variants of a sample may differ: by augmentation, or by what the user's own dataset draws."""
    return AUGMENTATIONS[augment].is_random or isinstance(data.source, DatasetSource)


def ordered_batches(data: Data, batch_size: int, *, workers: int = 0) -> Iterator[samples.Batch]:
    """The samples in order, as :meth:`Data.batches`, read once and kept where they fit into ``IN_MEMORY``."""
    kept = in_memory(data, workers)
    if kept is None:
        return data.batches(batch_size, workers=workers)
    starts = range(0, len(data), batch_size)
    return (batch_of(data, kept, slice(start, start + batch_size)) for start in starts)


@dataclass(frozen=True, eq=False)
class _Epoch:
    """Data and settings that all batches of an epoch have in common.

    Attributes:
        epoch: decides the order.
        variant: decides what is drawn for a sample.
        drawn: True if loading a sample is random itself.
    """

    data: Data
    augment: BatchAugmentation | None
    batch_size: int
    epoch: int
    variant: int
    seed: int
    world: World
    drawn: bool

    def draws(self, indices: NDArray[np.int64]) -> Tensor:
        """The random numbers of these samples' augmentation, a row for each."""
        count = self.augment.draws if self.augment is not None else 0
        return uniform(self.seed, self.variant, indices, count)

    def augmented(self, batch: samples.Batch, draws: Tensor) -> samples.Batch:
        """The batch with its pictures moved, and with them what of the targets lies in them."""
        if self.augment is None:
            return batch
        augment, (inputs, targets) = self.augment, batch
        if self.data.gives_targets:
            height, width = tensors_of(inputs)[0].shape[2:]
            targets = self.data.targets.moved(targets, Moved(augment, draws, (height, width)))
        return each_of(inputs, lambda images: augment(images, draws)), targets

    def together(self, indices: NDArray[np.int64]) -> samples.Batch:
        """The batch of these samples, read again."""
        around = partial(seeded, self.seed, self.variant) if self.drawn else nullcontext
        return self.data.together(indices.tolist(), around)

    def part(self, total: int) -> tuple[slice, float]:
        """Part of a global batch that this process takes, and its weight."""
        part = self.world.part(total)
        count = part.stop - part.start
        return part if count else slice(0, 1), count / total


class _Steps:
    """The steps of an epoch by number."""

    def __init__(self, epoch: _Epoch, kept: Kept | None, start: int) -> None:
        self.epoch = epoch
        self.kept = kept
        self.start = start
        self.steps = steps_per_epoch(epoch.data, epoch.batch_size)
        generator = np.random.default_rng([epoch.seed % 2**64, epoch.epoch])
        self.order = generator.permutation(len(epoch.data))
        self.draws = epoch.draws(self.order)  # at once: for a batch at a time they would cost a step's tenth

    def __len__(self) -> int:
        return max(0, self.steps - self.start)

    def part(self, number: int) -> tuple[slice, float]:
        """Range of this process's samples of a step in the order, and their weight."""
        step = self.start + number
        first = step * self.epoch.batch_size
        stop = len(self.order) if step == self.steps - 1 else first + self.epoch.batch_size
        part, weight = self.epoch.part(stop - first)
        return slice(first + part.start, first + part.stop), weight

    def batch(self, number: int) -> samples.Batch:
        part, _ = self.part(number)
        indices, draws = self.order[part], self.draws[part]
        if self.kept is not None:
            batch = batch_of(self.epoch.data, self.kept, torch.from_numpy(indices))
        else:
            batch = self.epoch.together(indices)
        return self.epoch.augmented(batch, draws)


def _batches(steps: _Steps, workers: int) -> Iterator[Batch]:
    results = in_order(steps.batch, len(steps), workers, steps.epoch.data.name)
    for number, result in enumerate(results):
        part, weight = steps.part(number)
        yield Batch(*result, weight, torch.from_numpy(steps.order[part]), steps.epoch.variant)


def _streamed(epoch: _Epoch) -> Iterator[Batch]:
    first, data = 0, epoch.data
    for inputs, targets in _joined(uncollated(data).batches(epoch.batch_size), epoch.batch_size):
        part, weight = epoch.part(len(targets))
        indices = np.arange(first, first + len(targets), dtype=np.int64)[part]
        own = data.collated(targets[part], indices.tolist()) if data.gives_targets else unread(len(indices))
        augmented = epoch.augmented((select(inputs, part), own), epoch.draws(indices))
        yield Batch(*augmented, weight, torch.from_numpy(indices), epoch.variant)
        first += len(targets)


def _joined(batches: Iterator[samples.Batch], batch_size: int) -> Iterator[tuple[Inputs, list[Any]]]:
    """Batches, where a single sample left over joins the last full one."""
    pending: tuple[Inputs, list[Any]] | None = None
    for inputs, targets in batches:
        if pending is not None and len(targets) == 1 < batch_size:
            pending = concatenate([pending[0], inputs]), [*pending[1], *targets]
            continue
        if pending is not None:
            yield pending
        pending = inputs, list(targets)
    if pending is not None:
        yield pending
