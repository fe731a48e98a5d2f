"""prune: a Program in, a smaller or sparser Program out."""

from dataclasses import replace
from typing import Any

import torch

from modelopt_cli.artifact import predicted_bytes
from modelopt_cli.artifact.sparsity import without_zeros
from modelopt_cli.errors import NothingCompressed, UsageError
from modelopt_cli.methods.context import Context, Reached, Result
from modelopt_cli.methods.prune import schedule
from modelopt_cli.methods.prune.channels import Channels
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.methods.prune.criteria import criterion_for
from modelopt_cli.methods.prune.depth import Layers
from modelopt_cli.methods.prune.family import Family
from modelopt_cli.methods.prune.sensitivity import SPARSITIES, Sensitivity, measure
from modelopt_cli.methods.prune.targets import DRAFT, Figures, nonzeros, parameters, reached, require
from modelopt_cli.methods.prune.weights import Weights
from modelopt_cli.program import Program
from modelopt_cli.program.coverage import coverage
from modelopt_cli.program.quantized import Quantized
from modelopt_cli.training import distributed

FAMILIES: dict[str, type[Family]] = {"weights": Weights, "channels": Channels, "layers": Layers}
_FIRST = "prune first, then quantize or share: they keep what pruning did"


def apply(program: Program, config: PruneConfig, context: Context) -> Result:
    """Prune a Program to the config's target.

    Args:
        program: any float Program; it is not changed. What it was pruned of before stays pruned.
        config: structure, criterion, allocation, target, schedule.
        context: calibration data, what to train with, seed, progress.

    Returns:
        The pruned Program, the layers left whole with reasons, the target reached, and notes.

    Raises:
        UsageError: no target, a quantized Program, a glob that matches nothing, or data or training
            that the config needs and the context lacks.
        TargetNotReached: the target was missed by more than ``targets.TOLERANCE``.
        NothingCompressed: nothing can be pruned.
        DataError: the data are empty or do not fit.
    """
    metric, _ = config.target
    family = _family(program, config, context)
    schedule.check(config, context)

    measured: list[Reached] = []

    def accept(pruned: Program) -> None:
        if family.untouched(pruned):
            raise NothingCompressed("nothing was removed", hint="nothing was written; ask for more")
        measured.append(_require(config, family.left(pruned)))

    result = schedule.follow(family, config, context, accept)
    # Training moves no channel: a latency is not measured again, when it could only differ by chance.
    target = measured[-1] if metric == "latency" else _require(config, family.left(result))
    result.history = (*program.history, _entry(family, result, target))
    if metric == "bytes":  # the figure reached is itself a part of the file
        target = replace(target, reached=predicted_bytes(result, code=context.code) / family.full)
    return Result(result, family.skipped(result), target, (*family.notes, *family.closing_notes(result)))


def sensitivity(program: Program, config: PruneConfig, context: Context) -> tuple[Sensitivity, ...]:
    """How much each layer, group or block minds being pruned; the config needs no target.

    Raises:
        UsageError: there are no data, or the config cannot be used.
        NothingCompressed: nothing can be pruned.
    """
    return measure(_family(program, config, context), program, SPARSITIES)


def _family(program: Program, config: PruneConfig, context: Context) -> Family:
    """What prunes this Program, if it can be pruned.

    Raises:
        UsageError: as for ``apply``.
    """
    _check_program(program)
    data = context.data
    criterion_for(
        config.chosen_criterion,
        config.family,
        data=data is not None,
        labels=data is not None and data.labelled,
    )
    if config.allocation == "sensitivity" and data is None:
        raise UsageError("allocation sensitivity is measured on data", hint="give --calib or --data")
    if config.latency is not None and distributed.world().size > 1:
        raise UsageError(
            "latency is measured by one process", hint="prune first, then train the result under torchrun"
        )

    def entry(candidate: Program) -> dict[str, Any]:
        return _entry(family, candidate, Reached(*config.target, DRAFT))

    params = nonzeros if config.family == "weights" else parameters
    figures = Figures(entry, params, context.code)
    family: Family = FAMILIES[config.family](program, config, context, figures)
    return family


def _require(config: PruneConfig, left: float) -> Reached:
    target = reached(*config.target, left)
    # A pattern is the target itself: channels that fill no group of M are kept whole.
    return target if config.pattern is not None else require(target)


def _check_program(program: Program) -> None:
    if any(isinstance(module, Quantized) for module in program.modules()):
        raise UsageError("the network is quantized already", hint=_FIRST)
    for name, encoding in program.encodings.items():
        if (codec := without_zeros(encoding).codec) != "raw":
            raise UsageError(
                f"is stored as {codec} values, which pruning would change", where=name, hint=_FIRST
            )


def _entry(family: Family, program: Program, target: Reached) -> dict[str, Any]:
    """What the history says: nothing that would differ from one run to the next."""
    config, context = family.config, family.context
    figures: dict[str, Any] = {"metric": target.metric, "wanted": target.wanted}
    if target.metric != "latency":
        figures["reached"] = round(target.reached, 4)
    entry = {
        "method": "prune",
        "config": config.as_dict(),
        "criterion": config.chosen_criterion,
        "allocation": config.chosen_allocation,
        "seed": context.seed,
        "torch": str(torch.__version__),
        "target": figures,
        "skipped": family.skipped(program),
        **family.describe(program),
        **context.origin,
    }
    if (calibration := family.calibration) is not None:
        entry["calibration"] = calibration.name
    if context.training is not None:
        entry["training"] = {"data": context.training.train.name, **context.training.config.as_dict()}
    covered = coverage(program, (*family.original.history, entry))
    return entry | {"coverage": {"compressed": covered.compressed, "total": covered.total}}
