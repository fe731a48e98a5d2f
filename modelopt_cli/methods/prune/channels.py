"""Channels that really go: which groups may lose units, how many each, and which ones."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial

from modelopt_cli.artifact.sparsity import compact
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.prune.allocation import Curve, allocate
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.methods.prune.criteria import CRITERIA
from modelopt_cli.methods.prune.family import Family, nothing, shares, weighted_layers
from modelopt_cli.methods.prune.ladder import Rungs, Step, after, finer, path
from modelopt_cli.methods.prune.sensitivity import STEEP, Variant, curves, measure
from modelopt_cli.methods.prune.statistics import collect
from modelopt_cli.methods.prune.targets import TOLERANCE, Figures, search_path
from modelopt_cli.methods.prune.units import unit_scores
from modelopt_cli.methods.select import select_layers
from modelopt_cli.program import Program
from modelopt_cli.program.channels import Dependencies, Group, Member, analyse, prepare, remove

Counts = Mapping[str, int]


def makers(group: Group) -> list[Member]:
    """The weights that make a group's channels."""
    return [member for member in group.members if member.role == "out"]


def producers(group: Group) -> tuple[str, ...]:
    """The layers that make a group's channels."""
    return tuple(dict.fromkeys(member.parameter.rpartition(".")[0] for member in makers(group)))


def width(group: Group) -> int:
    """Channels that go with a unit."""
    return max(1, len(makers(group)[0].positions) // group.units)


class Channels(Family):
    """Structure ``channels``. Attention is taken apart first, so that its heads can go."""

    def __init__(self, original: Program, config: PruneConfig, context: Context, figures: Figures) -> None:
        super().__init__(prepare(original), config, context, figures)

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """The groups that may lose units, by name; fills in ``reasons`` for everything else.

        Raises:
            NothingCompressed: there are none.
            UsageError: a glob matches no layer.
        """
        dependencies = analyse(self.original)
        able = {layer: group for group in dependencies.groups for layer in producers(group)}
        order = [name for name in weighted_layers(self.original) if name in able]
        self.reasons = dict(dependencies.frozen)
        if not order:
            raise nothing(self.reasons)
        _, left_out = select_layers(order, self.config)
        self.reasons |= left_out
        chosen = []
        for group in dependencies.groups:
            bound = [layer for layer in producers(group) if layer in left_out]
            for layer in producers(group):
                if bound and layer not in left_out:
                    self.reasons[layer] = f"coupled with {bound[0]}: {left_out[bound[0]]}"
            if not bound:
                chosen.append(group.name)
        if not chosen:
            raise nothing(self.reasons)
        return tuple(chosen)

    def prune(self, program: Program, left: float, final: bool) -> Program:
        """Remove the units of the lowest scores, so many from each group as the allocation says."""
        dependencies, groups = self._eligible(program)
        rungs = self._rungs(program, dependencies, groups)
        share = partial(self._shares, rungs, self._shapes(program, groups), self._curves(program))
        for level in (self.config.round_to, *finer(self.config.round_to)):
            steps = path(rungs, share, level)
            taken, reached = self._walk(program, rungs, steps, left)
            if reached <= left + TOLERANCE or not final:
                break
        if final and abs(reached - left) > TOLERANCE:
            return self.removed(program, rungs, self._refine(program, rungs, steps, (taken, reached), left))
        return self.removed(program, rungs, after(rungs, steps[:taken]))

    def _eligible(self, program: Program) -> tuple[Dependencies, list[Group]]:
        names = set(self.groups)
        dependencies = analyse(program)
        return dependencies, [group for group in dependencies.groups if group.name in names]

    @cached_property
    def _units(self) -> int:
        """Units of the original that may go."""
        return sum(group.units for group in self._eligible(self.original)[1])

    def removed(self, program: Program, rungs: Mapping[str, Rungs], counts: Counts) -> Program:
        """The Program with the best units of every group kept."""
        keep = {name: rungs[name].best(count) for name, count in counts.items() if count < rungs[name].units}
        result = remove(program, keep)
        result.encodings = compact(result)
        return result

    def _rungs(
        self, program: Program, dependencies: Dependencies, groups: Sequence[Group]
    ) -> dict[str, Rungs]:
        criterion = self.config.chosen_criterion
        statistics = collect(
            program,
            criterion,
            [member.parameter for group in groups for member in makers(group)],
            self.context,
            samples=self.config.calibration_samples,
        )
        scores = unit_scores(program, dependencies, criterion, statistics, seed=self.context.seed)
        return {
            group.name: Rungs(group.units, width(group), group.step, scores[group.name]) for group in groups
        }

    def _shares(
        self,
        rungs: Mapping[str, Rungs],
        shapes: Mapping[str, tuple[int, ...]],
        curves: Mapping[str, Curve] | None,
        ratio: float,
    ) -> dict[str, float]:
        return allocate(
            self.config.chosen_allocation,
            {name: group.scores for name, group in rungs.items()},
            shapes,
            ratio,
            costs={name: float(group.width) for name, group in rungs.items()},
            curves=curves,
            comparable=CRITERIA[self.config.chosen_criterion].comparable,
            least_kept=0,
        )

    def _shapes(self, program: Program, groups: Sequence[Group]) -> dict[str, tuple[int, ...]]:
        """Of each group the first weight that makes its channels, for allocations that ask for shapes."""
        state = program.state_dict()
        return {group.name: tuple(state[makers(group)[0].parameter].shape) for group in groups}

    def _curves(self, program: Program) -> dict[str, Curve] | None:
        if self.config.chosen_allocation != "sensitivity":
            return None
        return curves(measure(self, program, STEEP))

    def variants(self, program: Program, sparsities: Sequence[float]) -> Iterator[Variant]:
        """The Program with one group pruned at a time, to the nearest number of units."""
        dependencies, groups = self._eligible(program)
        rungs = self._rungs(program, dependencies, groups)
        for group in groups:
            units = rungs[group.name]
            for sparsity in sparsities:
                count = max(1, round(units.units * (1 - sparsity) / group.step)) * group.step
                if count < units.units:
                    make = partial(self.removed, program, rungs, {group.name: count})
                    yield Variant(group.name, producers(group), 1 - count / units.units, make)

    def _walk(
        self, program: Program, rungs: Mapping[str, Rungs], steps: Sequence[Step], left: float
    ) -> tuple[int, float]:
        """The number of steps to take, and what is left then."""
        return search_path(
            lambda taken: self._left_after(program, rungs, after(rungs, steps[:taken])), len(steps), left
        )

    def _left_after(self, program: Program, rungs: Mapping[str, Rungs], counts: Counts) -> float:
        if self.config.target[0] == "sparsity":
            return sum(counts.values()) / self._units
        return self.left(self.removed(program, rungs, counts))

    def _refine(
        self,
        program: Program,
        rungs: Mapping[str, Rungs],
        steps: Sequence[Step],
        taken: tuple[int, float],
        left: float,
    ) -> dict[str, int]:
        """Take the step that leads past the target only in part, in numbers the rounding would not allow."""
        place, reached = taken
        counts, best = after(rungs, steps[:place]), abs(reached - left)
        crossing = place if reached > left else place - 1
        if not 0 <= crossing < len(steps):
            return counts
        step, before = steps[crossing], after(rungs, steps[:crossing])
        for level in finer(self.config.round_to):
            granule = rungs[step.group].granule(level)
            between = [n for n in range(step.before, step.kept - 1, -1) if n % granule == 0]
            if len(between) < 2:
                continue
            found, reached = search_path(
                lambda i, between=between: self._left_after(
                    program, rungs, {**before, step.group: between[i]}
                ),
                len(between) - 1,
                left,
            )
            if abs(reached - left) < best:
                counts, best = {**before, step.group: between[found]}, abs(reached - left)
            if best <= TOLERANCE:
                break
        return counts

    def left(self, program: Program) -> float:
        """Of a sparsity: the units of the groups that may lose some."""
        if self.config.target[0] != "sparsity":
            return self.fraction(program)
        return sum(group.units for group in self._eligible(program)[1]) / self._units

    def describe(self, program: Program) -> dict[str, object]:
        """Of every layer that became smaller, the fraction of its weights that is left."""
        found = shares(weighted_layers(self.original), weighted_layers(program))
        return {"left": {name: share for name, share in found.items() if share < 1}}

    def skipped(self, program: Program) -> dict[str, str]:
        """Layers of which neither an output nor an input went."""
        found = shares(weighted_layers(self.original), weighted_layers(program))
        why = f"allocation {self.config.chosen_allocation} takes nothing from it"
        return {name: self.reasons.get(name, why) for name, share in found.items() if share == 1}
