"""Layout of the logits of a sample in a cache: as many bytes for every sample."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modelopt_cli.errors import InputError
from modelopt_cli.tasks import TaskSpec
from modelopt_cli.tasks.task_output import form_of

_NARROW = 1 << 16
"""Classes that an unsigned 16-bit index tells apart."""


@dataclass(frozen=True)
class OutputForm:
    """Places of samples and classes in an output.

    Attributes:
        order: its dimensions: that of the samples, those of the places, that of the classes. Of outputs that
            are no logits the last one stands for the classes; one number for each sample has none.
        places: sizes of those in between: height and width of pixels, number of tokens.
        classes: number of logits at each place.
    """

    order: tuple[int, ...]
    places: tuple[int, ...]
    classes: int

    @classmethod
    def of(cls, output: Tensor, task: TaskSpec, samples: int) -> "OutputForm":
        """The form of an output for so many samples.

        Raises:
            InputError: it does not have something for each sample.
        """
        batch, where = task.batch_axis(output, samples), task.row.logits
        if output.dim() == 0 or output.shape[batch] != samples:
            raise InputError(f"returns {form_of(output)}, nothing for each sample", where="the teacher")
        places = [axis for axis in range(output.dim()) if axis != batch]
        if where is not None and where.axis in places:
            places.append(places.pop(places.index(where.axis)))
        sizes = [output.shape[axis] for axis in places]
        return cls((batch, *places), tuple(sizes[:-1]), sizes[-1] if sizes else 1)

    def rows(self, output: Tensor) -> Tensor:
        """An output as rows ``(N * places, classes)``."""
        return output.permute(self.order).reshape(-1, self.classes)

    def output(self, rows: Tensor, samples: int) -> Tensor:
        """The output that rows were made of."""
        sizes = (*self.places, self.classes) if len(self.order) > 1 else ()
        axes = sorted(range(len(self.order)), key=self.order.__getitem__)
        return rows.reshape(samples, *sizes).permute(axes)


@dataclass(frozen=True)
class Layout:
    """One entry for each sample in each variant, all of them alike, little-endian.

    With at most ``top`` classes an entry holds all logits, bit for bit. With more it holds the ``top``
    largest, their indices, and the logarithm of the sum of the exponentials of the others: that of what is
    left of softmax's mass, in the units of the logits. The others are read back all alike, as large as that
    sum makes them. So at temperature 1 the probabilities of the kept classes and the sum of the others' are
    right up to rounding, and the divergence of the logits read from those computed is at most ``m ln R``,
    with the mass ``m`` of the ``R`` others. At a temperature ``T`` above 1 the others weigh too much next to
    the kept ones, by a factor of at most ``R ** (1 - 1 / T)``. Losses that compare logits themselves find
    the others' mean too high, and no differences between them.

    Where an output has logits for each pixel or token all this holds for each of these.

    Attributes:
        samples: that there are.
        variants: augmented variants of each sample, at least 1.
        classes: number of logits.
        top: how many are kept.
        form: of the output; None of ``(N, classes)``.
    """

    samples: int
    variants: int
    classes: int
    top: int
    form: OutputForm | None = None

    @property
    def exact(self) -> bool:
        """True if logits come back as they were."""
        return self.classes <= self.top

    @property
    def entry(self) -> "np.dtype[np.void]":
        """Type of an entry; its checksum comes first."""
        places = math.prod(self._form.places)
        if self.exact:
            return np.dtype([("checksum", "<u4"), ("values", "<f4", (places, self.classes))])
        index = "<u2" if self.classes <= _NARROW else "<u4"
        return np.dtype(
            [
                ("checksum", "<u4"),
                ("others", "<f4", (places,)),
                ("values", "<f4", (places, self.top)),
                ("indices", index, (places, self.top)),
            ]
        )

    @property
    def _form(self) -> OutputForm:
        return self.form or OutputForm((0, 1), (), self.classes)

    @property
    def size(self) -> int:
        """Bytes of all entries together."""
        return self.samples * self.variants * self.entry.itemsize

    def pack(self, output: Tensor) -> NDArray[np.void]:
        """Entries ``(N,)`` without a checksum, from an output for ``N`` samples."""
        rows = self._form.rows(output.detach().float().cpu())
        entries = np.zeros(output.shape[self._form.order[0]], self.entry)
        if self.exact:
            _fill(entries["values"], rows)
            return entries
        values, indices = rows.topk(self.top, 1)
        remaining = rows.double().scatter(1, indices, -torch.inf).logsumexp(1)
        for name, part in (("others", remaining), ("values", values), ("indices", indices)):
            _fill(entries[name], part)
        return entries

    def unpack(self, entries: NDArray[np.void]) -> Tensor:
        """The output, float32."""
        return self._form.output(self._rows(entries), len(entries))

    def _rows(self, entries: NDArray[np.void]) -> Tensor:
        values = torch.from_numpy(entries["values"].astype(np.float32)).flatten(0, 1)
        if self.exact:
            return values
        each = entries["others"].astype(np.float64) - np.log(self.classes - self.top)
        rows = torch.from_numpy(each.astype(np.float32)).reshape(-1, 1).repeat(1, self.classes)
        indices = torch.from_numpy(entries["indices"].astype(np.int64)).flatten(0, 1)
        return rows.scatter_(1, indices, values)


def _fill(field: NDArray[Any], part: Tensor) -> None:
    field[...] = part.numpy().reshape(field.shape)
