"""Effects of operations on labels: tying, mixing, freezing."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from modelopt_cli.program.channels.atoms import Atoms

NOT_A_CHANNEL = "is combined with a value that has no prunable channels"
BROADCAST = "is spread over other channels"


class Ties(Atoms):
    """Atoms, and why some of them have to stay.

    Label tensors have the shape of the value they describe. Dimensions along which nothing changes have
    stride 0, so that a feature map costs no more than its channels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.frozen: list[tuple[Tensor, str]] = []
        self.notes: list[tuple[Tensor, str]] = []

    def freeze(self, labels: Tensor, why: str) -> None:
        """Say that these atoms cannot be removed."""
        (small,) = compact(labels)
        atoms = small[small >= 0]
        if len(atoms):
            self.frozen.append((atoms.unique(), why))

    def varying(self, labels: Tensor) -> list[int]:
        """The dimensions along which the classes differ."""
        (small,) = compact(labels)
        roots = self.find(small)
        return [
            d for d in range(roots.dim()) if roots.numel() and bool((roots != roots.narrow(d, 0, 1)).any())
        ]

    def expanded(self, labels: Tensor) -> Tensor:
        """The labels, with stride 0 along every dimension in which the classes do not differ."""
        if all(stride == 0 or n < 2 for stride, n in zip(labels.stride(), labels.shape, strict=True)):
            return labels
        return self._flattened(labels, self.varying(labels))

    def _flattened(self, labels: Tensor, varying: Sequence[int]) -> Tensor:
        index = tuple(slice(None) if d in varying else slice(0, 1) for d in range(labels.dim()))
        return labels[index].expand(labels.shape)

    def same(self, a: Tensor, b: Tensor) -> None:
        """Tie labels position by position (broadcasting); an atom that meets ``NONE`` is frozen."""
        a, b = compact(*torch.broadcast_tensors(a, b))
        self.unite(a, b)
        lonely = (a < 0) != (b < 0)
        if bool(lonely.any()):
            self.freeze(torch.maximum(a, b)[lonely], NOT_A_CHANNEL)

    def mix(self, labels: Tensor, dims: Iterable[int], why: str = "") -> Tensor:
        """Tie all labels along these dimensions, as an operation that reads them all together does.

        Returns:
            The labels, now with stride 0 along ``dims``.
        """
        for d in sorted({d % labels.dim() for d in dims}):
            if labels.stride(d) == 0 or labels.shape[d] < 2:
                continue
            (small,) = compact(labels)
            merged = small.amax(d, keepdim=True)
            if why and d in self.varying(small):
                self.notes.append((small[small >= 0].unique(), why))
            self.same(small, merged)
            labels = merged.expand(labels.shape)
        return labels

    def line(self, labels: Tensor, dim: int) -> Tensor:
        """The labels along one dimension, ``(size,)``; those along all others are tied."""
        dim %= labels.dim()
        mixed = self.mix(labels, [d for d in range(labels.dim()) if d != dim])
        return mixed[tuple(slice(None) if d == dim else 0 for d in range(labels.dim()))]

    def product(self, labels: Tensor, never: Sequence[int] = ()) -> Tensor:
        """Tie labels so that what can be removed are slices along one dimension only.

        Args:
            labels: of any shape.
            never: dimensions along which single places are read; another one is taken if there is any.
        """
        varying = self.varying(labels)
        labels = self._flattened(labels, varying)
        if len(varying) < 2:
            return labels
        kept = max(varying, key=lambda d: (d not in never, labels.shape[d]))
        return self.mix(labels, [d for d in varying if d != kept], "its channels are reshaped into a grid")

    def combine(self, a: Tensor, b: Tensor) -> Tensor:
        """Labels of an elementwise function of two values, with broadcasting."""
        shape = torch.broadcast_shapes(a.shape, b.shape)
        wide = [self.expanded(t).expand(shape) for t in (a, b)]
        varying = [self.varying(t) for t in wide]
        spread = [
            [d for d in other if _own_size(mine, d, len(shape)) == 1 and shape[d] > 1]
            for mine, other in ((a, varying[1]), (b, varying[0]))
        ]
        for mine, over in zip(wide, spread, strict=True):
            if over:
                self.freeze(mine, BROADCAST)
        if all(spread):
            return nothing(shape)
        for over, other in zip(spread, reversed(wide), strict=True):
            if over:
                return other
        small_a, small_b = compact(*wide)
        if (varying[0] or bool((small_b >= 0).any())) and (varying[1] or bool((small_a >= 0).any())):
            self.same(small_a, small_b)
        return torch.where(small_a >= 0, small_a, small_b).expand(shape)


def _own_size(labels: Tensor, dim: int, rank: int) -> int:
    own = dim - (rank - labels.dim())
    return labels.shape[own] if own >= 0 else 1


def nothing(shape: Sequence[int]) -> Tensor:
    """Labels of a value without channels."""
    return torch.full((), Atoms.NONE).expand(tuple(shape))


def spread(line: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """Labels of this shape that vary along ``dim`` only."""
    dim %= len(shape)
    return line.view([len(line) if d == dim else 1 for d in range(len(shape))]).expand(tuple(shape))


def compact(*labels: Tensor) -> list[Tensor]:
    """The same labels with size 1 along the dimensions where all of them have stride 0."""
    rank = labels[0].dim()
    flat = [d for d in range(rank) if all(t.stride(d) == 0 or t.shape[d] == 1 for t in labels)]
    index = tuple(slice(0, 1) if d in flat else slice(None) for d in range(rank))
    return [t[index] for t in labels]
