"""Data: a source, its preprocessing, and the order in which its samples come."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from PIL import Image

from modelopt_cli.data.class_names import match_names
from modelopt_cli.data.preprocess import ImageTransform
from modelopt_cli.data.raw_inputs import RawInputs, arranged, check_input
from modelopt_cli.data.source import Source, Stream
from modelopt_cli.data.targets import CLASS_TARGETS, RawTarget, TargetFormat, Targets, unread
from modelopt_cli.data.workers import in_order
from modelopt_cli.errors import DataError
from modelopt_cli.program.input_batch import Inputs, make_inputs, stack, tensors_of
from modelopt_cli.program.input_spec import InputSpec
from modelopt_cli.settings import option

Batch = tuple[Inputs, Targets]
Sample = tuple[Inputs, Any]
_SPLIT_SEED = 20240301


@dataclass(frozen=True, eq=False)
class Data:
    """Labelled samples in a fixed order, ready for a network.

    Attributes:
        source: where they come from.
        input: the shape of a sample and the preprocessing in force.
        transform: image to tensor, or None where the source gives tensors.
        indices: the samples of the source that are used, or None for all.
        classes: labels from here on are refused, or None.
        first: use only so many samples of a stream, or None.
        reads_labels: targets are checked and handed on; otherwise they are all -1, whatever the source has.
        targets: the form that a task takes them in.
        names: the network's classes, to which the labels were mapped by name, or None.
        mapping: the label of each of the source's classes, or None for its own.
        matched: a line on how the names were matched, or None.
    """

    source: Source | Stream
    input: InputSpec
    transform: ImageTransform | None = None
    indices: Sequence[int] | None = None
    classes: int | None = None
    first: int | None = None
    reads_labels: bool = True
    targets: TargetFormat = CLASS_TARGETS
    names: tuple[str, ...] | None = None
    mapping: tuple[int, ...] | None = None
    matched: str | None = None

    @property
    def name(self) -> str:
        """The spec it was opened from."""
        return self.source.name

    @property
    def labelled(self) -> bool:
        """True if there are targets; otherwise they are all -1."""
        return self.source.labelled or self.targets.of_inputs

    @property
    def notes(self) -> tuple[str, ...]:
        """One line for each thing the user should know."""
        return self.source.notes if self.matched is None else (*self.source.notes, self.matched)

    @property
    def num_classes(self) -> int | None:
        """Smallest number of classes that holds every label, or None if only a full pass could tell."""
        return self.source.num_classes if self.names is None else len(self.names)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names in label order, where the source has them."""
        return self.source.class_names if self.names is None else self.names

    @property
    def size(self) -> int | None:
        """Number of samples, or None for an iterable-style dataset."""
        if self.indices is not None:
            return len(self.indices)
        return len(self.source) if isinstance(self.source, Source) else None

    @property
    def may_never_end(self) -> bool:
        """True if nothing says how many samples there are, and all of them are used."""
        return isinstance(self.source, Stream) and not self.source.sized and self.first is None

    def __len__(self) -> int:
        size = self.size
        if size is None:
            raise TypeError(f"{self.name} is iterable-style and has no length; see Data.size")
        return size

    def __bool__(self) -> bool:
        return True

    def where(self, index: int) -> str:
        """Name of the sample at ``index`` for an error."""
        return self.source.where(index if self.indices is None else self.indices[index])

    def with_targets(self, targets: TargetFormat) -> "Data":
        """Return the data with targets read, in the form that a task takes them.

        Raises:
            DataError: the first sample's is of another form.
        """
        data = replace(self, targets=targets, reads_labels=True)
        next(data.batches(1))
        return data

    def with_labels(self, names: tuple[str, ...] | None = None) -> "Data":
        """Return the data with labels read, mapped to the network's classes if both have names.

        Args:
            names: of the network's classes, in logit order, or None.

        Raises:
            DataError: as :func:`class_names.match_names`.
        """
        if names is None or self.source.class_names is None or not self.labelled:
            return replace(self, reads_labels=True)
        match = match_names(self.source.class_names, names, self.name)
        mapping = match.positions if match.positions != tuple(range(len(names))) else None
        return replace(self, reads_labels=True, names=names, mapping=mapping, matched=match.note)

    def has_classes(self, names: tuple[str, ...] | None) -> bool:
        """True if each of the source's classes is among these by its name."""
        if names is None or self.source.class_names is None:
            return False
        try:
            return match_names(self.source.class_names, names, self.name).by_name
        except DataError:
            return False

    def fits(self, classes: int) -> "Data":
        """Return the data, with labels held below ``classes``.

        Raises:
            DataError: a label is known to be too large; others are found when their batch is read.
        """
        if self.labelled and self.num_classes is not None and self.num_classes > classes:
            raise DataError(
                f"has {self.num_classes} classes, but the network has {classes}",
                where=self.name,
                hint="give the data the network was trained for",
            )
        return replace(self, classes=classes)

    def sample(self, n: int, seed: int = 0) -> "Data":
        """Draw a random subset of ``n`` samples, none twice, in their old order; of a stream the first ``n``.

        The same ``n``, ``seed`` and data give the same subset. With fewer than ``n`` samples, all of them.
        """
        if n < 1:
            raise DataError(f"cannot take {n} samples", where=self.name, hint="take at least one")
        if self.size is None:
            return replace(self, first=n if self.first is None else min(n, self.first))
        pool = self.indices if self.indices is not None else range(self.size)
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        return replace(self, indices=tuple(pool[i] for i in sorted(order[:n].tolist())))

    def split(self, held: int) -> tuple["Data", "Data"]:
        """The rest, and so many samples held out at random; of data that has a length.

        Which samples those are depends on how many there are alone.
        """
        size = len(self)
        order = torch.randperm(size, generator=torch.Generator().manual_seed(_SPLIT_SEED)).tolist()
        pool = self.indices if self.indices is not None else range(size)
        val, train = (tuple(pool[i] for i in sorted(part)) for part in (order[:held], order[held:]))
        return replace(self, indices=train), replace(self, indices=val)

    def batches(self, batch_size: int, *, limit: int | None = None, workers: int = 0) -> Iterator[Batch]:
        """Batches in order; the last may be smaller.

        Args:
            batch_size: samples per batch.
            limit: stop after so many samples.
            workers: decoding processes; an iterable-style dataset is always read in this one.

        Yields:
            The network's inputs, a tensor ``(N, *input.shape)`` or several by name; and the targets, classes
            int64 ``(N,)`` where no task takes others. Samples whose size is free come together where they
            are of one size.

        Raises:
            DataError: a sample is unreadable, not finite, of another shape, or its label is out of range; or
                samples of different sizes would make one batch.
        """
        if batch_size < 1 or workers < 0 or (limit is not None and limit < 1):
            raise DataError("batch size and limit must be at least 1, workers at least 0", where=self.name)
        if isinstance(self.source, Stream):
            yield from self._stream(batch_size, limit)
            return
        count = min(len(self), limit or len(self))
        make = partial(self._batch, batch_size, count)
        yield from in_order(make, -(-count // batch_size), workers, self.name)

    def _batch(self, batch_size: int, count: int, number: int) -> Batch:
        start = number * batch_size
        return self.collate([self.get(i) for i in range(start, min(start + batch_size, count))])

    def _stream(self, batch_size: int, limit: int | None) -> Iterator[Batch]:
        assert isinstance(self.source, Stream)
        ends = [n for n in (limit, self.first) if n is not None]
        samples = itertools.islice(self._checked(self.source), min(ends, default=None))
        empty = True
        while batch := list(itertools.islice(samples, batch_size)):
            empty = False
            yield self.collate(batch)
        if empty:
            raise DataError("yields no samples", where=self.name)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """A batch of samples that were checked.

        Raises:
            DataError: they are of different sizes.
        """
        inputs, targets = zip(*samples, strict=True)
        if len({tuple(tensor.shape for tensor in tensors_of(each)) for each in inputs}) > 1:
            raise DataError(
                "samples of different sizes cannot make one batch",
                where=self.name,
                hint=f"use batches of 1, with {option('batch_size')} or {option('data_batch_size')}",
            )
        return stack(inputs), self.targets.collate(targets) if self.gives_targets else unread(len(inputs))

    @property
    def gives_targets(self) -> bool:
        """True if the samples have targets and they are read."""
        return self.labelled and self.reads_labels

    def get(self, index: int) -> Sample:
        """The sample at ``index`` of a source, preprocessed and checked."""
        assert isinstance(self.source, Source)
        if self.indices is not None:
            index = self.indices[index]
        with self._naming(index):
            raw, target = self.source.load(index)
            if isinstance(raw, Image.Image):
                assert self.transform is not None
                raw, target = self.transform.pair(raw, self._placed(target, raw))
            return self._check(raw, target)

    def _placed(self, target: RawTarget, picture: Image.Image) -> Any:
        """The part of a target that lies in the picture, where targets are read."""
        if not self.gives_targets or target is None or isinstance(target, DataError):
            return target
        return self.targets.place(target, picture)

    @contextlib.contextmanager
    def _naming(self, index: int) -> Iterator[None]:
        """Name the sample in errors that do not; its name may cost a look into a file."""
        try:
            yield
        except DataError as error:
            error.where = error.where or self.source.where(index)
            raise

    def _checked(self, stream: Stream) -> Iterator[Sample]:
        for index, (raw, target) in enumerate(stream):
            with self._naming(index):
                sample = self._check(raw, target)
            yield sample

    def _check(self, raw: RawInputs, target: RawTarget) -> Sample:
        """Return the sample if it is valid."""
        ordered = arranged(raw, self.input)
        parts = zip(self.input.tensors, tensors_of(ordered), strict=True)
        checked = {s.name: check_input(x, s, ready=self.transform is None) for s, x in parts}
        inputs = make_inputs(self.input, lambda each: checked[each.name])
        return inputs, self._target(target, inputs) if self.gives_targets else -1

    def _target(self, raw: RawTarget, inputs: Inputs) -> Any:
        """The target of a sample, in the form that the task takes; a class is mapped by name before."""
        if not self.source.labelled:
            raw = None
        if isinstance(raw, DataError):
            raise DataError(raw.message, where=raw.where, hint=raw.hint)
        if self.mapping is not None and isinstance(raw, int) and 0 <= raw < len(self.mapping):
            return self.mapping[raw]
        return self.targets.check(raw, inputs, self.classes)
