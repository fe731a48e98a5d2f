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
from modelopt_cli.training import Companion
from modelopt_cli.training.fitting import fit
from modelopt_cli.training.objectives import objective

GROWN_AT = 0.7
"""Share of the training steps after which masks that grow while a network trains no longer change."""
UPDATES = 100
"""How often they change until then, at most."""


def in_rounds(pruner: Pruner, context: Context, accept: Callable[[Program], None]) -> Program:
    """Prune a pruner's original in equal parts, with a part of the epochs after each if it is to be trained.

    Args:
        pruner: prunes; its config says how far and in how many rounds.
        context: seed and training.
        accept: given the pruned network before it is trained for the last time; raises if its target
            was missed.
    """
    rounds = pruner.config.schedule_row.rounds(pruner.config)
    wanted = pruner.config.fraction_left
    stages, program = Stages(context.training), pruner.original
    for number in range(rounds):
        final = number == rounds - 1
        program = _round(pruner, program, 1 - (1 - wanted) * (number + 1) / rounds, number, final, stages)
        if final:
            accept(program)
        if context.training is not None:
            epochs = epochs_of_round(context.training.config.epochs, rounds, number)
            program = stages.once(
                f"tune-{number + 1}", _training_of(pruner, program, context, number + 1, epochs)
            )
    return program


def _round(
    pruner: Pruner, program: Program, left: float, number: int, final: bool, stages: Stages
) -> Program:
    """One part of the pruning, and the batch norms' statistics after it."""

    def make() -> Program:
        return pruner.settled(pruner.prune(program, left, final))

    return stages.once(f"prune-{number + 1}", make)


def _training_of(
    pruner: Pruner, program: Program, context: Context, number: int, epochs: int
) -> Callable[[], Program]:
    def make() -> Program:
        masks = Masks.of(program)
        network = fine_tuned(pruner, program, context, f"tune-{number}", epochs, masks)
        check_held(network, masks.masks)
        network.encodings = compact(network)
        return network

    return make


def fine_tuned(
    pruner: Pruner,
    program: Program,
    context: Context,
    stage: str,
    epochs: int,
    *companions: Companion,
    choose_from: float = 0.0,
) -> Program:
    """A trained copy of ``program``; the teacher, where there is one, is the network before pruning."""
    assert context.training is not None
    config = replace(context.training.config, epochs=epochs)
    training = replace(context.training, config=config)
    network = copy.deepcopy(program).requires_grad_(True)
    fit(
        network,
        training,
        seed=context.seed,
        stage=stage,
        objective=objective(config, pruner.original),
        companions=companions,
        choose_from=choose_from,
    )
    return network


def check_held(network: nn.Module, masks: Mapping[str, Tensor]) -> None:
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
    are zero and so are chosen again, unless the layers' shares shift meanwhile.

    Args:
        choose: masks for a network at an overall ratio.
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
    """Prune a pruner's original by masks that grow while it trains; as ``in_rounds``, without rounds."""
    assert isinstance(pruner, WeightPruner)
    assert context.training is not None
    ratios = pruner.ratios(pruner.original, pruner.config.fraction_left)
    epochs = context.training.config.epochs

    def make() -> Program:
        masks = Growing(pruner.choose, *ratios)
        network = fine_tuned(pruner, pruner.original, context, "tune-1", epochs, masks, choose_from=GROWN_AT)
        check_held(network, masks.masks)
        pruned = [name for name, mask in masks.masks.items() if not mask.all()]
        network.encodings = compact(network, pruned, pruner.pattern.label)
        return network

    program = Stages(context.training).once("tune-1", make)
    accept(program)
    return program
