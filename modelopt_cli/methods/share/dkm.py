"""Differentiable k-means: soft assignment by attention, and its gradient.

M. Cho, K. Alizadeh-Vahid, S. Adya and M. Rastegari, "DKM: Differentiable k-means clustering layer for
neural network compression", ICLR 2022. With points ``x (n, d)`` and a codebook ``c (k, d)``, the attention of
point i to centroid j is ``a_ij = softmax_j(-|x_i - c_j|^2 / tau)``. An iteration moves every centroid to the
mean of the points weighted by their attention; after the last one, point i becomes ``sum_j a_ij c_j``.

Autograd would keep ``n * k`` numbers for every iteration. Here only the codebooks are kept: attention is
computed again, for a part of the points at a time, where the gradient passes through it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**20
"""Attentions held at a time."""
_LEAST_MASS = 1e-6
"""Attention that a centroid must get from all points together to be moved by them."""


@dataclass(frozen=True, eq=False)
class SoftClusters:
    """Points that are softly assigned.

    Attributes:
        points: ``(n, d)``.
        codebooks: each ``(k, d)``: the one to start from, a constant, and one for each iteration.
        masses: the attention that the centroids of all codebooks but the last get from all points together,
            ``(k, 1)`` each.
        tau: temperature, in squared units of the points.
    """

    points: Tensor
    codebooks: tuple[Tensor, ...]
    masses: tuple[Tensor, ...]
    tau: float

    @classmethod
    def of(cls, points: Tensor, start: Tensor, tau: float, iterations: int) -> "SoftClusters":
        """Assign points softly, starting from a codebook."""
        clusters = cls(points, (start,), (), tau)
        for _ in range(iterations):
            sums, mass = clusters._moments()
            moved = torch.where(
                mass > _LEAST_MASS, sums / mass.clamp_min(_LEAST_MASS), clusters.codebooks[-1]
            )
            clusters = cls(points, (*clusters.codebooks, moved), (*clusters.masses, mass), tau)
        return clusters

    def values(self) -> Tensor:
        """The mixture of centroids that each point becomes: ``(n, d)``."""
        codebook = self.codebooks[-1]
        parts = [attention(part, codebook, self.tau).T @ codebook for part in self._parts(self.points)]
        return torch.cat(parts)

    def gradient(self, upstream: Tensor) -> Tensor:
        """The gradient for the points, given the one for their values; ``(n, d)`` both."""
        for_points, for_codebook = self._through_values(upstream)
        for i in reversed(range(len(self.masses))):
            more, for_codebook = self._through_means(i, for_codebook)
            for_points += more
        return for_points

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Sums of points ``(k, d)`` and of ones ``(k, 1)``, weighted by attention to the last codebook."""
        codebook = self.codebooks[-1]
        sums, mass = torch.zeros_like(codebook), codebook.new_zeros(len(codebook), 1)
        for part in self._parts(self.points):
            weight = attention(part, codebook, self.tau)
            sums += weight @ part
            mass += weight.sum(1, keepdim=True)
        return sums, mass

    def _through_values(self, upstream: Tensor) -> tuple[Tensor, Tensor]:
        codebook, parts = self.codebooks[-1], []
        for_codebook = torch.zeros_like(codebook)
        for part, above in zip(self._parts(self.points), self._parts(upstream), strict=True):
            weight = attention(part, codebook, self.tau)
            for_part, more = _through_attention(part, codebook, weight, codebook @ above.T, self.tau)
            parts.append(for_part)
            for_codebook += more + weight @ above
        return torch.cat(parts), for_codebook

    def _through_means(self, i: int, upstream: Tensor) -> tuple[Tensor, Tensor]:
        """Back through iteration ``i``, to the points and to the codebook it began with."""
        # A centroid is sums / mass, or stays where it is if its mass is too small.
        codebook, moved, mass = self.codebooks[i], self.codebooks[i + 1], self.masses[i]
        for_sums = torch.where(mass > _LEAST_MASS, upstream / mass.clamp_min(_LEAST_MASS), 0)
        for_mass = -(for_sums * moved).sum(1, keepdim=True)
        for_codebook, parts = torch.where(mass > _LEAST_MASS, 0, upstream), []
        for part in self._parts(self.points):
            weight = attention(part, codebook, self.tau)
            for_part, more = _through_attention(
                part, codebook, weight, for_sums @ part.T + for_mass, self.tau
            )
            parts.append(for_part + weight.T @ for_sums)
            for_codebook = for_codebook + more
        return torch.cat(parts), for_codebook

    def _parts(self, tensor: Tensor) -> Iterator[Tensor]:
        return iter(tensor.split(max(1, CHUNK_ELEMENTS // len(self.codebooks[0]))))


def attention(points: Tensor, codebook: Tensor, tau: float) -> Tensor:
    """``softmax_j(-|x_i - c_j|^2 / tau)``, ``(k, n)``: long rows are faster than short ones."""
    return torch.softmax(_nearness(points, codebook) / tau, 0)


def _nearness(points: Tensor, codebook: Tensor) -> Tensor:
    """``|x_i|^2 - |x_i - c_j|^2``: ``(k, n)``, largest for the nearest centroid."""
    return torch.addmm(-codebook.square().sum(1, keepdim=True), codebook, points.T, alpha=2)


def nearest(points: Tensor, codebook: Tensor) -> Tensor:
    """The index of the nearest centroid of each point, up to rounding: int64 ``(n,)``."""
    parts = points.split(max(1, CHUNK_ELEMENTS // len(codebook)))
    return torch.cat([_nearness(part, codebook).T.contiguous().argmax(1) for part in parts])


def spacing(codebook: Tensor) -> float:
    """The median over centroids of the squared distance to the nearest other one; 1 where there is none."""
    distances = torch.cdist(codebook.double(), codebook.double()).square()
    nearest_other = distances.masked_fill(distances == 0, torch.inf).amin(1)
    return float(nearest_other.median()) if nearest_other.isfinite().all() else 1.0


def _through_attention(
    points: Tensor, codebook: Tensor, weight: Tensor, upstream: Tensor, tau: float
) -> tuple[Tensor, Tensor]:
    """Back from attention ``weight``, given the gradient for it, to the points and the codebook."""
    slope = weight * (upstream - (weight * upstream).sum(0)) * (2 / tau)
    return slope.T @ codebook, slope @ points - slope.sum(1, keepdim=True) * codebook
