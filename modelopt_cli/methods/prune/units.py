"""Scores of channels: what each unit of a coupled group is worth, all that goes with it considered.

A unit appears in many tensors: as rows of the layers that make it, as elements of norms, as columns of
the layers that read it. What each criterion looks at, and how the parts become one number:

- ``l1``, ``l2``: the weights that make and that read the unit, and the norms' weights. Layers differ in
  the size of their weights for reasons that say nothing of importance (fan-in, a batch norm behind them
  that undoes any scale), so each tensor's scores are divided by their mean over the group's units; the
  result is the average over the tensors. Scores of different groups are comparable for the same reason.
- ``wanda``: the same over the weights whose inputs were watched.
- ``taylor``: the sum over the parameters that make the unit and normalise it. All are changes of one
  loss, so nothing is normalised. What reads the unit would count the same change a second time.
- ``bn-scale``: the mean of the absolute weights of the group's batch norms.
- ``fpgm``: in each layer that makes units, the sum of distances to the other filters, divided by its mean.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from modelopt_cli.errors import UsageError
from modelopt_cli.methods.matrices import unseen_inputs
from modelopt_cli.methods.prune.criteria import CRITERIA, random_scores
from modelopt_cli.methods.prune.statistics import Statistics
from modelopt_cli.program import Program
from modelopt_cli.program.channels import Dependencies, Group, Member

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def unit_scores(
    program: Program,
    dependencies: Dependencies,
    criterion: str,
    statistics: Statistics,
    *,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The importance of every unit of every group.

    Args:
        program: the network; its values are read from ``dependencies.program``.
        dependencies: of the network.
        criterion: a key of ``CRITERIA`` that ranks channels.
        statistics: what ``collect`` found for this criterion; an empty one if it needs nothing.
        seed: of the criterion ``random``.

    Returns:
        By group name float64 scores ``(units,)``; larger means more important. Groups in which the
        criterion finds nothing to look at (``unit_obstacle``) are left out.

    Raises:
        UsageError: the criterion cannot rank channels.
    """
    if "channels" not in CRITERIA[criterion].families:
        able = ", ".join(name for name, row in CRITERIA.items() if "channels" in row.families)
        raise UsageError(f"criterion {criterion} cannot rank channels", hint=f"one of {able}")
    if criterion == "random":
        return {g.name: random_scores(g.name, g.units, seed).double() for g in dependencies.groups}
    scorer = _Scorer(dependencies.program, statistics)
    return {
        group.name: scorer.scores(group, criterion)
        for group in dependencies.groups
        if scorer.members(group, criterion)
    }


def unit_obstacle(program: Program, group: Group, criterion: str) -> str | None:
    """Why a criterion cannot rank a group's units; None where it can.

    Args:
        program: the one the group's names refer to.
        group: of its dependencies.
        criterion: one that ranks channels.
    """
    if criterion == "wanda":
        watched = [m.parameter for m in group.members if m.role in ("out", "in")]
        if all(unseen_inputs(program, name) for name in watched):
            return "no weights whose inputs can be watched"
        return None
    if criterion == "random" or _Scorer(program, Statistics()).members(group, criterion):
        return None
    return "no batch norm with weights" if criterion == "bn-scale" else "no weights"


class _Scorer:
    def __init__(self, program: Program, statistics: Statistics) -> None:
        self.program = program
        self.statistics = statistics
        self.parameters = {name: p.detach() for name, p in program.named_parameters(remove_duplicate=False)}

    def members(self, group: Group, criterion: str) -> list[Member]:
        """The tensors of a group that a criterion looks at."""
        return [m for m in group.members if m.parameter in self.parameters and self._looks_at(m, criterion)]

    def _looks_at(self, member: Member, criterion: str) -> bool:
        match criterion:
            case "bn-scale":
                layer = self.program.get_submodule(member.parameter.rpartition(".")[0])
                return member.role == "norm" and isinstance(layer, _BATCH_NORMS)
            case "fpgm":
                return member.role == "out"
            case "taylor":
                return member.role in ("out", "bias", "norm", "tensor")
            case "wanda":
                return member.role in ("out", "in") and member.parameter in self.statistics.norms
            case _:
                return member.role in ("out", "in", "norm")

    def scores(self, group: Group, criterion: str) -> Tensor:
        """One number for each unit."""
        parts = torch.stack([self._part(m, group.units, criterion) for m in self.members(group, criterion)])
        if criterion == "taylor":
            return parts.nansum(0)
        if criterion != "bn-scale":
            mean = parts.nanmean(1, keepdim=True)
            parts = parts / torch.where(mean > 0, mean, 1.0)
        # A unit that no tensor knows costs nothing to remove.
        return parts.nanmean(0).nan_to_num(0.0)

    def _part(self, member: Member, units: int, criterion: str) -> Tensor:
        """What one tensor says of each unit; NaN for units that are not in it."""
        values = self.parameters[member.parameter].double()
        if criterion == "fpgm":
            return _distances(values.movedim(member.dim, 0).flatten(1), member, units)
        elements = _ELEMENTS[criterion](values, member.parameter, self.statistics)
        lines = elements.movedim(member.dim, 0).reshape(values.shape[member.dim], -1).sum(1)
        sums = lines.new_zeros(units).index_add(0, member.units, lines[member.positions])
        return sums.masked_fill(torch.bincount(member.units, minlength=units) == 0, torch.nan)


_ELEMENTS: dict[str, Callable[[Tensor, str, Statistics], Tensor]] = {
    "l1": lambda values, name, statistics: values.abs(),
    "l2": lambda values, name, statistics: values.square(),
    "bn-scale": lambda values, name, statistics: values.abs(),
    "taylor": lambda values, name, statistics: statistics.taylor[name].double(),
    "wanda": lambda values, name, statistics: values.abs() * statistics.norms[name].double(),
}


def _distances(filters: Tensor, member: Member, units: int) -> Tensor:
    """For each unit the sum of its Euclidean distances to all units (He et al., eq. 4).

    The filter nearest to the geometric median, which the others can replace best, has the least.
    """
    present = member.units.unique()
    vectors = pad_sequence([filters[i] for i in member.index if len(i)], batch_first=True).flatten(1)
    sums = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist").sum(1)
    return sums.new_full((units,), torch.nan).index_copy(0, present, sums)
