"""The training loop of every method: ``fit``.

An epoch is: its steps, the validation, a line in the log, a saved state. What is random in a step depends on
the seed and the step's number alone, so nothing but the state below is needed to go on after an interruption
as if there had been none.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_cli.errors import InputError, ModeloptError, UsageError
from modelopt_cli.training import mixup
from modelopt_cli.training.config import Companion, Objective, Trained, Training
from modelopt_cli.training.distributed import World, world
from modelopt_cli.training.ema import MovingAverage
from modelopt_cli.training.interrupt import Signals
from modelopt_cli.training.loader import Batch, steps_per_epoch, training_batches
from modelopt_cli.training.meter import LossMeter
from modelopt_cli.training.objectives import objective as objective_of
from modelopt_cli.training.optim import make_optimizer, set_rate
from modelopt_cli.training.prepare import Prepared, prepared
from modelopt_cli.training.schedule import learning_rate
from modelopt_cli.training.snapshot import Place, copy_tensors, restore, snapshot, tensors_of
from modelopt_cli.training.split import samples
from modelopt_cli.training.synced import synced_batch_norm
from modelopt_cli.training.validate import percent

_REPORT_EVERY = 0.1
"""Seconds between calls of the progress callback."""
_LOOK_EVERY = {"alone on cpu": 1, "alone": 50, "together": 8}
"""Steps between looks at the loss and, where there are several processes, at who was told to stop: waiting
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
) -> Trained:
    """Train ``network`` in place.

    It ends with the weights of the epoch with the best validation accuracy, or of the last one where nothing
    is validated; of the moving average, if there is one. It is then in evaluation mode, contiguous, on the
    device it came from, and its parameters are the same objects. Those without ``requires_grad`` stay.

    Where ``training.run`` holds the state of this stage, training goes on from there, to the same bytes.
    What ends it between two steps (Ctrl-C and SIGTERM wait for a step's end) saves the state first.

    Args:
        network: takes a float tensor ``(N, *shape)`` and returns ``(N, classes)`` logits, also in training.
        training: data, settings and surroundings.
        seed: of everything random.
        stage: what the run, the log and the progress call this training.
        objective: what to minimise; by default what ``training.config`` says, without a teacher.
        companions: take part in every step.
        choose_from: share of the steps before which no weights count as the best ones, and no patience is
            lost: until a mask has closed, say.

    Raises:
        UsageError: settings that contradict each other, a network without weights that learn, a loss that is
            not finite.
        DataError: samples that are unlabelled, unreadable or not for this network.
        InputError: the network is no classifier.
    """
    begun = time.monotonic()
    if training.config.patience and training.val is None and not training.config.val_fraction:
        raise UsageError(
            "needs samples to validate on", where="--patience", hint="give --val or --val-fraction"
        )
    objective = objective or objective_of(training.config)
    together = world(training.device)
    with prepared(network, training.train.input.shape, together.device) as found, Signals() as signals:
        loop = _Loop(network, training, seed, stage, objective, companions, together, found, signals)
        loop.choose_from = choose_from * loop.steps
        loop.run()
    place = loop.place
    return Trained(
        place.epoch, place.step, place.best, place.best_epoch, place.loss, time.monotonic() - begun
    )


class _Loop:
    """One training. ``settled`` is whether the state is that after ``place.step`` whole steps."""

    def __init__(
        self,
        network: nn.Module,
        training: Training,
        seed: int,
        stage: str,
        objective: Objective,
        companions: Sequence[Companion],
        world: World,
        found: Prepared,
        signals: Signals,
    ) -> None:
        self.network, self.training, self.config = network, training, training.config
        self.seed, self.stage, self.objective, self.companions = seed, stage, objective, companions
        self.world, self.signals, self.classes = world, signals, found.classes
        self.train, val = samples(training.train, training.val, self.config.val_fraction, found.classes)
        self.validated = val is not None
        self.val = world.shard(val) if val is not None else None
        self.steps_per_epoch = steps_per_epoch(self.train, self.config.batch_size)
        self.steps = self.config.epochs * self.steps_per_epoch
        world.broadcast(network)
        self.optimizer = make_optimizer(network, self.config)
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.average = MovingAverage(network, self.config.ema) if self.config.ema else None
        self.meter = LossMeter()
        self.place = Place()
        self.best: dict[str, Tensor] = {}
        self.choose_from = 0.0
        self.settled = False
        alone = "alone on cpu" if world.device == "cpu" else "alone"
        self.look_every = _LOOK_EVERY[alone if world.size == 1 else "together"]
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
        self._report(self.steps)
        self._keep_chosen()

    def _epoch(self) -> None:
        self.network.train()
        self.settled = True
        batches = training_batches(
            self.train,
            batch_size=self.config.batch_size,
            epoch=self.place.epoch,
            seed=self.seed,
            augment=self.config.augment,
            workers=self.training.workers,
            world=self.world,
            start_step=self.place.step_in_epoch,
        )
        for batch in batches:
            with self.signals.held():
                self._step(batch)
            self._report(self.place.step)
        with self.signals.held():
            self._look()
        accuracy = self._validate()
        with self.signals.held():
            self._close_epoch(accuracy)

    def _step(self, batch: Batch) -> None:
        step, self.settled = self.place.step, False
        set_rate(self.optimizer, self._rate(step))
        for companion in self.companions:
            companion.before_step(self.network, step, self.steps)
        images, targets = self._inputs(batch, step)
        self._seed(step)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(images, targets, batch)
        (loss if self.world.size == 1 else loss * batch.weight).backward()
        self.world.sum_gradients(self.parameters)
        if self.config.clip:
            nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        self.optimizer.step()
        self._followed(self.network, step)
        if self.average is not None:
            self.average.update(step)
            self._followed(self.average.network, step)
        self.meter.add(loss, batch.size, step)
        self.place.step += 1
        self.place.step_in_epoch += 1
        if self.place.step % self.look_every == 0:
            self._look()
        self.settled = True
        if self.config.save_every and self.place.step % self.config.save_every == 0:
            self._save()

    def _rate(self, step: int) -> float:
        return learning_rate(self.config, step, self.steps, self.steps_per_epoch)

    def _followed(self, network: nn.Module, step: int) -> None:
        for companion in self.companions:
            companion.after_step(network, step, self.steps)

    def _inputs(self, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        images = batch.images.to(self.world.device, non_blocking=True)
        labels = batch.labels.to(self.world.device, non_blocking=True)
        if not self.config.mixup:
            return images, labels
        # Partners may be with another process: mix the whole batch, and keep this process's part.
        images, labels = (self.world.gather(t[: batch.size]) for t in (images, labels))
        share, partner = mixup.draw(self.config.mixup, len(labels), self.seed, step)
        images, targets = mixup.mix(images, labels, self.classes, share, partner)
        own = self.world.part(len(labels)) if batch.size else slice(0, 1)
        return images[own], targets[own]

    def _loss(self, images: Tensor, targets: Tensor, batch: Batch) -> Tensor:
        with synced_batch_norm(self.world, counts=batch.weight > 0), self._autocast():
            logits = self.network(images)
            if not isinstance(logits, Tensor):
                raise InputError(
                    f"returns a {type(logits).__name__} in training, not logits",
                    where="the network",
                    hint="wrap it in a module that returns the logits",
                )
            return self.objective(logits.float(), targets, images)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if not self.config.amp:
            return contextlib.nullcontext()
        return torch.autocast(self.world.device.partition(":")[0], torch.bfloat16)

    def _seed(self, step: int) -> None:
        """Dropout and the like draw the same numbers in a step, whatever came before it."""
        text = f"{self.seed} {step} {self.world.rank}".encode()
        number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
        torch.default_generator.manual_seed(number)
        if self.world.device.startswith("cuda"):
            torch.cuda.manual_seed(number)

    def _look(self) -> None:
        """Refuse losses that are not finite, and agree on whether to stop."""
        bad = self.meter.take_in()
        stop, broken = self.world.sum(self.signals.waiting, bad is not None)
        if broken:
            self.settled = False
            raise self._diverged(bad if bad is not None else self.place.step - 1)
        if self.world.size > 1 and stop:
            self.settled = True
            self.signals.release()
            raise KeyboardInterrupt

    def _diverged(self, step: int) -> ModeloptError:
        return UsageError(
            f"the loss is not a finite number at step {step + 1} of {self.steps}",
            where=self.stage,
            hint="lower --lr, or limit the gradient with --clip",
        )

    @property
    def _chosen(self) -> nn.Module:
        """The network whose weights are validated and kept."""
        return self.average.network if self.average is not None else self.network

    def _validate(self) -> float | None:
        if not self.validated:
            return None
        config, workers = self.config, self.training.workers
        return percent(self._chosen, self.val, config.batch_size, workers=workers, world=self.world)

    def _close_epoch(self, accuracy: float | None) -> None:
        self.settled = False
        place = self.place
        place.loss = self._mean_loss()
        place.epoch += 1
        place.step_in_epoch = 0
        if accuracy is not None and place.step >= self.choose_from:
            if place.best is None or accuracy > place.best:
                place.best, place.best_epoch, place.stale = accuracy, place.epoch, 0
                self.best = copy_tensors(self._chosen)
            else:
                place.stale += 1
        out_of_patience = 0 < self.config.patience <= place.stale
        place.done = out_of_patience or place.epoch == self.config.epochs
        self._check_weights()
        self._log(accuracy)
        self.meter.clear()
        self.settled = True
        self._save()

    def _mean_loss(self) -> float:
        total, count = self.world.sum(self.meter.total, self.meter.samples)
        return total / count

    def _check_weights(self) -> None:
        if not all(bool(torch.isfinite(p).all()) for p in self.parameters):
            raise self._diverged(self.place.step - 1)

    def _log(self, accuracy: float | None) -> None:
        if self.training.run is not None:
            rate = self._rate(self.place.step - 1)
            figures = {"loss": self.place.loss, "lr": rate, "val_top1": accuracy}
            self.training.run.log.add(self.stage, self.place.epoch, self.place.step, **figures)

    def _report(self, done: int) -> None:
        progress: Callable[[str, int, int | None], None] | None = self.training.progress
        if progress is None or not self.world.main:
            return
        now = time.monotonic()
        if done == self.steps or now - self.reported >= _REPORT_EVERY:
            self.reported = now
            progress(self.stage, done, self.steps)

    def _keep_chosen(self) -> None:
        kept = self.best or (tensors_of(self.average.network) if self.average is not None else {})
        with torch.no_grad():
            for name, tensor in tensors_of(self.network).items():
                if kept:
                    tensor.copy_(kept[name])

    def _save(self) -> None:
        if self.training.run is not None and self.meter.take_in() is None:
            self.training.run.save(self.stage, snapshot(self))

    def _save_before_leaving(self) -> None:
        """Without hiding what ends the training, should that fail too."""
        if self.settled and self.place.step:
            with contextlib.suppress(OSError, ModeloptError), self.signals.held():
                self._save()

    def _resume(self) -> None:
        run = self.training.run
        state = run.load(self.stage) if run is not None else None
        if state is not None:
            restore(self, state)
        if run is not None:
            run.log.rewind(self.stage, self.place.epoch)
