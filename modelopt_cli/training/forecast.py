"""How long a training would take, from a few of its own steps."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from modelopt_cli.measure.accuracy import Tally
from modelopt_cli.training.snapshot import copy_tensors, put_tensors
from modelopt_cli.training.timing import Timing, timed
from modelopt_cli.training.validate import judged

if TYPE_CHECKING:
    from modelopt_cli.training.loop import Loop


@dataclass(frozen=True)
class Forecast:
    """What one training would take, if patience does not end it before.

    Attributes:
        stage: what the run and the log call it.
        train_samples: that are trained on.
        val_samples: that weights are chosen by; 0 without validation, None where nobody knows.
        epochs: passes over the former.
        steps_per_epoch: of the optimizer.
        steps: in all epochs.
        lr: the largest learning rate, given or chosen.
        lr_test_seconds: what it takes to choose it.
        timed_steps: how many were timed, without those that warm up.
        seconds_per_step: their median.
        seconds_per_kept_step: the same where the objective has kept what it needs to know of every sample;
            None where it keeps nothing, or there is no epoch after that.
        validation_seconds: of all validations.
        seconds: of it all.
    """

    stage: str
    train_samples: int
    val_samples: int | None
    epochs: int
    steps_per_epoch: int
    steps: int
    lr: float
    lr_test_seconds: float
    timed_steps: int
    seconds_per_step: float
    seconds_per_kept_step: float | None
    validation_seconds: float
    seconds: float


def forecast(loop: "Loop", kept_after: int | None) -> Forecast:
    """Time a few steps and validations, for what all of them would take; the weights come back.

    Args:
        loop: one that has not begun.
        kept_after: as for ``fit``.
    """
    learner, epochs = loop.learner, loop.config.epochs
    asking = epochs if kept_after is None else min(epochs, kept_after)
    before = copy_tensors(learner.network)
    try:
        test = timed(_begun(loop), wait=partial(_wait, loop)).each
        steps = _timed_steps(loop, asking)
        # The same samples again: by now what the objective keeps of them is there.
        again = _timed_steps(loop, asking) if asking < epochs else None
        validation = _timed_validation(loop)
    finally:
        loop.rewind()
        put_tensors(before, learner.network)
    asked = asking * learner.steps_per_epoch
    kept_seconds = again.each * (learner.steps - asked) if again is not None else 0.0
    return Forecast(
        stage=loop.stage,
        train_samples=len(loop.train),
        val_samples=loop.val.size if loop.val is not None else 0,
        epochs=epochs,
        steps_per_epoch=learner.steps_per_epoch,
        steps=learner.steps,
        lr=learner.lr,
        lr_test_seconds=test,
        timed_steps=len(steps.rest),
        seconds_per_step=steps.each,
        seconds_per_kept_step=again.each if again is not None else None,
        validation_seconds=validation,
        seconds=test + steps.total(asked) + kept_seconds + validation,
    )


def _begun(loop: "Loop") -> Iterator[None]:
    loop.begin()
    yield


def _timed_steps(loop: "Loop", epochs: int) -> Timing:
    loop.rewind()
    return timed(_first_steps(loop, epochs), wait=partial(_wait, loop))


def _first_steps(loop: "Loop", epochs: int) -> Iterator[None]:
    """The steps of the first epochs, without anything in between."""
    for epoch in range(epochs):
        loop.place.epoch, loop.place.step_in_epoch = epoch, 0
        yield from loop.steps()


def _timed_validation(loop: "Loop") -> float:
    """Seconds of the validations after all epochs, from a few batches of one."""
    if loop.val is None:
        return 0.0
    network, size = loop.learner.result.eval(), loop.config.batch_size
    tally = Tally("the network", labelled=True)
    work = judged(network, loop.val, size, tally, workers=loop.training.workers, device=loop.world.device)
    timing = timed(work, warm_up=1, whole=loop.val.size is None, wait=partial(_wait, loop))
    batches = timing.count if loop.val.size is None else -(-loop.val.size // size)
    return timing.total(loop.config.epochs * batches)


def _wait(loop: "Loop") -> None:
    """Until the device has done what it was given."""
    if loop.world.device.startswith("cuda"):
        torch.cuda.synchronize(loop.world.device)
