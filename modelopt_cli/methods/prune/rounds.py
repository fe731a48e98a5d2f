"""Pruning in rounds with fine-tuning after each, and pruning by masks that grow while a network trains."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor, nn

from modelopt_cli.artifact.encodings import compact
from modelopt_cli.errors import ModeloptError
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.prune.masks import Masks
from modelopt_cli.methods.prune.pruner import Pruner
from modelopt_cli.methods.prune.schedules import cubic, epochs_of_round
from modelopt_cli.methods.prune.weight_pruner import WeightPruner
from modelopt_cli.methods.stages import Stages
from modelopt_cli.program import Program
from modelopt_cli.training import Callback
from modelopt_cli.training.fitting import fit
from modelopt_cli.training.objectives import objective

GROWN_AT = 0.7
"""Fraction of the training steps after which growing masks no longer change."""
UPDATES = 100
"""Largest number of times that they change until then."""


def in_rounds(pruner: Pruner, context: Context, accept: Callable[[Program], None]) -> Program:
    """Prune in equal parts, with a part of the epochs after each if there is training.

    Args:
        pruner: of the network; its config says how far and in how many rounds.
        context: seed and training.
        accept: called with the pruned network before it is trained for the last time; raises if its
            target was missed.
    """
    rounds = pruner.config.schedule_row.rounds(pruner.config)
    target = pruner.config.kept_fraction
    stages, program = Stages(context.training), pruner.original
    for number in range(rounds):
        final = number == rounds - 1
        program = _round(pruner, program, 1 - (1 - target) * (number + 1) / rounds, number, final, stages)
        if final:
            accept(program)
        if context.training is not None:
            epochs = epochs_of_round(context.training.config.epochs, rounds, number)
            program = stages.once(
                f"tune-{number + 1}", _training_of(pruner, program, context, number + 1, epochs)
            )
    return program


def _round(
    pruner: Pruner, program: Program, kept: float, number: int, final: bool, stages: Stages
) -> Program:
    """One part of the pruning, and the recalibration of batch norms after it."""

    def make() -> Program:
        return pruner.recalibrated(pruner.prune(program, kept, final))

    return stages.once(f"prune-{number + 1}", make)


def _training_of(
    pruner: Pruner, program: Program, context: Context, number: int, epochs: int
) -> Callable[[], Program]:
    """Fine-tuning after a round, by masks that keep every zero."""

    def make() -> Program:
        masks = Masks.of(program)
        network = fine_tuned(pruner, program, context, f"tune-{number}", epochs, masks)
        require_zeros(network, masks.masks)
        network.encodings = compact(network)
        return network

    return make


def fine_tuned(
    pruner: Pruner,
    program: Program,
    context: Context,
    stage: str,
    epochs: int,
    *callbacks: Callback,
    choose_from: float = 0.0,
) -> Program:
    """A trained copy of a Program; the teacher, where there is one, is the network before pruning.

    Args:
        pruner: of the network, for the teacher.
        program: the network to train; it is not changed.
        context: seed and training.
        stage: name of this part of the command, under which its state is kept.
        epochs: of this part.
        callbacks: what must hold meanwhile.
        choose_from: fraction of the training after which the best epoch may be chosen.
    """
    assert context.training is not None
    config = replace(context.training.config, epochs=epochs)
    training = replace(context.training, config=config)
    network = copy.deepcopy(program).requires_grad_(True)
    fit(
        network,
        training,
        seed=context.seed,
        stage=stage,
        objective=objective(config, pruner.original, training.task),
        callbacks=callbacks,
        choose_from=choose_from,
    )
    return network


def require_zeros(network: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Make sure that training left every pruned weight at zero.

    Raises:
        ModeloptError: it did not.
    """
    for name, mask in masks.items():
        parameter = network.get_parameter(name).detach()
        if bool(parameter[~mask.to(parameter.device)].any()):
            raise ModeloptError("training brought pruned weights back", where=name)


class Growing(Masks):
    """Masks that grow while a network trains (Zhu and Gupta, "To prune, or not to prune", 2018).

    They follow the cubic schedule for ``GROWN_AT`` of the steps and then stay as they are. Pruned weights
    are zero and so are chosen again, unless the allocation between layers shifts meanwhile.

    Args:
        choose: masks for a network at an overall ratio of removed weights.
        start: ratio to begin with.
        final: ratio at the end.
    """

    def __init__(
        self, choose: Callable[[nn.Module, float], dict[str, Tensor]], start: float, final: float
    ) -> None:
        super().__init__({})
        self.choose, self.start, self.final = choose, start, final

    def before_step(self, network: nn.Module, step: int, steps: int) -> None:
        """Choose new masks if it is time to."""
        grown = grown_at(steps)
        every = max(1, grown // UPDATES)
        if step > grown or (step % every and step != grown):
            return
        progress = step / grown if grown else 1.0
        self.masks = self.choose(network, cubic(self.final, progress, self.start))
        self.apply_(network)


def grown_at(steps: int) -> int:
    """The step before which the masks change for the last time: early enough for ``choose_from``."""
    return max(0, int(GROWN_AT * steps) - 1)


def while_training(pruner: Pruner, context: Context, accept: Callable[[Program], None]) -> Program:
    """Prune by masks that grow while the network trains; arguments as for ``in_rounds``."""
    assert isinstance(pruner, WeightPruner)
    assert context.training is not None
    ratios = pruner.ratios(pruner.original, pruner.config.kept_fraction)
    epochs = context.training.config.epochs

    def make() -> Program:
        masks = Growing(pruner.choose, *ratios)
        network = fine_tuned(pruner, pruner.original, context, "tune-1", epochs, masks, choose_from=GROWN_AT)
        require_zeros(network, masks.masks)
        pruned = [name for name, mask in masks.masks.items() if not mask.all()]
        network.encodings = compact(network, pruned, pruner.pattern.label)
        return network

    program = Stages(context.training).once("tune-1", make)
    accept(program)
    return program
