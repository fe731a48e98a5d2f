"""Loading of samples from a source, and batches of them."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image

from modelopt_cli.data.preprocess import ImageTransform
from modelopt_cli.data.raw_inputs import RawInputs, arranged, check_input
from modelopt_cli.data.source import Source, Stream
from modelopt_cli.data.targets import CLASS_TARGETS, RawTarget, TargetFormat, Targets, UnlikeOthers, unread
from modelopt_cli.data.workers import in_order
from modelopt_cli.errors import DataError
from modelopt_cli.program.input_batch import Inputs, make_inputs, stack, tensors_of
from modelopt_cli.program.input_spec import InputSpec
from modelopt_cli.settings import option

Batch = tuple[Inputs, Targets]
Sample = tuple[Inputs, Any]
Around = Callable[[int], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True, eq=False)
class Batches:
    """Samples of a source, loaded, checked and put together.

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
    def size(self) -> int | None:
        """Number of samples, or None for an iterable-style dataset."""
        if self.indices is not None:
            return len(self.indices)
        return len(self.source) if isinstance(self.source, Source) else None

    def __len__(self) -> int:
        size = self.size
        if size is None:
            raise TypeError(f"{self.name} is iterable-style and has no length; see Data.size")
        return size

    def where(self, index: int) -> str:
        """Name of the sample at ``index`` for an error."""
        return self.source.where(self._place(index))

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
        return self.together(range(start, min(start + batch_size, count)))

    def _stream(self, batch_size: int, limit: int | None) -> Iterator[Batch]:
        assert isinstance(self.source, Stream)
        ends = [n for n in (limit, self.first) if n is not None]
        own = self.source.collates
        samples = itertools.islice(
            self.source.items() if own else self._checked(self.source), min(ends, default=None)
        )
        first = 0
        while batch := list(itertools.islice(samples, batch_size)):
            places = range(first, first + len(batch))
            yield self.collate(self._collated(batch, places) if own else batch, places)
            first += len(batch)
        if not first:
            raise DataError("yields no samples", where=self.name)

    def together(self, indices: Sequence[int], around: Around = contextlib.nullcontext) -> Batch:
        """The batch of the samples at these indices.

        Args:
            indices: at least one.
            around: makes the context in which what has this index is loaded.

        Raises:
            DataError: as :meth:`batches`.
        """
        own, loaded = self.source.collates, []
        for index in indices:
            with around(index):
                loaded.append(self._source.item(self._place(index)) if own else self.get(index))
        if own:
            with around(indices[0]):
                loaded = self._collated(loaded, [self._place(index) for index in indices])
        return self.collate(loaded, indices)

    def _collated(self, items: list[Any], places: Sequence[int]) -> list[Sample]:
        """Samples of items that the user's own function puts together."""
        samples = []
        for place, sample in zip(places, self.source.together(items), strict=True):
            with self._naming(place):
                samples.append(self._check(*sample))
        return samples

    def collate(self, samples: Sequence[Sample], indices: Sequence[int]) -> Batch:
        """A batch of samples that were checked, and that have these indices.

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
        return stack(inputs), self.collated(targets, indices) if self.gives_targets else unread(len(inputs))

    def collated(self, targets: Sequence[Any], indices: Sequence[int]) -> Targets:
        """The targets of a batch, of samples that were checked and have these indices.

        Raises:
            DataError: one does not go with the others; it is named.
        """
        try:
            return self.targets.collate(targets)
        except UnlikeOthers as error:
            error.where = error.where or self.where(indices[error.place])
            raise

    @property
    def gives_targets(self) -> bool:
        """True if the samples have targets and they are read."""
        return self.labelled and self.reads_labels

    def get(self, index: int) -> Sample:
        """The sample at ``index`` of a source, preprocessed and checked."""
        place = self._place(index)
        with self._naming(place):
            raw, target = self._source.load(place)
            if isinstance(raw, Image.Image):
                assert self.transform is not None
                raw, target = self.transform.pair(raw, self._placed(target, raw))
            return self._check(raw, target)

    @property
    def _source(self) -> Source:
        assert isinstance(self.source, Source)
        return self.source

    def _place(self, index: int) -> int:
        """Place in the source of the sample at ``index``."""
        return index if self.indices is None else self.indices[index]

    def _placed(self, target: RawTarget, picture: Image.Image) -> Any:
        """The part of a target that lies in the picture, where targets are read."""
        if not self.gives_targets or target is None or isinstance(target, DataError):
            return target
        return self.targets.place(self.targets.named(target), picture)

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
        ready, tokenized = self.transform is None, self.source.tokenized
        checked = {s.name: check_input(x, s, ready=ready, tokenized=tokenized) for s, x in parts}
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
        return self.targets.check(self.targets.named(raw), inputs, self.classes)
