"""Layout of the logits of a sample in a cache: as many bytes for every sample."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_NARROW = 1 << 16
"""Classes that an unsigned 16-bit index tells apart."""


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

    Attributes:
        samples: that there are.
        variants: augmented variants of each sample, at least 1.
        classes: number of logits.
        top: how many are kept.
    """

    samples: int
    variants: int
    classes: int
    top: int

    @property
    def exact(self) -> bool:
        """True if logits come back as they were."""
        return self.classes <= self.top

    @property
    def entry(self) -> "np.dtype[np.void]":
        """Type of an entry; its checksum comes first."""
        if self.exact:
            return np.dtype([("checksum", "<u4"), ("values", "<f4", (self.classes,))])
        index = "<u2" if self.classes <= _NARROW else "<u4"
        return np.dtype(
            [
                ("checksum", "<u4"),
                ("others", "<f4"),
                ("values", "<f4", (self.top,)),
                ("indices", index, (self.top,)),
            ]
        )

    @property
    def size(self) -> int:
        """Bytes of all entries together."""
        return self.samples * self.variants * self.entry.itemsize

    def pack(self, logits: Tensor) -> NDArray[np.void]:
        """Entries ``(N,)`` without a checksum, from logits ``(N, classes)``."""
        logits = logits.detach().float().cpu()
        entries = np.zeros(len(logits), self.entry)
        if self.exact:
            entries["values"] = logits.numpy()
            return entries
        values, indices = logits.topk(self.top, 1)
        remaining = logits.double().scatter(1, indices, -torch.inf).logsumexp(1)
        entries["others"], entries["values"], entries["indices"] = (
            each.numpy() for each in (remaining, values, indices)
        )
        return entries

    def unpack(self, entries: NDArray[np.void]) -> Tensor:
        """Logits, float32 ``(N, classes)``."""
        values = torch.from_numpy(entries["values"].astype(np.float32))
        if self.exact:
            return values
        each = entries["others"].astype(np.float64) - np.log(self.classes - self.top)
        logits = torch.from_numpy(each.astype(np.float32))[:, None].repeat(1, self.classes)
        return logits.scatter_(1, torch.from_numpy(entries["indices"].astype(np.int64)), values)
