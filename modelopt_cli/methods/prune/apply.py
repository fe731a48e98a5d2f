"""prune: a Program in, a smaller or sparser Program out."""

from dataclasses import replace

from modelopt_cli.artifact import predicted_bytes
from modelopt_cli.artifact.encodings import require_not_shared
from modelopt_cli.errors import NothingCompressed, UsageError
from modelopt_cli.methods.context import Context, MethodResult, Reached
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.methods.prune.criteria import give_data, require_data
from modelopt_cli.methods.prune.pruner import PRUNE_FIRST, Pruner
from modelopt_cli.methods.prune.schedules import require_training
from modelopt_cli.methods.prune.sensitivity import SPARSITIES, Sensitivity, measure
from modelopt_cli.methods.prune.target_figures import reached, require
from modelopt_cli.program import Program
from modelopt_cli.program.quantized import Quantized
from modelopt_cli.training import distributed


def apply(program: Program, config: PruneConfig, context: Context) -> MethodResult:
    """Prune a Program to the config's target.

    Args:
        program: any float Program; it is not changed. What it was pruned of before stays pruned.
        config: structure, criterion, allocation, target, schedule.
        context: calibration data, training, seed, device, progress.

    Returns:
        The pruned Program, the unpruned layers with reasons, the target reached, and notes.

    Raises:
        UsageError: no target, a quantized Program, a glob that matches nothing, or data or training
            that the config needs and the context lacks.
        TargetNotReached: the target was missed by more than ``targets.TOLERANCE``.
        NothingCompressed: nothing can be pruned.
        DataError: the data are empty or do not fit.
    """
    target_row = config.target_row
    pruner = _pruner(program, config, context)
    require_training(config, context)
    if target_row.measured and distributed.world().size > 1:
        raise UsageError(
            f"{config.target[0]} is measured by one process",
            hint="prune first, then train the result under torchrun",
        )

    measured: list[Reached] = []

    def accept(pruned: Program) -> None:
        if pruner.unchanged(pruned):
            raise NothingCompressed("nothing was removed", hint="nothing was written; ask for more")
        measured.append(_require(config, pruner.kept_fraction(pruned)))

    result = config.schedule_row.prune(pruner, context, accept)
    # Training moves no channel: a latency is not measured again, when it could only differ by chance.
    target = measured[-1] if target_row.measured else _require(config, pruner.kept_fraction(result))
    result.history = (*program.history, pruner.entry(result, target))
    if target_row.of_file:  # which is complete only now
        target = replace(target, reached=predicted_bytes(result, code=context.code) / pruner.original_bytes)
    return MethodResult(
        result, pruner.skipped(result), target, (*pruner.notes, *pruner.closing_notes(result))
    )


def sensitivity(program: Program, config: PruneConfig, context: Context) -> tuple[Sensitivity, ...]:
    """Measure the change of the outputs with one layer, group of channels or block pruned at a time.

    Args:
        program: any float Program; it is not changed.
        config: structure, criterion and the choice of layers; it needs no target.
        context: calibration data, seed, device, progress.

    Raises:
        UsageError: there are no data, or the config cannot be used.
        NothingCompressed: nothing can be pruned.
    """
    return measure(_pruner(program, config, context), program, SPARSITIES)


def _pruner(program: Program, config: PruneConfig, context: Context) -> Pruner:
    if any(isinstance(module, Quantized) for module in program.modules()):
        raise UsageError("the network is quantized already", hint=PRUNE_FIRST)
    require_not_shared(program.encodings, "pruning", PRUNE_FIRST)
    require_data(config.chosen_criterion, context.data)
    if config.allocation_row.needs_curves and context.data is None:
        raise UsageError(f"allocation {config.allocation} is measured on data", hint=give_data())
    pruner: Pruner = config.granularity.pruner(program, config, context)
    return pruner


def _require(config: PruneConfig, kept: float) -> Reached:
    target = reached(*config.target, kept)
    # A pattern is the target itself: channels that fill no group of M are kept.
    return target if config.fixed_sparsity is not None else require(target)
