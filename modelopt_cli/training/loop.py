"""The training loop of every method: ``fit``.

An epoch is: its steps, the validation, a line in the log, a saved state. Nothing but that state is needed to
go on after an interruption as if there had been none.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from modelopt_cli.data import Data
from modelopt_cli.errors import ModeloptError, UsageError
from modelopt_cli.training.config import Companion, Objective, Trained, Training
from modelopt_cli.training.distributed import World, world
from modelopt_cli.training.forecast import forecast
from modelopt_cli.training.interrupt import Signals
from modelopt_cli.training.learner import Learner
from modelopt_cli.training.loader import Batch, steps_per_epoch, training_batches
from modelopt_cli.training.objectives import objective as objective_of
from modelopt_cli.training.prepare import prepared
from modelopt_cli.training.snapshot import Place, copy_tensors, put_tensors, restore, snapshot, tensors_of
from modelopt_cli.training.split import samples
from modelopt_cli.training.validate import percent

_REPORT_EVERY = 0.1
"""Seconds between calls of the progress callback."""
_LOOK_EVERY = {"alone on cpu": 1, "alone": 50, "together": 8}
"""Steps between looks at the losses and, where there are several processes, at who was told to stop: waiting
for the device or for each other costs time."""


def fit(
    network: nn.Module,
    training: Training,
    *,
    seed: int,
    stage: str = "train",
    objective: Objective | None = None,
    companions: Sequence[Companion] = (),
    choose_from: float = 0.0,
    kept_after: int | None = None,
) -> Trained:
    """Train ``network`` in place.

    It ends with the weights of the epoch with the best validation accuracy, or of the last one where nothing
    is validated; of the moving average, if there is one. It is then in evaluation mode, contiguous, on the
    device it came from, and its parameters are the same objects. Those without ``requires_grad`` stay.

    Where ``training.run`` holds the state of this stage, training goes on from there, to the same bytes.
    What ends it between two steps (Ctrl-C and SIGTERM wait for a step's end) saves the state first.

    Where ``training.forecasts`` is a list, a few steps are timed and one forecast is added to it. Then the
    network's tensors are what they were, nothing is saved, and what is returned says of no epoch and no step.

    Args:
        network: takes a float tensor ``(N, *shape)`` and returns ``(N, classes)`` logits, also in training.
        training: data, settings and surroundings.
        seed: of everything random.
        stage: what the run, the log and the progress call this training.
        objective: what to minimise; by default what ``training.config`` says, without a teacher.
        companions: take part in every step.
        choose_from: share of the steps before whose end no weights count as the best ones, and no patience is
            lost: until a mask has closed, say. The last epoch always counts.
        kept_after: epochs after which the objective has kept what it needs to know of every sample, and
            costs less; None where it keeps nothing. It decides what is forecast, and nothing else.

    Raises:
        UsageError: settings that contradict each other, a network without weights that learn, a loss that is
            not finite.
        DataError: samples that are unlabelled, unreadable or not for this network.
        InputError: the network is no classifier.
    """
    begun = time.monotonic()
    config = training.config
    if config.patience and training.val is None and not config.val_fraction:
        hint = "give --val or --val-fraction"
        raise UsageError("needs samples to validate on", where="--patience", hint=hint)
    objective = objective or objective_of(config)
    together = world(training.device)
    input = training.train.input
    with (
        prepared(network, input.shape, together.device, input.dtype) as found,
        Signals() as signals,
    ):
        train, val = samples(training.train, training.val, config.val_fraction, found.classes)
        for module in (network, objective):
            if isinstance(module, nn.Module):
                together.broadcast(module)
        learner = Learner(
            network,
            config,
            objective,
            companions,
            together,
            classes=found.classes,
            seed=seed,
            steps_per_epoch=steps_per_epoch(train, config.batch_size),
        )
        loop = Loop(learner, training, train, val, stage, choose_from, signals)
        if training.forecasts is None:
            loop.run()
        else:
            training.forecasts.append(forecast(loop, kept_after))
    place = loop.place
    return Trained(
        place.epoch, place.step, place.best, place.best_epoch, place.loss, time.monotonic() - begun
    )


class Loop:
    """One training. ``settled`` is whether the state is that after ``place.step`` whole steps."""

    def __init__(
        self,
        learner: Learner,
        training: Training,
        train: Data,
        val: Data | None,
        stage: str,
        choose_from: float,
        signals: Signals,
    ) -> None:
        self.learner, self.training, self.config = learner, training, training.config
        self.world: World = learner.world
        self.train, self.stage, self.signals = train, stage, signals
        self.validated = val is not None
        self.val = self.world.shard(val) if val is not None else None
        self.choose_from = choose_from * learner.steps
        alone = "alone on cpu" if self.world.device == "cpu" else "alone"
        self.look_every = _LOOK_EVERY[alone if self.world.size == 1 else "together"]
        self.place = Place()
        self.best: dict[str, Tensor] = {}
        self.settled = False
        self.reported = 0.0

    def run(self) -> None:
        """Train to the end, from the start or from where the saved state left off."""
        self._resume()
        try:
            # Several processes must stop after the same step: then _look passes signals on, and nobody else.
            with self.signals.held() if self.world.size > 1 else contextlib.nullcontext():
                while not self.place.done:
                    self._epoch()
        except BaseException:
            self._save_before_leaving()
            raise
        self._report(self.learner.steps)
        self._keep_best()

    def rewind(self) -> None:
        """Back to the first step, as far as samples are concerned; weights stay as they are."""
        self.place = Place()

    def steps(self) -> Iterator[None]:
        """The steps that are left of an epoch; each is taken when the next item is asked for."""
        self.learner.network.train()
        self.settled = True
        batches = training_batches(
            self.train,
            batch_size=self.config.batch_size,
            epoch=self.place.epoch,
            seed=self.learner.seed,
            augment=self.config.augment,
            views=self.config.views,
            workers=self.training.workers,
            world=self.world,
            start_step=self.place.step_in_epoch,
        )
        for batch in batches:
            with self.signals.held():
                self._step(batch)
            self._report(self.place.step)
            yield

    def _epoch(self) -> None:
        for _ in self.steps():
            pass
        with self.signals.held():
            self._look()
        accuracy = self._validate()
        with self.signals.held():
            self._close_epoch(accuracy)

    def _step(self, batch: Batch) -> None:
        self.settled = False
        self.learner.step(batch, self.place.step)
        self.place.step += 1
        self.place.step_in_epoch += 1
        saves = self.config.save_every > 0 and self.place.step % self.config.save_every == 0
        if saves or self.place.step % self.look_every == 0:
            self._look()
        self.settled = True
        if saves:
            self._save()

    def _look(self) -> None:
        """Refuse losses that are not finite, agree on whether to stop, and hand the main process all losses.

        It alone saves a state, and others that are killed take with them what they have not handed over.
        """
        meter = self.learner.meter
        bad = meter.take_in()
        stop, broken, total, samples = self.world.sum(
            self.signals.waiting, bad is not None, meter.total, meter.samples
        )
        meter.total, meter.samples = (total, int(samples)) if self.world.main else (0.0, 0)
        if broken:
            self.settled = False
            raise self._diverged(bad if bad is not None else self.place.step - 1)
        if self.world.size > 1 and stop:
            self.settled = True
            self.signals.release()
            raise KeyboardInterrupt

    def _diverged(self, step: int) -> ModeloptError:
        return UsageError(
            f"the loss is not a finite number at step {step + 1} of {self.learner.steps}",
            where=self.stage,
            hint="lower --lr, or limit the gradient with --clip",
        )

    def _validate(self) -> float | None:
        if not self.validated:
            return None
        size, workers = self.config.batch_size, self.training.workers
        return percent(self.learner.result, self.val, size, workers=workers, world=self.world)

    def _close_epoch(self, accuracy: float | None) -> None:
        self.settled = False
        if not all(bool(torch.isfinite(p).all()) for p in self.learner.parameters):
            raise self._diverged(self.place.step - 1)
        place, meter = self.place, self.learner.meter
        total, seen = self.world.sum(meter.total, meter.samples)
        meter.clear()
        place.loss = total / seen
        place.epoch += 1
        place.step_in_epoch = 0
        if accuracy is not None:
            self._judge(accuracy)
        place.done = place.epoch == self.config.epochs or 0 < self.config.patience <= place.stale
        self._log(accuracy)
        self.settled = True
        self._save()

    def _judge(self, accuracy: float) -> None:
        place = self.place
        if place.step <= self.choose_from and place.step < self.learner.steps:
            return
        if place.best is None or accuracy > place.best:
            place.best, place.best_epoch, place.stale = accuracy, place.epoch, 0
            self.best = copy_tensors(self.learner.result)
        else:
            place.stale += 1

    def _log(self, accuracy: float | None) -> None:
        if self.training.run is not None:
            place, rate = self.place, self.learner.rate(self.place.step - 1)
            figures = {"loss": place.loss, "lr": rate, "val_top1": accuracy}
            self.training.run.log.add(self.stage, place.epoch, place.step, **figures)

    def _report(self, done: int) -> None:
        if self.training.progress is None or not self.world.main:
            return
        now = time.monotonic()
        if done == self.learner.steps or now - self.reported >= _REPORT_EVERY:
            self.reported = now
            self.training.progress(self.stage, done, self.learner.steps)

    def _keep_best(self) -> None:
        put_tensors(self.best or tensors_of(self.learner.result), self.learner.network)

    def _save(self) -> None:
        run = self.training.run
        if run is not None and self.learner.meter.take_in() is None:
            run.save(self.stage, snapshot(self.learner, self.place, self.best))

    def _save_before_leaving(self) -> None:
        """Without hiding what ends the training, should that fail too."""
        if self.settled and self.place.step:
            with contextlib.suppress(OSError, ModeloptError), self.signals.held():
                self._save()

    def _resume(self) -> None:
        run = self.training.run
        state = run.load(self.stage) if run is not None else None
        if state is not None:
            self.place, self.best = restore(self.learner, state)
        if run is not None:
            run.log.rewind(self.stage, self.place.epoch)
