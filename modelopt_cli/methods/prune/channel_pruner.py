"""Channels that really go: which groups may lose units, how many each, and which ones."""

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
from modelopt_cli.methods.prune.pruner import Pruner, nothing_to_prune, shares, weighted_layers
from modelopt_cli.methods.prune.removal_order import Rungs, Step, after, finer, path
from modelopt_cli.methods.prune.sensitivity import STEEP, Variant, curves, measure
from modelopt_cli.methods.prune.targets import TOLERANCE, Found, search_path
from modelopt_cli.program import Program
from modelopt_cli.program.attention import split_names
from modelopt_cli.program.channels import Dependencies, Group, Member, analyse, prepare, remove

Counts = Mapping[str, int]
LAST = 8
"""Groups that may end up rounded more finely than asked for."""


def makers(group: Group) -> list[Member]:
    """The weights that make a group's channels."""
    return [member for member in group.members if member.role == "out"]


def producers(group: Group) -> tuple[str, ...]:
    """The layers that make a group's channels."""
    return tuple(dict.fromkeys(member.parameter.rpartition(".")[0] for member in makers(group)))


def width(group: Group) -> int:
    """Channels that go with a unit."""
    return max(1, len(makers(group)[0].positions) // group.units)


@dataclass(frozen=True)
class Cut:
    """What is known of a Program before its channels go.

    Attributes:
        program: attention is taken apart in it.
        dependencies: of it.
        groups: those that may lose units.
        rungs: the numbers of units each may keep, and their scores.
        shapes: of the first weight that makes each group's channels, for allocations that ask for it.
    """

    program: Program
    dependencies: Dependencies
    groups: Sequence[Group]
    rungs: Mapping[str, Rungs]
    shapes: Mapping[str, tuple[int, ...]]


class ChannelPruner(Pruner):
    """Structure ``channels``. Attention is taken apart first, so that its heads can go."""

    @staticmethod
    def prepared(program: Program) -> Program:
        """With attention taken apart; zeros promised in its weights are promised in the new ones."""
        apart = prepare(program)
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
        chosen = []
        for group in dependencies.groups:
            bound = [layer for layer in producers(group) if layer in left_out]
            for layer in producers(group):
                if bound and layer not in left_out:
                    self.reasons[layer] = f"coupled with {bound[0]}: {left_out[bound[0]]}"
            why = unit_obstacle(dependencies.program, group, self.config.chosen_criterion)
            if why is not None:
                self.reasons |= dict.fromkeys(producers(group), why)
            elif not bound:
                chosen.append(group.name)
        if not chosen:
            raise nothing_to_prune(left_out | self.reasons)
        return tuple(chosen)

    def prune(self, program: Program, left: float, final: bool) -> Program:
        """Remove the units of the lowest scores, so many from each group as the allocation says."""
        cut = self._cut(program)
        needed = self.config.allocation_row.needs_curves
        known = curves(measure(self, program, STEEP)) if needed else None
        share = partial(self._shares, cut, known)
        for level in (self.config.round_to, *finer(self.config.round_to)):
            steps = path(cut.rungs, share, level)
            found = self._search(cut, partial(self._plan, cut, steps), len(steps), left)
            if found.left <= left + TOLERANCE or not final:
                break
        counts = self._plan(cut, steps, found.place)
        if final and abs(found.left - left) > TOLERANCE:
            before = self._plan(cut, steps, found.above)
            finer_plan, miss = self._refine(cut, before, steps[found.above :], left)
            counts = finer_plan if miss < abs(found.left - left) else counts
        return self.removed(cut, counts)

    def _eligible(self, program: Program) -> tuple[Dependencies, list[Group]]:
        names = set(self.groups)
        dependencies = self._analysed(program)
        return dependencies, [group for group in dependencies.groups if group.name in names]

    def _analysed(self, program: Program) -> Dependencies:
        """The analysis takes seconds; the Programs that are asked about again are the last few."""
        for known, dependencies in self._known:
            if known is program:
                return dependencies
        self._known.append((program, analyse(program)))
        return self._known[-1][1]

    @cached_property
    def _known(self) -> deque[tuple[Program, Dependencies]]:
        return deque(maxlen=3)

    @cached_property
    def _units(self) -> dict[str, int]:
        """Units of the original in every group that may lose some."""
        return {group.name: group.units for group in self._eligible(self.original)[1]}

    @cached_property
    def _measures(self) -> tuple[tuple[str, int], ...]:
        """Where the channels of the original can be counted: a weight and a dimension for each group."""
        firsts = [makers(group)[0] for group in self._eligible(self.original)[1]]
        return tuple(dict.fromkeys((first.parameter, first.dim) for first in firsts))

    @cached_property
    def _channels(self) -> int:
        """Channels of the original in all groups that may lose some."""
        return sum(group.units * width(group) for group in self._eligible(self.original)[1])

    def _gone(self, program: Program) -> int:
        """Channels that a Program has lost. Groups of one unit are groups no more, so shapes have to tell."""
        before, after = self.original.state_dict(), program.state_dict()
        return sum(int(before[name].shape[dim]) - int(after[name].shape[dim]) for name, dim in self._measures)

    def removed(self, cut: Cut, counts: Counts) -> Program:
        """The Program with the best units of every group kept."""
        keep = {
            name: cut.rungs[name].best(count)
            for name, count in counts.items()
            if count < cut.rungs[name].units
        }
        result = remove(cut.program, keep, dependencies=cut.dependencies)
        there = result.state_dict().keys()
        result.encodings = compact(result, pruned_names(cut.program.encodings) & there)
        return result

    def _cut(self, program: Program) -> Cut:
        """Everything that is known of a Program before its channels go."""
        dependencies, groups = self._eligible(program)
        criterion, samples = self.config.chosen_criterion, self.config.calibration_samples
        row, apart = self.config.criterion_row, dependencies.program
        weights = [m.parameter for group in groups for m in ranked_members(apart, group, row)]
        statistics = collect(program, criterion, weights, self.context, samples=samples)
        scores = unit_scores(apart, groups, criterion, statistics, seed=self.context.seed)
        groups = [group for group in groups if group.name in scores]
        rungs = {g.name: Rungs(g.units, width(g), g.step, scores[g.name]) for g in groups}
        state = program.state_dict()
        shapes = {group.name: tuple(state[makers(group)[0].parameter].shape) for group in groups}
        return Cut(program, dependencies, groups, rungs, shapes)

    def _shares(self, cut: Cut, known: Mapping[str, Curve] | None, ratio: float) -> dict[str, float]:
        scores = {name: group.scores for name, group in cut.rungs.items()}
        name = self.config.chosen_allocation
        return allocate(name, scores, cut.shapes, ratio, curves=known, least_kept=0)

    def variants(self, program: Program, sparsities: Sequence[float]) -> Iterator[Variant]:
        """The Program with one group pruned at a time, to the nearest number of units."""
        cut = self._cut(program)
        for group in cut.groups:
            for sparsity in sparsities:
                count = max(1, round(group.units * (1 - sparsity) / group.step)) * group.step
                if count < group.units:
                    make = partial(self.removed, cut, {group.name: count})
                    yield Variant(group.name, producers(group), 1 - count / group.units, make)

    def _plan(self, cut: Cut, steps: Sequence[Step], taken: int) -> Counts:
        return after(cut.rungs, steps[:taken])

    def _search(self, cut: Cut, plan: Callable[[int], Counts], last: int, left: float) -> Found:
        close = self.config.target_row.close
        return search_path(lambda place: self._left_after(cut, plan(place)), last, left, close)

    def _left_after(self, cut: Cut, counts: Counts) -> float:
        if self.config.target_row.of_units:
            groups = cut.rungs
            planned = sum((groups[name].units - kept) * groups[name].width for name, kept in counts.items())
            return 1 - (self._gone(cut.program) + planned) / self._channels
        return self.left(self.removed(cut, counts))

    def _refine(self, cut: Cut, counts: Counts, steps: Sequence[Step], left: float) -> tuple[Counts, float]:
        """Go on from a plan that leaves too much, without the step that would lead too far.

        Of the groups whose turn is next each loses as much as does not lead too far, and at most what its
        next step would take: first in the numbers of channels that were asked for, then in finer ones.

        Returns:
            The nearest plan and how far it is from the target.
        """
        fewest = {step.group: step.kept for step in reversed(steps)}
        best, miss = counts, math.inf
        for level in (self.config.round_to, *finer(self.config.round_to)):
            for name in list(dict.fromkeys(step.group for step in steps))[:LAST]:
                granule = cut.rungs[name].granule(level)
                numbers = (n for n in range(counts[name] - 1, fewest[name] - 1, -1) if n % granule == 0)
                plans: list[Counts] = [counts, *({**counts, name: number} for number in numbers)]
                found = self._search(cut, plans.__getitem__, len(plans) - 1, left)
                if abs(found.left - left) < miss:
                    best, miss = plans[found.place], abs(found.left - left)
                if miss <= TOLERANCE:
                    return best, miss
                counts = plans[found.above]
        return best, miss

    def units_left(self, program: Program) -> float:
        """The fraction of the channels of the groups that may lose some."""
        return 1 - self._gone(program) / self._channels

    def describe(self, program: Program) -> dict[str, object]:
        """Of every layer that became smaller, the fraction of its weights that is left."""
        found = shares(weighted_layers(self.original), weighted_layers(program))
        return {"left": {name: share for name, share in found.items() if share < 1}}

    def skipped(self, program: Program) -> dict[str, str]:
        """Layers of which neither an output nor an input went."""
        found = shares(weighted_layers(self.original), weighted_layers(program))
        why = f"allocation {self.config.chosen_allocation} takes nothing from it"
        return {name: self.reasons.get(name, why) for name, share in found.items() if share == 1}

    def closing_notes(self, program: Program) -> list[str]:
        """Where the rounding had to give way."""
        uneven = []
        for group in self._eligible(program)[1]:
            granule = Rungs(group.units, width(group), group.step, torch.empty(0)).granule(
                self.config.round_to
            )
            if group.units % granule and group.units != self._units[group.name]:
                uneven.append(group.name)
        if not uneven:
            return []
        return [
            f"not a multiple of {self.config.round_to} channels, for the target's sake: {', '.join(uneven)}"
        ]
