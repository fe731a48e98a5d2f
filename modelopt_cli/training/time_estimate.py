"""Time estimate of a training, from a few of its own steps."""

from collections.abc import Iterator
from functools import partial

import torch

from modelopt_cli.measure.tally import Tally
from modelopt_cli.training.interfaces import TimeEstimate
from modelopt_cli.training.loop import Loop
from modelopt_cli.training.snapshot import copy_tensors, put_tensors
from modelopt_cli.training.timing import Timing, timed
from modelopt_cli.training.validate import judged


def estimate_time(loop: Loop, kept_after: int | None) -> TimeEstimate:
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
    return TimeEstimate(
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


def _begun(loop: Loop) -> Iterator[None]:
    loop.begin()
    yield


def _timed_steps(loop: Loop, epochs: int) -> Timing:
    loop.rewind()
    return timed(_first_steps(loop, epochs), wait=partial(_wait, loop))


def _first_steps(loop: Loop, epochs: int) -> Iterator[None]:
    """The steps of the first epochs, without anything in between."""
    for epoch in range(epochs):
        loop.place.epoch, loop.place.step_in_epoch = epoch, 0
        yield from loop.steps()


def _timed_validation(loop: Loop) -> float:
    """Seconds of the validations after all epochs, from a few batches of one."""
    if loop.val is None:
        return 0.0
    network, size = loop.learner.result.eval(), loop.config.batch_size
    tally = Tally("the network", loop.task, labelled=True)
    work = judged(network, loop.val, size, tally, workers=loop.training.workers, device=loop.world.device)
    timing = timed(work, warm_up=1, all_of_it=loop.val.size is None, wait=partial(_wait, loop))
    batches = timing.count if loop.val.size is None else -(-loop.val.size // size)
    return timing.total(loop.config.epochs * batches)


def _wait(loop: Loop) -> None:
    """Until the device has done what it was given."""
    if loop.world.device.startswith("cuda"):
        torch.cuda.synchronize(loop.world.device)
