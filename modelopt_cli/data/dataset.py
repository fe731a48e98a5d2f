"""Data: a source, its preprocessing, and the order in which its samples come."""

from dataclasses import dataclass, replace

import torch

from modelopt_cli.data.class_names import match_names
from modelopt_cli.data.sample_batches import Batches
from modelopt_cli.data.source import Stream
from modelopt_cli.data.targets import TargetFormat
from modelopt_cli.errors import DataError

_SPLIT_SEED = 20240301


@dataclass(frozen=True, eq=False)
class Data(Batches):
    """Labelled samples in a fixed order, ready for a network; see :class:`Batches` for its attributes."""

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
    def may_never_end(self) -> bool:
        """True if nothing says how many samples there are, and all of them are used."""
        return isinstance(self.source, Stream) and not self.source.sized and self.first is None

    def __bool__(self) -> bool:
        return True

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
