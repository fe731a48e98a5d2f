"""Sources of samples, before preprocessing."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, TypeAlias

from PIL import Image

from modelopt_cli.data.raw_inputs import RawInputs
from modelopt_cli.data.targets import RawTarget

Raw: TypeAlias = Image.Image | RawInputs


class Source(ABC):
    """An indexed collection of ``(image or inputs, target)`` pairs in a fixed order; see ``data.targets``.

    Attributes:
        name: the spec it was opened from.
        num_classes: smallest number of classes that holds every label, or None if unknown.
        class_names: names in label order, where the source has them.
        channels: 1 or 3, what the images have by themselves.
        ready: samples are tensors that need no preprocessing.
        tokenized: integers in them are token ids that a tokenizer made of texts.
        labelled: there are targets.
        notes: one line for each thing the user should know, such as files that were left out.
        task: what its targets are for, as ``--task`` says it, where they tell; else None.
        collates: it has :meth:`item` and :meth:`together`, and puts the items of a batch together itself.
        other_shape: of the same samples, for a network that asks for it; None where they have one shape.
    """

    name: str
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    channels: int = 3
    ready: bool = False
    tokenized: bool = False
    labelled: bool = True
    notes: tuple[str, ...] = ()
    task: str | None = None
    collates: bool = False
    other_shape: tuple[int, ...] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load(self, index: int) -> tuple[Raw, RawTarget]:
        """The sample at ``index``: an 8-bit image, or tensors where ``ready``; and its raw target.

        Raises:
            DataError: the sample cannot be read; where that is left out, it is what :meth:`where` says.
        """

    def item(self, index: int) -> Any:
        """The sample at ``index`` as the user's code has it."""
        raise NotImplementedError

    def together(self, items: list[Any]) -> list[tuple[RawInputs, RawTarget]]:
        """The samples of a batch of items, each of the shape that it has in this batch."""
        raise NotImplementedError

    def where(self, index: int) -> str:
        """Name of the sample for an error."""
        return f"{self.name} sample {index}"


class Stream(ABC):
    """An iterable-style collection of ready tensors; every pass starts from the beginning.

    Attributes:
        sized: it says how long it is; otherwise only a pass over all of it can tell, if it ever ends.
        collates: it has :meth:`items` and :meth:`together`, and puts the items of a batch together itself.
        name, tokenized, num_classes, class_names, labelled, notes, other_shape: as of a :class:`Source`.
    """

    name: str
    sized: bool = False
    tokenized: bool = False
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    labelled: bool = True
    notes: tuple[str, ...] = ()
    task: str | None = None
    collates: bool = False
    other_shape: tuple[int, ...] | None = None

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[RawInputs, RawTarget]]: ...

    def items(self) -> Iterator[Any]:
        """The samples as the user's code has them."""
        raise NotImplementedError

    def together(self, items: list[Any]) -> list[tuple[RawInputs, RawTarget]]:
        """The samples of a batch of items, each of the shape that it has in this batch."""
        raise NotImplementedError

    def where(self, index: int) -> str:
        """Name of the sample for an error."""
        return f"{self.name} sample {index}"


def is_sized(dataset: Any) -> bool:
    """True if a dataset of the user's says how long it is."""
    try:
        len(dataset)
    except Exception:  # a class may have the method, and raise anything to say that it has no length
        return False
    return True


Samples: TypeAlias = str | Source | Stream
"""A data spec, or samples that are open already."""


def name_of(samples: Samples | None) -> str | None:
    """The spec, or what the samples are called."""
    return samples if samples is None or isinstance(samples, str) else samples.name
