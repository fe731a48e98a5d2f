"""Settings of ``prune``: what goes, by which measure, how far, and in how many steps."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from modelopt_cli.artifact.coding import PLAIN_CODE, Code
from modelopt_cli.errors import UsageError
from modelopt_cli.methods.prune.allocation import ALLOCATIONS, Allocation
from modelopt_cli.methods.prune.criteria import AUTO_CRITERION, CRITERIA, Criterion, able
from modelopt_cli.methods.prune.schedules import SCHEDULES, Schedule
from modelopt_cli.methods.prune.structures import (
    STRUCTURES,
    Granularity,
    SparsityPattern,
    Structure,
)
from modelopt_cli.methods.prune.target_figures import SPARSITY, TARGETS, Target
from modelopt_cli.settings import CALIBRATION, Config, Setting, fraction, option, row_named

AUTO = "auto"
_TITLE = "Target (give one; of the original, between 0 and 1)"


def _target(name: str) -> Setting:
    text = TARGETS[name].help
    return Setting(
        f"{text[0].upper()}{text[1:]}.", metavar="F", parse=fraction, above=0, below=1, title=_TITLE
    )


@dataclass(frozen=True)
class PruneConfig(Config, title="Pruning"):
    """Settings of ``prune``."""

    method: ClassVar[str] = "prune"
    """Name of the command, in the history and in ``METHODS``."""
    code: ClassVar[Code] = PLAIN_CODE
    """Coding of the file where none is asked for."""
    structure: Annotated[
        str, Setting("Form in which weights are removed; N:M is a pattern such as 2:4.", choices=STRUCTURES)
    ] = "channels"
    criterion: Annotated[
        str,
        Setting(
            "Measure of importance; what is least important goes.",
            choices={AUTO: f"{AUTO_CRITERION}, which needs no data", **CRITERIA},
        ),
    ] = AUTO
    allocation: Annotated[
        str,
        Setting(
            "Rule that says how much each layer loses.",
            choices={AUTO: "the one that suits structure and criterion", **ALLOCATIONS},
            advanced=True,
        ),
    ] = AUTO
    sparsity: Annotated[float | None, _target("sparsity")] = None
    flops: Annotated[float | None, _target("flops")] = None
    params: Annotated[float | None, _target("params")] = None
    bytes: Annotated[float | None, _target("bytes")] = None
    latency: Annotated[float | None, _target("latency")] = None
    schedule: Annotated[
        str, Setting("Steps in which the network is pruned, and trained in between.", choices=SCHEDULES)
    ] = "one-shot"
    rounds: Annotated[int, Setting("Rounds of the iterative schedule.", least=1, advanced=True)] = 3
    block: Annotated[
        int, Setting("Input weights in a row of a block, for structure block.", least=2, advanced=True)
    ] = 4
    round_to: Annotated[
        int,
        Setting(
            "Keep a multiple of this many channels in each layer, where possible.", least=1, advanced=True
        ),
    ] = 8
    include: Annotated[
        tuple[str, ...], Setting("Prune only layers whose names match; may be repeated.", of_layers=True)
    ] = ()
    exclude: Annotated[
        tuple[str, ...], Setting("Leave layers whose names match unpruned; may be repeated.", of_layers=True)
    ] = ()
    skip_first: Annotated[bool, Setting("Leave the first layer unpruned.", advanced=True)] = False
    skip_last: Annotated[bool, Setting("Leave the last layer unpruned.", advanced=True)] = False
    calibration_samples: Annotated[
        int, Setting("Look at no more than this many samples.", least=1, title=CALIBRATION, advanced=True)
    ] = 512
    bn_recalibration: Annotated[
        bool,
        Setting(
            "Compute the statistics of batch norms again, from calibration data.",
            title=CALIBRATION,
            older=("--reestimate/--no-reestimate",),
            advanced=True,
        ),
    ] = True

    def conflicts(self) -> Iterator[str]:
        """Settings that contradict each other or have no meaning together."""
        yield from _wrong_targets(self)
        yield from _wrong_combinations(self)
        yield from _without_meaning(self)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form, for the history, where recalibration keeps the name that it has in older files."""
        settings = super().as_dict()
        return settings | {"reestimate": settings.pop("bn_recalibration")}

    @property
    def structure_row(self) -> Structure:
        """The declaration of the structure."""
        row = row_named(self.structure, STRUCTURES)
        assert row is not None
        return row

    @property
    def granularity(self) -> Granularity:
        """The size of the parts that go."""
        return self.structure_row.granularity

    @property
    def pattern(self) -> SparsityPattern | None:
        """The zeros that the structure leaves; None where parts are really removed."""
        return self.structure_row.pattern(self) if self.structure_row.pattern else None

    @property
    def fixed_sparsity(self) -> float | None:
        """The fraction that goes where the structure itself says it, as N:M does; else None."""
        return self.pattern.sparsity if self.pattern is not None and self.pattern.fixed else None

    @property
    def target(self) -> tuple[str, float]:
        """The one target: its name in ``TARGETS`` and the fraction.

        Raises:
            UsageError: there is none; such a config is good for a sensitivity table only.
        """
        if self.fixed_sparsity is not None:
            return SPARSITY, self.fixed_sparsity
        targets = _targets_of(self)
        if not targets:
            names = ", ".join(map(option, TARGETS))
            raise UsageError("nothing says how much to prune", hint=f"give one of {names}")
        return next(iter(targets.items()))

    @property
    def target_row(self) -> Target:
        """The declaration of the target."""
        return TARGETS[self.target[0]]

    @property
    def kept_fraction(self) -> float:
        """The fraction of the original to keep, in the unit of the target."""
        return 1 - self.target[1] if self.target_row.removed else self.target[1]

    @property
    def chosen_criterion(self) -> str:
        """The criterion, with "auto" replaced by the best that needs no data."""
        return AUTO_CRITERION if self.criterion == AUTO else self.criterion

    @property
    def criterion_row(self) -> Criterion:
        """The declaration of the chosen criterion."""
        return CRITERIA[self.chosen_criterion]

    @property
    def chosen_allocation(self) -> str:
        """The allocation, with "auto" replaced by the one that suits structure and criterion."""
        if self.allocation != AUTO:
            return self.allocation
        return self.structure_row.allocation or self.criterion_row.allocation

    @property
    def allocation_row(self) -> Allocation:
        """The declaration of the chosen allocation."""
        return ALLOCATIONS[self.chosen_allocation]

    @property
    def chosen_by_data(self) -> bool:
        """True if what goes depends on samples."""
        return self.criterion_row.needs_data or self.allocation_row.needs_curves

    @property
    def schedule_row(self) -> Schedule:
        """The declaration of the schedule."""
        return SCHEDULES[self.schedule]


def _targets_of(config: PruneConfig) -> dict[str, float]:
    return {name: value for name in TARGETS if (value := getattr(config, name)) is not None}


def _wrong_targets(config: PruneConfig) -> Iterator[str]:
    targets, fixed = _targets_of(config), config.fixed_sparsity
    if fixed is not None:
        if fixed <= 0:
            yield f"structure {config.structure} removes nothing: its first number says how many stay"
        elif any(name != SPARSITY or abs(value - fixed) > 1e-6 for name, value in targets.items()):
            yield f"structure {config.structure} fixes the sparsity at {fixed:g}; give no other target"
        return
    if len(targets) > 1:
        yield f"{' and '.join(map(option, targets))} exclude each other; give one target"
    if config.granularity.leaves_zeros:
        shrinking = " or ".join(name for name, row in STRUCTURES.items() if not row.granularity.leaves_zeros)
        allowed = ", ".join(option(name) for name, row in TARGETS.items() if not row.obstacle)
        instead = f"use {option('structure')} {shrinking}, or one of {allowed}"
        for name in targets:
            if reason := TARGETS[name].obstacle:
                structure = f"structure {config.structure}"
                yield f"{option(name)} cannot be a target of {structure}: {reason}; {instead}"


def _wrong_combinations(config: PruneConfig) -> Iterator[str]:
    granularity, row, allocation = config.granularity, config.structure_row, config.chosen_allocation
    if granularity not in config.criterion_row.granularities:
        yield f"criterion {config.chosen_criterion} cannot rank {granularity} (one of {able(granularity)})"
    if allocation != (row.allocation or allocation):
        yield f"structure {config.structure} is {row.allocation}; allocation {allocation} cannot apply"
    elif config.allocation != AUTO and granularity not in config.allocation_row.granularities:
        yield f"allocation {allocation} has no meaning for structure {config.structure}"
    if config.schedule_row.while_training:
        yield from _wrong_while_training(config)


def _wrong_while_training(config: PruneConfig) -> Iterator[str]:
    """Settings that keep masks from being chosen while the network trains."""
    schedule = f"schedule {config.schedule}"
    if config.pattern is None or config.pattern.fixed:
        allowed = " or ".join(name for name, row in SCHEDULES.items() if not row.while_training)
        instead = f"use {option('schedule')} {allowed}"
        yield f"{schedule} grows masks over weights, not over {config.structure}; {instead}"
    if not config.criterion_row.while_training:
        names = " or ".join(name for name, row in CRITERIA.items() if row.while_training)
        yield f"{schedule} ranks weights while they train, by {names} only, not {config.chosen_criterion}"
    for name in (name for name in _targets_of(config) if TARGETS[name].of_file):
        allowed = " or ".join(option(name) for name, row in TARGETS.items() if row.counted)
        yield f"{schedule} needs {allowed}; {name} are known only when masks are final"
    if config.allocation_row.needs_curves:
        yield f"{schedule} cannot use allocation {config.allocation}, which is measured before training"


def _without_meaning(config: PruneConfig) -> Iterator[str]:
    """Settings that were changed although nothing asks for them."""
    rows: tuple[tuple[str, Mapping[str, Structure | Schedule], Structure | Schedule], ...] = (
        ("schedule", SCHEDULES, config.schedule_row),
        ("structure", STRUCTURES, config.structure_row),
    )
    for kind, table, chosen in rows:
        for name, row in table.items():
            for setting in row.settings:
                changed = getattr(config, setting) != getattr(PruneConfig, setting)
                if changed and setting not in chosen.settings:
                    yield f"{option(setting)} has no meaning without {option(kind, name)}"
