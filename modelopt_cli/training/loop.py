"""The training loop of every method.

An epoch is: its steps, the validation, a line in the log, a saved state. Nothing but that state is needed to
go on after an interruption as if there had been none.
"""

import contextlib
import time
from collections.abc import Iterator

from torch import Tensor

from modelopt_cli.data import Data
from modelopt_cli.errors import ModeloptError
from modelopt_cli.measure.metrics import metrics_of
from modelopt_cli.training.distributed import World
from modelopt_cli.training.interfaces import Training
from modelopt_cli.training.interrupt import Signals
from modelopt_cli.training.learner import Learner
from modelopt_cli.training.loader import Batch, training_batches
from modelopt_cli.training.rates import needs_test, tested_rate
from modelopt_cli.training.recovery import MOST, WINDOW, Diverged, Recovery
from modelopt_cli.training.snapshot import Place, copy_tensors, put_tensors, snapshot, tensors_of
from modelopt_cli.training.validate import main_metric, percent

_REPORT_EVERY = 0.1
"""Seconds between calls of the progress callback."""
_LOOK_EVERY = {"alone on cpu": 1, "alone": 50, "together": 8}
"""Steps between looks at the losses and, where there are several processes, at who was told to stop: waiting
for the device or for each other costs time."""


class Loop:
    """One training. ``consistent`` is True while the state is that after ``place.step`` complete steps."""

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
        self.task = training.task
        self.metric = next(iter(metrics_of(self.task).values()))
        # Samples that are right or wrong are counted by all processes; other metrics need all samples.
        shared = self.task.row.predicted is not None
        self.val = self.world.shard(val) if val is not None and shared else val
        self.choose_from = choose_from * learner.steps
        alone = "alone on cpu" if self.world.device == "cpu" else "alone"
        self.look_every = _LOOK_EVERY[alone if self.world.size == 1 else "together"]
        self.place = Place()
        self.recovery = Recovery(learner, stage)
        self.best: dict[str, Tensor] = {}
        self.consistent = False
        self.reported = 0.0
        self.told_undefined = False

    def run(self) -> None:
        """Train to the end, from the start or from where the saved state left off."""
        try:
            # Several processes must stop after the same step: then _look passes signals on, and nobody else.
            with self.signals.held() if self.world.size > 1 else contextlib.nullcontext():
                if not self._resume():
                    self.begin()
                while not self.place.done:
                    self._epoch()
        except BaseException:
            self._save_before_leaving()
            raise
        self._report(self.learner.steps)
        if problem := self.recovery.still_high(self.place):
            self._note(problem)
        self._keep_best()

    def begin(self) -> None:
        """Choose the learning rate where nobody gave one, and take the present state for a good one."""
        learner = self.learner
        if needs_test(learner):
            learner.lr = tested_rate(learner, self._batches(epoch=0))
        if learner.lr < self.config.peak_lr:
            usual = f"{self.config.peak_lr:.3g}: in a short test the loss rose above that"
            self._note(f"the learning rate is {learner.lr:.3g} instead of {usual}")
        self.recovery.keep(self.place, self.best)

    def rewind(self) -> None:
        """Back to the first step, as far as samples are concerned; weights stay as they are."""
        self.place = Place()

    def steps(self) -> Iterator[None]:
        """The steps that are left of an epoch; each is taken when the next item is asked for.

        Where one diverges, those from the last good state on follow, with a smaller learning rate.
        """
        self.learner.network.train()
        while True:
            try:
                yield from self._rest_of_epoch()
                return
            except Diverged as error:
                with self.signals.held():
                    self._return(error)

    def _rest_of_epoch(self) -> Iterator[None]:
        self.consistent = True
        for batch in self._batches(self.place.epoch, self.place.step_in_epoch):
            with self.signals.held():
                self._step(batch)
            self._report(self.place.step)
            yield

    def _batches(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        return training_batches(
            self.train,
            batch_size=self.config.batch_size,
            epoch=epoch,
            seed=self.learner.seed,
            augment=self.config.augment,
            cycle=self.config.augmentation_cycle,
            workers=self.training.workers,
            world=self.world,
            start_step=start_step,
        )

    def _epoch(self) -> None:
        for _ in self.steps():
            pass
        accuracy = self._validate()
        with self.signals.held():
            self._close_epoch(accuracy)

    def _step(self, batch: Batch) -> None:
        self.consistent = False
        place, every = self.place, self.config.save_every
        self.learner.step(batch, place.step, self.learner.rate(place.step))
        place.step += 1
        place.step_in_epoch += 1
        saves = every > 0 and place.step % every == 0
        last = place.step_in_epoch == self.learner.steps_per_epoch
        judges = last or place.step_in_epoch % WINDOW == 0
        if saves or judges or place.step == 1 or place.step % self.look_every == 0:
            total, samples, stop = self._look()
            if place.start is None:
                place.start = total / samples
            if judges:
                self.recovery.judge(total, samples, place)
                if place.good and not last:  # what follows the last step belongs to it
                    self.recovery.keep(place, self.best)
            if stop:
                self.consistent = True
                self.signals.release()
                raise KeyboardInterrupt
        self.consistent = True
        if saves:
            self._save()

    def _look(self) -> tuple[float, int, bool]:
        """Refuse losses that are not finite, agree on when to stop, and hand the main process all losses.

        It alone saves a state, and others that are killed take with them what they have not handed over.

        Returns:
            the sum of the losses of this epoch's samples so far, their number, and True to stop.
        """
        meter = self.learner.meter
        bad = meter.take_in()
        stop, broken, total, samples = self.world.sum(
            self.signals.waiting, bad is not None, meter.total, meter.samples
        )
        meter.total, meter.samples = (total, int(samples)) if self.world.main else (0.0, 0)
        if broken:
            step = bad + 1 if bad is not None else self.place.step
            raise self.recovery.diverged("the loss is not a finite number", step)
        return total, int(samples), self.world.size > 1 and bool(stop)

    def _return(self, error: Diverged) -> None:
        """Go back to the last good state, unless that would not help."""
        if error.step == 1 or self.recovery.returns == MOST:
            raise error
        before, run = self.learner.lr, self.training.run
        self.place, self.best = self.recovery.back()
        if run is not None:
            run.log.rewind(self.stage, self.place.epoch)
        self._note(
            f"{error.message}; going back to step {self.place.step} with the learning rate "
            f"{self.learner.lr:.3g} instead of {before:.3g}"
        )

    def _validate(self) -> float | None:
        if not self.validated:
            return None
        size, workers = self.config.batch_size, self.training.workers
        if self.task.row.predicted is not None:
            return percent(self.learner.result, self.val, size, workers=workers, world=self.world)
        assert self.val is not None
        device = self.world.device
        value = main_metric(self.learner.result, self.val, size, self.task, workers=workers, device=device)
        if value is None and not self.told_undefined:
            self.told_undefined = True
            self._note(
                f"{self.metric.title} has no value on {self.val.name} after epoch {self.place.epoch + 1} "
                f"({self.metric.undefined}), so it chooses no weights there"
            )
        return value

    def _close_epoch(self, accuracy: float | None) -> None:
        self.consistent = False
        place, meter = self.place, self.learner.meter
        total, samples = self.world.sum(meter.total, meter.samples)
        meter.clear()
        place.loss = total / samples
        place.epoch += 1
        place.step_in_epoch = place.judged_samples = 0
        place.judged = 0.0
        if accuracy is not None:
            self._choose(accuracy)
        place.done = place.epoch == self.config.epochs or 0 < self.config.patience <= place.stale
        self._log(accuracy)
        if place.good:
            self.recovery.keep(place, self.best)
        self.consistent = True
        self._save()

    def _choose(self, accuracy: float) -> None:
        place = self.place
        if place.step <= self.choose_from and place.step < self.learner.steps:
            return
        sign = 1 if self.metric.higher_is_better else -1
        if place.best is None or sign * accuracy > sign * place.best:
            place.best, place.best_epoch, place.stale = accuracy, place.epoch, 0
            self.best = copy_tensors(self.learner.result)
        else:
            place.stale += 1

    def _log(self, accuracy: float | None) -> None:
        if self.training.run is not None:
            place, rate = self.place, self.learner.rate(self.place.step - 1)
            name = f"val_{next(iter(metrics_of(self.task)))}"
            figures = {"loss": place.loss, "lr": rate, name: accuracy, "returns": self.recovery.returns}
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
            state = snapshot(self.learner, self.place, self.best)
            run.save(self.stage, self.recovery.into(state, self.place))

    def _save_before_leaving(self) -> None:
        """Without hiding what ends the training, should that fail too."""
        if self.consistent and self.place.step:
            with contextlib.suppress(OSError, ModeloptError), self.signals.held():
                self._save()

    def _resume(self) -> bool:
        """Take up the saved state, if there is one."""
        run = self.training.run
        state = run.load(self.stage) if run is not None else None
        if state is not None:
            self.place, self.best = self.recovery.restore(state)
        if run is not None:
            run.log.rewind(self.stage, self.place.epoch)
        return state is not None

    def _note(self, text: str) -> None:
        if self.training.note is not None and self.world.main:
            self.training.note(f"{self.stage}: {text}")
