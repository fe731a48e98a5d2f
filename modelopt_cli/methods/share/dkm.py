"""Differentiable k-means: soft assignment by attention, and its gradient.

M. Cho, K. Alizadeh-Vahid, S. Adya and M. Rastegari, "DKM: Differentiable k-means clustering layer for
neural network compression", ICLR 2022. With points ``x (n, d)`` and a table ``c (k, d)``, the attention of
point i to entry j is ``a_ij = softmax_j(-|x_i - c_j|^2 / tau)``. An iteration moves every entry to the mean
of the points weighted by their attention; after the last one, point i becomes ``sum_j a_ij c_j``.

Autograd would keep ``n * k`` numbers for every iteration. Here only the tables are kept: attention is
computed again, for a part of the points at a time, where the gradient passes through it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**20
"""Attentions held at a time."""
_LEAST_MASS = 1e-6
"""Of the attention that an entry must get from all points together to be moved by them."""


@dataclass(frozen=True, eq=False)
class SoftClusters:
    """Points that are softly assigned.

    Attributes:
        points: ``(n, d)``.
        tables: each ``(k, d)``: the one to start from, a constant, and one for each iteration.
        masses: the attention that the entries of all tables but the last get from all points together,
            ``(k, 1)`` each.
        tau: temperature, in squared units of the points.
    """

    points: Tensor
    tables: tuple[Tensor, ...]
    masses: tuple[Tensor, ...]
    tau: float

    @classmethod
    def of(cls, points: Tensor, table: Tensor, tau: float, iterations: int) -> "SoftClusters":
        """Assign points, starting from a table."""
        found = cls(points, (table,), (), tau)
        for _ in range(iterations):
            sums, mass = found._moments()
            moved = torch.where(mass > _LEAST_MASS, sums / mass.clamp_min(_LEAST_MASS), found.tables[-1])
            found = cls(points, (*found.tables, moved), (*found.masses, mass), tau)
        return found

    def values(self) -> Tensor:
        """What the points become: ``(n, d)``."""
        table = self.tables[-1]
        return torch.cat([attention(part, table, self.tau).T @ table for part in self._parts(self.points)])

    def gradient(self, upstream: Tensor) -> Tensor:
        """The gradient for the points, given the one for their values; ``(n, d)`` both."""
        of_points, of_table = self._through_values(upstream)
        for i in reversed(range(len(self.masses))):
            more, of_table = self._through_means(i, of_table)
            of_points += more
        return of_points

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Sums of the points ``(k, d)`` and of ones ``(k, 1)``, weighted by attention to the last table."""
        table = self.tables[-1]
        sums, mass = torch.zeros_like(table), table.new_zeros(len(table), 1)
        for part in self._parts(self.points):
            weight = attention(part, table, self.tau)
            sums += weight @ part
            mass += weight.sum(1, keepdim=True)
        return sums, mass

    def _through_values(self, upstream: Tensor) -> tuple[Tensor, Tensor]:
        table, found = self.tables[-1], []
        of_table = torch.zeros_like(table)
        for part, given in zip(self._parts(self.points), self._parts(upstream), strict=True):
            weight = attention(part, table, self.tau)
            of_part, more = _through_attention(part, table, weight, table @ given.T, self.tau)
            found.append(of_part)
            of_table += more + weight @ given
        return torch.cat(found), of_table

    def _through_means(self, i: int, upstream: Tensor) -> tuple[Tensor, Tensor]:
        """Back through iteration ``i``, to the points and to the entries it began with."""
        table, moved, mass = self.tables[i], self.tables[i + 1], self.masses[i]
        of_sums = torch.where(mass > _LEAST_MASS, upstream / mass.clamp_min(_LEAST_MASS), 0)
        of_mass = -(of_sums * moved).sum(1, keepdim=True)
        of_table, found = torch.where(mass > _LEAST_MASS, 0, upstream), []
        for part in self._parts(self.points):
            weight = attention(part, table, self.tau)
            of_part, more = _through_attention(part, table, weight, of_sums @ part.T + of_mass, self.tau)
            found.append(of_part + weight.T @ of_sums)
            of_table = of_table + more
        return torch.cat(found), of_table

    def _parts(self, tensor: Tensor) -> Iterator[Tensor]:
        return iter(tensor.split(max(1, CHUNK_ELEMENTS // len(self.tables[0]))))


def attention(points: Tensor, table: Tensor, tau: float) -> Tensor:
    """``softmax_j(-|x_i - c_j|^2 / tau)``, ``(k, n)``: long rows are faster than short ones."""
    return torch.softmax(_nearness(points, table) / tau, 0)


def _nearness(points: Tensor, table: Tensor) -> Tensor:
    """``|x_i|^2 - |x_i - c_j|^2``: ``(k, n)``, largest for the nearest entry."""
    return torch.addmm(-table.square().sum(1, keepdim=True), table, points.T, alpha=2)


def nearest(points: Tensor, table: Tensor) -> Tensor:
    """The index of the nearest entry of each point, up to rounding: int64 ``(n,)``."""
    parts = points.split(max(1, CHUNK_ELEMENTS // len(table)))
    return torch.cat([_nearness(part, table).T.contiguous().argmax(1) for part in parts])


def spacing(table: Tensor) -> float:
    """The median over the entries of the squared distance to the nearest other one; 1 where there is none."""
    distances = torch.cdist(table.double(), table.double()).square()
    nearest_other = distances.masked_fill(distances == 0, torch.inf).amin(1)
    return float(nearest_other.median()) if nearest_other.isfinite().all() else 1.0


def _through_attention(
    points: Tensor, table: Tensor, weight: Tensor, upstream: Tensor, tau: float
) -> tuple[Tensor, Tensor]:
    """Back from attention ``weight``, given the gradient with respect to it, to the points and the table."""
    slope = weight * (upstream - (weight * upstream).sum(0)) * (2 / tau)
    return slope.T @ table, slope @ points - slope.sum(1, keepdim=True) * table
