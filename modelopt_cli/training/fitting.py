"""Training for every method: ``fit``."""

import time
from collections.abc import Sequence

from torch import nn

from modelopt_cli.errors import UsageError
from modelopt_cli.settings import option
from modelopt_cli.training.distributed import world
from modelopt_cli.training.interfaces import Callback, Objective, Trained, Training
from modelopt_cli.training.interrupt import Signals
from modelopt_cli.training.learner import Learner
from modelopt_cli.training.loader import steps_per_epoch
from modelopt_cli.training.loop import Loop
from modelopt_cli.training.objectives import objective as objective_of
from modelopt_cli.training.prepare import prepared
from modelopt_cli.training.split import samples
from modelopt_cli.training.time_estimate import estimate_time


def fit(
    network: nn.Module,
    training: Training,
    *,
    seed: int,
    stage: str = "train",
    objective: Objective | None = None,
    callbacks: Sequence[Callback] = (),
    choose_from: float = 0.0,
    kept_after: int | None = None,
) -> Trained:
    """Train ``network`` in place.

    It ends with the weights of the epoch with the best validation accuracy, or of the last one where nothing
    is validated; of the moving average, if there is one. It is then in evaluation mode, contiguous, on the
    device it came from, and its parameters are the same objects. Those without ``requires_grad`` stay.

    Where ``training.run`` holds the state of this stage, training goes on from there, to the same bytes.
    What ends it between two steps (Ctrl-C and SIGTERM wait for a step's end) saves the state first.

    Where the loss or a weight is not finite, or the loss is far above its start, training returns to the last
    good state with a smaller learning rate and says so through ``training.note``. It gives up after a few
    times.

    Where ``training.estimates`` is a list, a few steps are timed and one estimate is added to it. Then the
    network's tensors are what they were, nothing is saved, and what is returned says of no epoch and no step.

    Args:
        network: takes a float tensor ``(N, *shape)`` and returns ``(N, classes)`` logits, also in training.
        training: data, settings and run.
        seed: of everything random.
        stage: what the run, the log and the progress call this training.
        objective: what to minimise; by default what ``training.config`` says, without a teacher.
        callbacks: take part in every step.
        choose_from: share of the steps before whose end no weights count as the best ones, and no patience is
            lost: until a mask has closed, say. The last epoch always counts.
        kept_after: epochs after which the objective has kept what it needs to know of every sample, and
            costs less; None where it keeps nothing. Only the time estimate depends on it.

    Raises:
        UsageError: settings that contradict each other, a network without weights that learn, a loss that is
            not finite with any rate that was tried.
        DataError: samples that are unlabelled, unreadable or not for this network.
        InputError: the network is no classifier.
    """
    begun = time.monotonic()
    config = training.config
    if config.patience and training.val is None and not config.val_fraction:
        hint = f"give {option('val')} or {option('val_fraction')}"
        raise UsageError("needs samples to validate on", where=option("patience"), hint=hint)
    objective = objective or objective_of(config, task=training.task)
    together = world(training.device)
    input_spec = training.train.input
    with (
        prepared(network, input_spec, together.device, training.task) as properties,
        Signals() as signals,
    ):
        train, val = samples(training.train, training.val, config.val_fraction, properties.classes)
        for module in (network, objective):
            if isinstance(module, nn.Module):
                together.broadcast(module)
        learner = Learner(
            network,
            config,
            objective,
            callbacks,
            together,
            classes=properties.classes,
            seed=seed,
            steps_per_epoch=steps_per_epoch(train, config.batch_size),
            task=training.task,
            sole_output=properties.sole_output,
            sample_name=train.where,
        )
        loop = Loop(learner, training, train, val, stage, choose_from, signals)
        if training.estimates is None:
            loop.run()
        else:
            training.estimates.append(estimate_time(loop, kept_after))
    place = loop.place
    return Trained(
        epochs=place.epoch,
        steps=place.step,
        best=place.best,
        best_epoch=place.best_epoch,
        start=place.start or 0.0,
        loss=place.loss,
        seconds=time.monotonic() - begun,
        lr=learner.lr,
        returns=loop.recovery.returns,
        unit=loop.metric.unit,
    )
