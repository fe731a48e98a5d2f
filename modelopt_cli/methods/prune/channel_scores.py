"""Scores of coupled channels, from scores of the parameters that they appear in."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from modelopt_cli.methods.matrices import unseen_inputs
from modelopt_cli.methods.prune.criteria import CRITERIA, Criterion, ScoredParameter
from modelopt_cli.program import Program
from modelopt_cli.program.channels import Group, Member

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def unit_scores(
    program: Program,
    groups: Sequence[Group],
    criterion: str,
    statistics: Mapping[str, Tensor],
    *,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The importance of every unit of some groups.

    Args:
        program: the one that the groups refer to, with attention taken apart.
        groups: of its dependencies.
        criterion: a key of ``CRITERIA`` that ranks channels.
        statistics: result of ``collect`` for this criterion; empty if it needs nothing.
        seed: of random scores.

    Returns:
        By group name float64 scores ``(units,)``; larger means more important. Groups in which the
        criterion has no parameter to look at (``unit_obstacle``) are left out.
    """
    row = CRITERIA[criterion]
    if row.channel.of_group is not None:
        return {g.name: row.channel.of_group(g.name, g.units, seed).double() for g in groups}
    scores = {}
    for group in groups:
        if members := ranked_members(program, group, row):
            parts = [_part(program, m, group.units, row, statistics, seed) for m in members]
            scores[group.name] = _together(torch.stack(parts), row)
    return scores


def unit_obstacle(program: Program, group: Group, criterion: str) -> str | None:
    """The reason why a criterion cannot rank a group's units; None where it can.

    Args:
        program: the one that the group's names refer to.
        group: of its dependencies.
        criterion: one that ranks channels.
    """
    row = CRITERIA[criterion]
    able = row.channel.of_group is not None or ranked_members(program, group, row)
    return None if able else row.channel.obstacle


def ranked_members(program: Program, group: Group, row: Criterion) -> list[Member]:
    """The parameters of a group that a criterion looks at."""
    known = dict(program.named_parameters(remove_duplicate=False))
    return [
        member
        for member in group.members
        if member.parameter in known and member.role in row.channel.roles and _fits(program, member, row)
    ]


def _fits(program: Program, member: Member, row: Criterion) -> bool:
    if row.channel.batch_norms:
        layer = program.get_submodule(member.parameter.rpartition(".")[0])
        return isinstance(layer, _BATCH_NORMS)
    return not row.watches_inputs or unseen_inputs(program, member.parameter) is None


def _together(parts: Tensor, row: Criterion) -> Tensor:
    """Scores ``(units,)`` from those of the parameters ``(parameters, units)``."""
    if row.additive:
        return parts.nansum(0)
    if row.channel.relative:
        mean = parts.nanmean(1, keepdim=True)
        parts = parts / torch.where(mean > 0, mean, 1.0)
    # A unit that no parameter knows costs nothing to remove.
    return parts.nanmean(0).nan_to_num(0.0)


def _part(
    program: Program, member: Member, units: int, row: Criterion, statistics: Mapping[str, Tensor], seed: int
) -> Tensor:
    """Scores of the units in one parameter ``(units,)``; NaN for units that are not in it."""
    values = program.get_parameter(member.parameter).detach().double()
    if row.channel.of_parameter is not None:
        return row.channel.of_parameter(values.movedim(member.dim, 0).flatten(1), member, units)
    score, statistic = row.channel.score or row.score, statistics.get(member.parameter)
    assert score is not None
    statistic = None if statistic is None else statistic.double()
    elements = score(ScoredParameter(member.parameter, values, statistic, seed))
    lines = elements.movedim(member.dim, 0).reshape(values.shape[member.dim], -1).sum(1)
    sums = lines.new_zeros(units).index_add(0, member.units, lines[member.positions])
    return sums.masked_fill(torch.bincount(member.units, minlength=units) == 0, torch.nan)
