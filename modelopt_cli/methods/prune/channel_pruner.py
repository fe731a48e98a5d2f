"""Removal of channels: which groups may lose units, how many each, and which ones."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from modelopt_cli.artifact.encodings import compact, pruned_names
from modelopt_cli.methods.layer_selection import select_layers
from modelopt_cli.methods.prune.allocation import Curve, allocate
from modelopt_cli.methods.prune.channel_scores import ranked_members, unit_obstacle, unit_scores
from modelopt_cli.methods.prune.criterion_statistics import collect
from modelopt_cli.methods.prune.pruner import (
    PrunedVariant,
    Pruner,
    kept_weights,
    nothing_to_prune,
    weighted_layers,
)
from modelopt_cli.methods.prune.removal_order import (
    GroupUnits,
    RemovalStep,
    counts_after,
    finer_roundings,
    removal_path,
)
from modelopt_cli.methods.prune.sensitivity import STEEP, curves, measure
from modelopt_cli.methods.prune.target_figures import TOLERANCE, SearchResult, search_path
from modelopt_cli.program import Program
from modelopt_cli.program.attention import split_names
from modelopt_cli.program.channels import Dependencies, Group, Member, analyse, layered, remove

Counts = Mapping[str, int]
LAST = 8
"""Number of groups that may end up rounded more finely than asked for."""


def makers(group: Group) -> list[Member]:
    """The weights whose outputs are a group's channels."""
    return [member for member in group.members if member.makes_channels]


def producers(group: Group) -> tuple[str, ...]:
    """The layers whose outputs are a group's channels."""
    return tuple(dict.fromkeys(member.parameter.rpartition(".")[0] for member in makers(group)))


def width(group: Group) -> int:
    """The number of channels in a unit."""
    first = makers(group)[0]
    return max(1, len(first.positions) // first.gates // group.units)


@dataclass(frozen=True)
class ChannelCut:
    """Analysis of a Program before its channels go.

    Attributes:
        program: attention is taken apart in it.
        dependencies: of it.
        groups: those that may lose units.
        units: their units and scores, by the group's name.
        shapes: of the first weight that makes each group's channels, for allocations that ask for it.
    """

    program: Program
    dependencies: Dependencies
    groups: Sequence[Group]
    units: Mapping[str, GroupUnits]
    shapes: Mapping[str, tuple[int, ...]]


class ChannelPruner(Pruner):
    """Pruner of channels, units of linear layers and attention heads, which are really removed."""

    @staticmethod
    def prepared(program: Program) -> Program:
        """The Program with attention taken apart, so that heads can go; zeros stay promised."""
        apart = layered(program)
        moved = split_names(program, apart)
        apart.encodings |= {
            new: program.encodings[old] for old, new in moved.items() if old in program.encodings
        }
        return apart

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """The groups that may lose units, by name; fills in ``reasons`` for everything else.

        Raises:
            NothingCompressed: there are none.
            UsageError: a glob matches no layer.
        """
        dependencies = self._analysed(self.original)
        able = {layer: group for group in dependencies.groups for layer in producers(group)}
        order = [name for name in weighted_layers(self.original) if name in able]
        self.reasons = dict(dependencies.frozen)
        if not order:
            raise nothing_to_prune(self.reasons)
        _, left_out = select_layers(order, self.config, weighted_layers(self.original))
        self.reasons |= left_out
        chosen = [group.name for group in dependencies.groups if self._may_go(dependencies, group, left_out)]
        if not chosen:
            raise nothing_to_prune(left_out | self.reasons)
        return tuple(chosen)

    def _may_go(self, dependencies: Dependencies, group: Group, left_out: Mapping[str, str]) -> bool:
        """True if a group's layers are all selected and the criterion can rank it; else notes the reasons."""
        bound = [layer for layer in producers(group) if layer in left_out]
        for layer in producers(group):
            if bound and layer not in left_out:
                self.reasons[layer] = f"coupled with {bound[0]}: {left_out[bound[0]]}"
        reason = unit_obstacle(dependencies.program, group, self.config.chosen_criterion)
        if reason is not None:
            self.reasons |= dict.fromkeys(producers(group), reason)
        return reason is None and not bound

    def prune(self, program: Program, kept: float, final: bool) -> Program:
        """Remove the units of the lowest scores, so many from each group as the allocation says."""
        cut = self._cut(program)
        needed = self.config.allocation_row.needs_curves
        allocate = partial(self._allocate, cut, curves(measure(self, program, STEEP)) if needed else None)
        # The coarsest rounding that comes near enough; only the last round has to reach its target.
        for multiple in (self.config.round_to, *finer_roundings(self.config.round_to)):
            steps = removal_path(cut.units, allocate, multiple)
            result = self._search(cut, partial(self._counts, cut, steps), len(steps), kept)
            if result.kept <= kept + TOLERANCE or not final:
                break
        counts = self._counts(cut, steps, result.place)
        if final and abs(result.kept - kept) > TOLERANCE:
            # The nearest step removes too much or too little: take only a part of the steps next to it.
            before = self._counts(cut, steps, result.above)
            refined, miss = self._refine(cut, before, steps[result.above :], kept)
            counts = refined if miss < abs(result.kept - kept) else counts
        return self.removed(cut, counts)

    def _eligible(self, program: Program) -> tuple[Dependencies, list[Group]]:
        names = set(self.groups)
        dependencies = self._analysed(program)
        return dependencies, [group for group in dependencies.groups if group.name in names]

    def _analysed(self, program: Program) -> Dependencies:
        """Dependencies of a Program, which take seconds; those of the last few Programs are kept."""
        for known, dependencies in self._known:
            if known is program:
                return dependencies
        self._known.append((program, analyse(program)))
        return self._known[-1][1]

    @cached_property
    def _known(self) -> deque[tuple[Program, Dependencies]]:
        return deque(maxlen=3)

    @cached_property
    def _original_units(self) -> dict[str, int]:
        """Units of the original in every group that may lose some."""
        return {group.name: group.units for group in self._eligible(self.original)[1]}

    @cached_property
    def _counted(self) -> tuple[tuple[str, int, int], ...]:
        """Places where channels are counted: of each group a weight, a dimension, and rows of a channel."""
        firsts = [makers(group)[0] for group in self._eligible(self.original)[1]]
        return tuple(dict.fromkeys((first.parameter, first.dim, first.gates) for first in firsts))

    @cached_property
    def _channels(self) -> int:
        """Channels of the original in all groups that may lose some."""
        return sum(group.units * width(group) for group in self._eligible(self.original)[1])

    def _removed_channels(self, program: Program) -> int:
        """The number of channels that a Program has lost, by shapes: groups of one unit are no groups."""
        before, after = self.original.state_dict(), program.state_dict()
        return sum(
            (int(before[name].shape[dim]) - int(after[name].shape[dim])) // gates
            for name, dim, gates in self._counted
        )

    def removed(self, cut: ChannelCut, counts: Counts) -> Program:
        """The Program with the best units of every group kept."""
        keep = {
            name: cut.units[name].best(count)
            for name, count in counts.items()
            if count < cut.units[name].units
        }
        result = remove(cut.program, keep, dependencies=cut.dependencies)
        names = result.state_dict().keys()
        result.encodings = compact(result, pruned_names(cut.program.encodings) & names)
        return result

    def _cut(self, program: Program) -> ChannelCut:
        dependencies, groups = self._eligible(program)
        criterion, samples = self.config.chosen_criterion, self.config.calibration_samples
        row, apart = self.config.criterion_row, dependencies.program
        weights = [m.parameter for group in groups for m in ranked_members(apart, group, row)]
        statistics = collect(program, criterion, weights, self.context, samples=samples)
        scores = unit_scores(apart, groups, criterion, statistics, seed=self.context.seed)
        groups = [group for group in groups if group.name in scores]
        units = {g.name: GroupUnits(g.units, width(g), g.step, scores[g.name]) for g in groups}
        state = program.state_dict()
        shapes = {group.name: tuple(state[makers(group)[0].parameter].shape) for group in groups}
        return ChannelCut(program, dependencies, groups, units, shapes)

    def _allocate(self, cut: ChannelCut, known: Mapping[str, Curve] | None, ratio: float) -> dict[str, float]:
        scores = {name: group.scores for name, group in cut.units.items()}
        name = self.config.chosen_allocation
        return allocate(name, scores, cut.shapes, ratio, curves=known, least_kept=0)

    def variants(self, program: Program, sparsities: Sequence[float]) -> Iterator[PrunedVariant]:
        """The Program with one group pruned at a time, to the nearest number of units."""
        cut = self._cut(program)
        for group in cut.groups:
            for sparsity in sparsities:
                count = max(1, round(group.units * (1 - sparsity) / group.step)) * group.step
                if count < group.units:
                    make = partial(self.removed, cut, {group.name: count})
                    yield PrunedVariant(group.name, producers(group), 1 - count / group.units, make)

    def _counts(self, cut: ChannelCut, steps: Sequence[RemovalStep], taken: int) -> Counts:
        return counts_after(cut.units, steps[:taken])

    def _search(self, cut: ChannelCut, plan: Callable[[int], Counts], last: int, kept: float) -> SearchResult:
        close = self.config.target_row.close
        return search_path(lambda place: self._kept_after(cut, plan(place)), last, kept, close)

    def _kept_after(self, cut: ChannelCut, counts: Counts) -> float:
        if self.config.target_row.of_units:
            units = cut.units
            planned = sum((units[name].units - count) * units[name].width for name, count in counts.items())
            return 1 - (self._removed_channels(cut.program) + planned) / self._channels
        return self.kept_fraction(self.removed(cut, counts))

    def _refine(
        self, cut: ChannelCut, counts: Counts, steps: Sequence[RemovalStep], kept: float
    ) -> tuple[Counts, float]:
        """Go on from a plan that keeps too much, without the step that would lead too far.

        Of the groups whose turn is next each loses as much as does not lead too far, and at most what its
        next step would take: first in the numbers of channels that were asked for, then in finer ones.

        Returns:
            The nearest plan and its distance from the target.
        """
        fewest = {step.group: step.kept for step in reversed(steps)}
        best, miss = counts, math.inf
        for multiple in (self.config.round_to, *finer_roundings(self.config.round_to)):
            for name in list(dict.fromkeys(step.group for step in steps))[:LAST]:
                granule = cut.units[name].granule(multiple)
                numbers = (n for n in range(counts[name] - 1, fewest[name] - 1, -1) if n % granule == 0)
                plans: list[Counts] = [counts, *({**counts, name: number} for number in numbers)]
                result = self._search(cut, plans.__getitem__, len(plans) - 1, kept)
                if abs(result.kept - kept) < miss:
                    best, miss = plans[result.place], abs(result.kept - kept)
                if miss <= TOLERANCE:
                    return best, miss
                counts = plans[result.above]
        return best, miss

    def units_kept(self, program: Program) -> float:
        """The fraction of the channels that a Program keeps, of the groups that may lose some."""
        return 1 - self._removed_channels(program) / self._channels

    def describe(self, program: Program) -> dict[str, object]:
        """The fraction of its weights that every layer keeps which became smaller."""
        kept = kept_weights(self.original, program)
        return {"left": {name: fraction for name, fraction in kept.items() if fraction < 1}}

    def skipped(self, program: Program) -> dict[str, str]:
        """Layers that keep all outputs and inputs, each with the reason."""
        kept = kept_weights(self.original, program)
        reason = f"allocation {self.config.chosen_allocation} takes nothing from it"
        whole = [name for name in weighted_layers(self.original) if kept[name] == 1]
        return {name: self.reasons.get(name, reason) for name in whole}

    def closing_notes(self, program: Program) -> list[str]:
        """A note on groups whose rounding had to give way to the target."""
        round_to, uneven = self.config.round_to, []
        for group in self._eligible(program)[1]:
            units = GroupUnits(group.units, width(group), group.step, torch.empty(0))
            if group.units % units.granule(round_to) and group.units != self._original_units[group.name]:
                uneven.append(group.name)
        if not uneven:
            return []
        return [f"not a multiple of {round_to} channels, for the target's sake: {', '.join(uneven)}"]
