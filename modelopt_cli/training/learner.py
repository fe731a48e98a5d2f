"""Step of a training: forward and backward pass, optimizer, callbacks, moving average."""

import contextlib
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_cli.data.targets import targets_to
from modelopt_cli.errors import InputError, UsageError, a_or_an
from modelopt_cli.measure.accuracy import failing_in_one_line, naming_samples
from modelopt_cli.program.input_batch import call, clone, each_of, select
from modelopt_cli.settings import option
from modelopt_cli.tasks import CLASSIFY, TaskSpec
from modelopt_cli.training.autograd_errors import refusals_in_one_line
from modelopt_cli.training.catalog import LOSSES
from modelopt_cli.training.config import TrainConfig
from modelopt_cli.training.distributed import World
from modelopt_cli.training.ema import MovingAverage
from modelopt_cli.training.interfaces import Callback, Objective, StepInputs
from modelopt_cli.training.loader import Batch
from modelopt_cli.training.meter import LossMeter
from modelopt_cli.training.mixup import draw_mixup, mix
from modelopt_cli.training.objectives import guesses
from modelopt_cli.training.optim import learning_rate, make_optimizer, set_rate
from modelopt_cli.training.synced import synced_batch_norm


class Learner:
    """A network and what changes it from step to step.

    What is random in a step depends on the seed and on the step's number alone.

    Attributes:
        network: that is trained.
        learning: the network and, where it learns too, the objective.
        parameters: of these, those that learn.
        optimizer: over them.
        lr: the largest learning rate; it is lowered where training diverges.
        average: moving average of the weights, or None.
        callbacks: take part in every step.
        meter: the losses of the epoch.
        classes: number of logits; None where there are none.
        task: what the network is for.
        sole_output: True if it returns one tensor in evaluation.
        sample_name: gives the name of a sample, for errors, from its index in the data; or None.
        seed: of everything random.
        steps: of the training.
        steps_per_epoch: of them.
    """

    def __init__(
        self,
        network: nn.Module,
        config: TrainConfig,
        objective: Objective,
        callbacks: Sequence[Callback],
        world: World,
        *,
        classes: int | None,
        seed: int,
        steps_per_epoch: int,
        task: TaskSpec = CLASSIFY,
        sole_output: bool = False,
        sample_name: Callable[[int], str] | None = None,
    ) -> None:
        self.task, self.sole_output, self.sample_name = task, sole_output, sample_name
        self.network, self.config, self.objective = network, config, objective
        self.callbacks, self.world = callbacks, world
        self.classes, self.seed = classes, seed
        self.steps_per_epoch = steps_per_epoch
        self.steps = config.epochs * steps_per_epoch
        self.learning = nn.ModuleList([network])
        if isinstance(objective, nn.Module):
            self.learning.append(objective.to(world.device).train())
        self.parameters = [p for p in self.learning.parameters() if p.requires_grad]
        self.lr = config.peak_lr
        self.optimizer = make_optimizer(self.learning, config)
        self.average = MovingAverage(network, config.ema) if config.ema else None
        self.meter = LossMeter()

    @property
    def result(self) -> nn.Module:
        """The network whose weights are validated and kept."""
        return self.average.network if self.average is not None else self.network

    @property
    def guessing(self) -> float:
        """The cross-entropy of equal probabilities for all classes, in nats; 0 where the loss is none."""
        return math.log(self.classes) if self.classes is not None and guesses(self.task) else 0.0

    def rate(self, step: int) -> float:
        """The learning rate of ``step``."""
        return learning_rate(self.config, self.lr, step, self.steps, self.steps_per_epoch)

    def step(self, batch: Batch, step: int, rate: float) -> None:
        """Learn from one batch at a learning rate. What fails in here leaves the step half done."""
        set_rate(self.optimizer, rate)
        for callback in self.callbacks:
            callback.before_step(self.network, step, self.steps)
        inputs, targets = self._inputs(batch, step)
        self._reseed(step)
        for parameter in self.parameters:
            parameter.grad = None
        loss = self._loss(inputs, targets, batch)
        with refusals_in_one_line(self.network):
            (loss if self.world.size == 1 else loss * batch.weight).backward()
        self.world.sum_gradients(self.parameters)
        if self.config.clip:
            nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        self.optimizer.step()
        self._lead(self.network, step)
        if self.average is not None:
            self.average.update(step)
            self._lead(self.average.network, step)
        self.meter.add(loss, batch.size, step)

    def _lead(self, network: nn.Module, step: int) -> None:
        for callback in self.callbacks:
            callback.after_step(network, step, self.steps)

    def _inputs(self, batch: Batch, step: int) -> tuple[StepInputs, Any]:
        inputs = each_of(batch.inputs, lambda tensor: tensor.to(self.world.device, non_blocking=True))
        labels = targets_to(batch.labels, self.world.device)
        if not self.config.mixup:
            return StepInputs(inputs, batch.samples, batch.variant), labels
        if self.classes is None or not isinstance(labels, Tensor) or self.task.row.predicted is None:
            hint = f"leave out {option('mixup')}"
            raise UsageError("mixes classes, and these targets are none", where=option("mixup"), hint=hint)
        # Partners may be with another process: mix the global batch, and keep this process's part.
        inputs = each_of(inputs, lambda tensor: self.world.gather(tensor[: batch.size]))
        labels = self.world.gather(labels[: batch.size])
        share, partner = draw_mixup(self.config.mixup, len(labels), self.seed, step)
        inputs, targets = mix(inputs, labels, self.classes, share, partner)
        own = self.world.part(len(labels)) if batch.size else slice(0, 1)
        return StepInputs(select(inputs, own), None, batch.variant), targets[own]

    def _loss(self, inputs: StepInputs, targets: Any, batch: Batch) -> Tensor:
        name = self.task.loss
        given = None if name is None else LOSSES[name].given
        judges_itself = given is not None
        with synced_batch_norm(self.world, counts=batch.weight > 0), self._autocast():
            with failing_in_one_line(inputs.batch, "the network"), refusals_in_one_line(self.network):
                own = clone(inputs.batch)  # it may change them; a teacher sees them, too
                logits = self.network(own, given(targets)) if given is not None else call(self.network, own)
            learned = logits if judges_itself else self.task.find(logits)
            changed = self.sole_output and not isinstance(logits, Tensor)
            if judges_itself or not (changed or isinstance(learned, Tensor) or self.task.row.outputs):
                return self._judged(learned, targets, inputs)
            if changed or not isinstance(learned, Tensor):
                raise InputError(
                    f"returns {a_or_an(type(logits).__name__)} in training, not logits",
                    where="the network",
                    hint="wrap it in a module that returns the logits",
                )
            return self._judged(learned.float(), targets, inputs)

    def _judged(self, learned: Any, targets: Any, inputs: StepInputs) -> Tensor:
        name, indices = self.sample_name, inputs.samples
        of_place = None if name is None or indices is None else lambda place: name(int(indices[place]))
        with naming_samples("the network", name=of_place):
            return self.objective(learned, targets, inputs)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if not self.config.amp:
            return contextlib.nullcontext()
        return torch.autocast(self.world.device.partition(":")[0], torch.bfloat16)

    def _reseed(self, step: int) -> None:
        """Dropout and the like draw the same numbers in a step, whatever came before it."""
        text = f"{self.seed} {step} {self.world.rank}".encode()
        number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
        torch.default_generator.manual_seed(number)
        if self.world.device.startswith("cuda"):
            torch.cuda.manual_seed(number)
