"""What to prune, by what measure, how far, and in how many steps."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from modelopt_cli.errors import UsageError
from modelopt_cli.methods.prune.allocation import ALLOCATIONS, Allocation
from modelopt_cli.methods.prune.criteria import AUTO_CRITERION, CRITERIA, Criterion, able
from modelopt_cli.methods.prune.schedules import SCHEDULES, Schedule
from modelopt_cli.methods.prune.structures import (
    STRUCTURES,
    Granularity,
    SparsityPattern,
    Structure,
    structure_named,
)
from modelopt_cli.methods.prune.targets import SPARSITY, TARGETS, Target

AUTO = "auto"


@dataclass(frozen=True)
class PruneConfig:
    """Settings of ``prune``.

    Attributes:
        structure: a key of ``STRUCTURES``, or a pattern such as ``2:4``: how many stay, of how many.
        criterion: a key of ``CRITERIA``; "auto" takes ``chosen_criterion``.
        allocation: a key of ``ALLOCATIONS``; "auto" takes ``chosen_allocation``.
        sparsity: fraction to remove; of single weights, of channels, or of blocks that can go.
        flops: fraction of the original's multiply-accumulates to keep.
        params: fraction of the original's parameters to keep; of zeros in weights those that are not zero.
        bytes: fraction of the bytes of the original, written as an artifact, to keep.
        latency: fraction of the original's latency to keep, measured on this machine.
        schedule: a key of ``SCHEDULES``.
        rounds: of the iterative schedule.
        block: weights in a row of the block structure.
        round_to: kept channels are a multiple of this.
        include: globs of layer names; empty means every layer.
        exclude: globs of layer names to leave whole.
        skip_first: leave the first layer that could be pruned whole.
        skip_last: leave the last one whole.
        calibration_samples: how many samples to look at, at most.
        reestimate: compute batch-norm statistics afresh from calibration data.

    Raises:
        UsageError: everything that is wrong with the settings, in one line.
    """

    structure: str = "channels"
    criterion: str = AUTO
    allocation: str = AUTO
    sparsity: float | None = None
    flops: float | None = None
    params: float | None = None
    bytes: float | None = None
    latency: float | None = None
    schedule: str = "one-shot"
    rounds: int = 3
    block: int = 4
    round_to: int = 8
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    skip_first: bool = False
    skip_last: bool = False
    calibration_samples: int = 512
    reestimate: bool = True

    def __post_init__(self) -> None:
        wrong = [*_wrong_names(self), *_wrong_numbers(self)]
        # What goes together is asked only of settings that mean something by themselves.
        wrong = wrong or [*_wrong_targets(self), *_wrong_combinations(self), *_without_meaning(self)]
        if wrong:
            raise UsageError("; ".join(wrong))

    @property
    def structure_row(self) -> Structure:
        """The declaration of the structure."""
        row = structure_named(self.structure)
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
        given = _given(self)
        if not given:
            options = ", ".join(f"--{name}" for name in TARGETS)
            raise UsageError("nothing says how much to prune", hint=f"give one of {options}")
        return next(iter(given.items()))

    @property
    def target_row(self) -> Target:
        """The declaration of the target."""
        return TARGETS[self.target[0]]

    @property
    def fraction_left(self) -> float:
        """The fraction of the original that the target leaves."""
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

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form, for the history."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def _given(config: PruneConfig) -> dict[str, float]:
    return {name: value for name in TARGETS if (value := getattr(config, name)) is not None}


def _wrong_names(config: PruneConfig) -> Iterator[str]:
    if structure_named(config.structure) is None:
        yield f"unknown structure {config.structure!r} (one of {', '.join(STRUCTURES)}, such as 2:4)"
    for what, value, known in (
        ("criterion", config.criterion, (AUTO, *CRITERIA)),
        ("allocation", config.allocation, (AUTO, *ALLOCATIONS)),
        ("schedule", config.schedule, tuple(SCHEDULES)),
    ):
        if value not in known:
            yield f"unknown {what} {value!r} (one of {', '.join(known)})"


def _wrong_numbers(config: PruneConfig) -> Iterator[str]:
    for name, value in _given(config).items():
        if not 0 < value < 1:
            yield f"--{name} must be above 0 and below 1, not {value:g}"
    for name, least in (("rounds", 1), ("block", 2), ("round_to", 1), ("calibration_samples", 1)):
        if getattr(config, name) < least:
            yield f"--{name.replace('_', '-')} must be at least {least}"


def _wrong_targets(config: PruneConfig) -> Iterator[str]:
    given, fixed = _given(config), config.fixed_sparsity
    if fixed is not None:
        if fixed <= 0:
            yield f"structure {config.structure} removes nothing: its first number says how many stay"
        elif any(name != SPARSITY or abs(value - fixed) > 1e-6 for name, value in given.items()):
            yield f"structure {config.structure} fixes the sparsity at {fixed:g}; give no other target"
        return
    if len(given) > 1:
        yield f"{' and '.join(f'--{name}' for name in given)} exclude each other; give one target"
    if config.granularity.leaves_zeros:
        for name in given:
            if why := TARGETS[name].no_zeros:
                yield f"--{name} cannot be a target of structure {config.structure}: {why}"


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
        yield f"{schedule} grows masks over weights, not over {config.structure}; use --schedule iterative"
    if not config.criterion_row.while_training:
        names = " or ".join(name for name, row in CRITERIA.items() if row.while_training)
        yield f"{schedule} ranks weights while they train, by {names} only, not {config.chosen_criterion}"
    if any(TARGETS[name].of_file for name in _given(config)):
        yield f"{schedule} needs --sparsity or --params; bytes are known only when masks are final"
    if config.allocation_row.needs_curves:
        yield f"{schedule} cannot use allocation {config.allocation}, which is measured before training"


def _without_meaning(config: PruneConfig) -> Iterator[str]:
    """Settings that were changed although nothing asks for them."""
    rows: tuple[tuple[str, Mapping[str, Structure | Schedule], Structure | Schedule], ...] = (
        ("schedule", SCHEDULES, config.schedule_row),
        ("structure", STRUCTURES, config.structure_row),
    )
    for option, table, chosen in rows:
        for name, row in table.items():
            for setting in row.settings:
                changed = getattr(config, setting) != getattr(PruneConfig, setting)
                if changed and setting not in chosen.settings:
                    yield f"--{setting.replace('_', '-')} has no meaning without --{option} {name}"
