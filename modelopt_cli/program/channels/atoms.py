"""Atoms: the integers that stand for channels, and which of them can only go together."""

import torch
from torch import Tensor


class Atoms:
    """A disjoint-set forest over integers, worked on whole tensors at a time.

    A label tensor holds an atom where a value depends on that one channel, and ``NONE`` where it holds
    something that is no channel. Atoms are asked for by key, so the same layer gets the same ones again.
    """

    NONE = -1

    def __init__(self) -> None:
        self._parent = torch.empty(0, dtype=torch.int64)
        self._first: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._parent)

    @property
    def classes(self) -> int:
        """Number of classes of atoms; it only shrinks while no atoms are added."""
        return int((self._parent == torch.arange(len(self))).sum())

    def fresh(self, key: str, count: int) -> Tensor:
        """The ``count`` atoms of this key, made when they are first asked for; shape ``(count,)``."""
        if key not in self._first:
            self._first[key] = len(self)
            new = torch.arange(len(self), len(self) + count)
            self._parent = torch.cat([self._parent, new])
        return torch.arange(self._first[key], self._first[key] + count)

    def find(self, labels: Tensor) -> Tensor:
        """The representative of each label's class; ``NONE`` stays."""
        if not len(self):
            return labels
        known = labels.clamp(min=0)
        root = self._parent[known]
        while True:
            above = self._parent[root]
            if torch.equal(above, root):
                break
            root = above
        self._parent[known] = root
        return torch.where(labels < 0, labels, root)

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Put ``a[i]`` and ``b[i]`` into one class, for all i at which both are atoms."""
        both = (a >= 0) & (b >= 0)
        a, b = self.find(a[both]), self.find(b[both])
        while True:
            differ = a != b
            if not bool(differ.any()):
                return
            low, high = torch.minimum(a, b)[differ], torch.maximum(a, b)[differ]
            self._parent.scatter_reduce_(0, high, low, "amin")
            a, b = self.find(low), self.find(high)
