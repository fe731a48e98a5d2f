"""What to prune, by what measure, how far, and in how many steps."""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from modelopt_cli.errors import UsageError

STRUCTURES: dict[str, str] = {
    "unstructured": "single weights; the file shrinks, the speed stays",
    "N:M": "at most N of every M neighbouring input weights stay, e.g. 2:4",
    "block": "rows of --block neighbouring input weights",
    "channels": "whole channels, units and heads, really removed",
    "layers": "whole residual blocks and layers that keep their shape",
}
CRITERION_NAMES: dict[str, tuple[str, ...]] = {
    "l1": ("weights", "channels", "layers"),
    "l2": ("weights", "channels", "layers"),
    "bn-scale": ("channels",),
    "taylor": ("weights", "channels", "layers"),
    "fpgm": ("channels",),
    "wanda": ("weights", "channels"),
    "obs": ("weights",),
    "random": ("weights", "channels", "layers"),
}
"""By name: the families of structures it can rank."""
ALLOCATION_NAMES = ("uniform", "global", "erk", "lamp", "sensitivity")
SCHEDULES: dict[str, str] = {
    "one-shot": "all at once, then fine-tuning if there are training data",
    "iterative": "--rounds times a part, with fine-tuning in between",
    "gradual": "masks that grow while one training run goes on",
}
TARGETS: dict[str, str] = {
    "sparsity": "fraction removed, of the weights, channels or blocks that may be pruned",
    "flops": "fraction of the arithmetic that is left",
    "params": "fraction of the parameters that is left; zeros that pruning puts do not count",
    "bytes": "fraction of the file that is left",
    "latency": "fraction of the latency that is left, measured",
}
AUTO = "auto"
_PATTERN = re.compile(r"([1-9]\d?):([1-9]\d?)")
_INSTEAD = "use --structure channels, or one of --sparsity, --params, --bytes"
_ZEROS = {
    "flops": f"zeros are multiplied like any number; {_INSTEAD}",
    "latency": f"zeros do not make it faster; {_INSTEAD}",
}


@dataclass(frozen=True)
class PruneConfig:
    """Settings of ``prune``.

    Attributes:
        structure: a key of ``STRUCTURES``, or a pattern such as ``2:4``: how many stay, of how many.
        criterion: a key of ``CRITERION_NAMES``; "auto" takes ``chosen_criterion``.
        allocation: one of ``ALLOCATION_NAMES``; "auto" takes ``chosen_allocation``.
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
    def pattern(self) -> tuple[int, int] | None:
        """``(N, M)`` of an N:M structure: how many weights stay, of how many; None for the others."""
        found = _PATTERN.fullmatch(self.structure)
        return (int(found[1]), int(found[2])) if found else None

    @property
    def family(self) -> str:
        """What goes: ``weights``, ``channels`` or ``layers``."""
        return self.structure if self.structure in ("channels", "layers") else "weights"

    @property
    def target(self) -> tuple[str, float]:
        """The one target: its name in ``TARGETS`` and the fraction.

        Raises:
            UsageError: there is none; such a config is good for a sensitivity table only.
        """
        if self.pattern is not None:
            return "sparsity", 1 - self.pattern[0] / self.pattern[1]
        given = _given(self)
        if not given:
            options = ", ".join(f"--{name}" for name in TARGETS)
            raise UsageError("nothing says how much to prune", hint=f"give one of {options}")
        return next(iter(given.items()))

    @property
    def chosen_criterion(self) -> str:
        """The criterion, with "auto" replaced by the best that needs no data."""
        return "l2" if self.criterion == AUTO else self.criterion

    @property
    def chosen_allocation(self) -> str:
        """The allocation, with "auto" replaced by the one that suits structure and criterion."""
        if self.allocation != AUTO:
            return self.allocation
        if self.pattern is not None or self.chosen_criterion in ("wanda", "random"):
            return "uniform"
        return "lamp" if self.chosen_criterion == "obs" else "global"

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form, for the history."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def _given(config: PruneConfig) -> dict[str, float]:
    return {name: value for name in TARGETS if (value := getattr(config, name)) is not None}


def _wrong_names(config: PruneConfig) -> Iterator[str]:
    if config.pattern is None and config.structure not in STRUCTURES.keys() - {"N:M"}:
        yield f"unknown structure {config.structure!r} (one of {', '.join(STRUCTURES)}, such as 2:4)"
    for what, value, known in (
        ("criterion", config.criterion, (AUTO, *CRITERION_NAMES)),
        ("allocation", config.allocation, (AUTO, *ALLOCATION_NAMES)),
        ("schedule", config.schedule, tuple(SCHEDULES)),
    ):
        if value not in known:
            yield f"unknown {what} {value!r} (one of {', '.join(known)})"


def _wrong_numbers(config: PruneConfig) -> Iterator[str]:
    if config.pattern is not None and config.pattern[0] >= config.pattern[1]:
        yield f"structure {config.structure} removes nothing: its first number says how many stay"
    for name, value in _given(config).items():
        if not 0 < value < 1:
            yield f"--{name} must be above 0 and below 1, not {value:g}"
    for name, least in (("rounds", 1), ("block", 2), ("round_to", 1), ("calibration_samples", 1)):
        if getattr(config, name) < least:
            yield f"--{name.replace('_', '-')} must be at least {least}"


def _wrong_targets(config: PruneConfig) -> Iterator[str]:
    given = _given(config)
    if config.pattern is not None:
        fixed = 1 - config.pattern[0] / config.pattern[1]
        if any(name != "sparsity" or abs(value - fixed) > 1e-6 for name, value in given.items()):
            yield f"structure {config.structure} fixes the sparsity at {fixed:g}; give no other target"
        return
    if len(given) > 1:
        yield f"{' and '.join(f'--{name}' for name in given)} exclude each other; give one target"
    if config.family == "weights":
        for name in given.keys() & _ZEROS.keys():
            yield f"--{name} cannot be a target of structure {config.structure}: {_ZEROS[name]}"


def _without_meaning(config: PruneConfig) -> Iterator[str]:
    """Settings that were changed although nothing asks for them."""
    for name, where, wanted in (
        ("rounds", "schedule", "iterative"),
        ("block", "structure", "block"),
        ("round_to", "structure", "channels"),
    ):
        if getattr(config, name) != getattr(PruneConfig, name) and getattr(config, where) != wanted:
            yield f"--{name.replace('_', '-')} has no meaning without --{where} {wanted}"


def _wrong_combinations(config: PruneConfig) -> Iterator[str]:
    family, criterion = config.family, config.chosen_criterion
    if family not in CRITERION_NAMES[criterion]:
        known = ", ".join(name for name, families in CRITERION_NAMES.items() if family in families)
        yield f"criterion {criterion} cannot rank {family} (one of {known})"
    if config.allocation not in (AUTO, "uniform") and config.pattern is not None:
        yield f"structure {config.structure} is uniform; allocation {config.allocation} cannot apply"
    if config.allocation not in (AUTO, "global") and family == "layers":
        yield f"allocation {config.allocation} has no meaning for structure layers"
    if config.schedule == "gradual":
        yield from _wrong_gradual(config, criterion)


def _wrong_gradual(config: PruneConfig, criterion: str) -> Iterator[str]:
    if config.structure not in ("unstructured", "block"):
        yield (
            f"schedule gradual grows masks over weights, not over {config.structure}; "
            "use --schedule iterative"
        )
    if criterion not in ("l1", "l2"):
        yield f"schedule gradual ranks weights while they train, by l1 or l2 only, not {criterion}"
    if config.bytes is not None:
        yield "schedule gradual needs --sparsity or --params; bytes are known only when masks are final"
    if config.allocation == "sensitivity":
        yield "schedule gradual cannot use allocation sensitivity, which is measured before training"
