"""Schedules: the number of steps in which a network is pruned, and the training between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelopt_cli.errors import UsageError
from modelopt_cli.lazy_names import deferred
from modelopt_cli.settings import option

if TYPE_CHECKING:
    from modelopt_cli.methods.context import Context
    from modelopt_cli.program import Program

    Accept = Callable[[Program], None]
    """Takes the pruned network before it is trained for the last time; raises if its target was missed."""


@dataclass(frozen=True)
class Schedule:
    """One way to go to the target.

    Attributes:
        help: one line.
        paper: where it was published.
        prune: prunes by it with a ``Pruner``; the pruned network is passed to ``Accept``.
        rounds: number of parts in which it prunes, by its ``PruneConfig``.
        trains: it has no meaning without training.
        while_training: masks of weights are chosen while the network trains.
        settings: fields of the config that have a meaning for it alone.
    """

    help: str
    paper: str
    prune: Callable[[Any, Context, Accept], Program]
    rounds: Callable[[Any], int] = lambda config: 1
    trains: bool = True
    while_training: bool = False
    settings: tuple[str, ...] = ()


_in_rounds = deferred("modelopt_cli.methods.prune.rounds", "in_rounds")
_while_training = deferred("modelopt_cli.methods.prune.rounds", "while_training")

SCHEDULES: dict[str, Schedule] = {
    "one-shot": Schedule(
        "all at once, then fine-tuning if there are training data", "none", _in_rounds, trains=False
    ),
    "iterative": Schedule(
        "--rounds times a part, with fine-tuning in between",
        "Han et al., Learning both Weights and Connections for Efficient Neural Networks, NIPS 2015",
        _in_rounds,
        rounds=lambda config: config.rounds,
        settings=("rounds",),
    ),
    "gradual": Schedule(
        "masks that grow while one training run goes on",
        "Zhu and Gupta, To prune, or not to prune, ICLR Workshop 2018",
        _while_training,
        while_training=True,
    ),
}
"""By the name used on the command line."""


def require_training(config: Any, context: Context) -> None:
    """Make sure that a schedule can be followed.

    Raises:
        UsageError: it needs training and there is none, or more epochs.
    """
    schedule = SCHEDULES[config.schedule]
    if not schedule.trains:
        return
    if context.training is None:
        able = next(name for name, row in SCHEDULES.items() if not row.trains)
        raise UsageError(
            f"schedule {config.schedule} trains the network",
            hint=f"give {option('train')}, or use {option('schedule')} {able}",
        )
    rounds, epochs = schedule.rounds(config), context.training.config.epochs
    if epochs < rounds:
        raise UsageError(
            f"{rounds} rounds need at least as many epochs, not {epochs}",
            hint=f"raise {option('epochs')} or lower {option('rounds')}",
        )


def cubic(sparsity: float, progress: float, start: float = 0.0) -> float:
    """Sparsity at a time while masks grow (Zhu and Gupta 2018, equation 1).

    Args:
        sparsity: at the end.
        progress: 0 to 1.
        start: sparsity at the beginning.
    """
    return sparsity + (start - sparsity) * (1 - min(max(progress, 0.0), 1.0)) ** 3


def epochs_of_round(epochs: int, rounds: int, number: int) -> int:
    """Number of epochs of round ``number``, from 0; the later rounds get the remainder."""
    return epochs * (number + 1) // rounds - epochs * number // rounds
