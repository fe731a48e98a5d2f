"""Losses that training minimises: with labels, and with a teacher."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelopt_cli.errors import InputError, UsageError
from modelopt_cli.program.input_batch import call, tensors_of
from modelopt_cli.settings import option
from modelopt_cli.tasks import CLASSIFY, TaskSpec
from modelopt_cli.tasks.own import called
from modelopt_cli.tasks.task_output import form_of
from modelopt_cli.training.catalog import LOSSES, TEACHERS
from modelopt_cli.training.config import TrainConfig
from modelopt_cli.training.interfaces import Objective, StepInputs


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy with labels or, where samples are mixed, with probabilities.

    Attributes:
        label_smoothing: share ``s`` of the target that is spread evenly over the classes, so that a target
            ``q`` becomes ``(1 - s) q + s / classes`` (Szegedy et al., CVPR 2016).
    """

    label_smoothing: float = 0.0

    def __call__(self, logits: Tensor, targets: Tensor, inputs: StepInputs) -> Tensor:
        """The mean over the batch, in nats."""
        return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)


def cross_entropy(
    logits: Tensor, targets: Tensor, inputs: Any, *, label_smoothing: float = 0.0, **settings: Any
) -> Tensor:
    """The mean over the batch, as :class:`CrossEntropy` returns it."""
    return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)


@dataclass(frozen=True)
class TaskLoss:
    """The loss of a task with its targets.

    Attributes:
        task: says which output is learned, and by which row of ``catalog.LOSSES``.
        label_smoothing: as in :class:`CrossEntropy`; of use to cross-entropies alone.
    """

    task: TaskSpec
    label_smoothing: float = 0.0

    def __call__(self, logits: Any, targets: Any, inputs: StepInputs) -> Tensor:
        """The mean over the batch.

        Raises:
            InputError: outputs and targets are not those of the task, or the user's own loss fails.
            Misfit: a target does not go with the outputs.
        """
        name, own = self.task.loss, self.task.options
        if self.task.is_own:
            return _own_loss(self.task, logits, targets)
        assert name is not None
        try:
            settings = {"label_smoothing": self.label_smoothing, **own}
            loss: Tensor = LOSSES[name].function(logits, targets, inputs.batch, **settings)
        except (RuntimeError, ValueError, IndexError):
            self.task.row.judged(logits, targets, inputs.batch, **own)  # says it if they do not go together
            raise
        return loss


def _own_loss(task: TaskSpec, outputs: Any, targets: Any) -> Tensor:
    name = f"{task.text}.loss"
    loss = called(task.function.loss, name, outputs, targets)
    if not isinstance(loss, Tensor) or loss.dim():
        message = f"returned {form_of(loss)} where a loss is one number"
        raise InputError(message, where=name, hint="return a scalar tensor")
    return loss


def label_loss(task: TaskSpec, label_smoothing: float = 0.0) -> Objective:
    """The loss of a task with its targets.

    Raises:
        UsageError: it has none, or none whose labels could be smoothed.
    """
    if label_smoothing and (task.loss is None or not LOSSES[task.loss].smooths):
        raise UsageError(
            f"spreads labels over classes, and {task.text} is not learned by them",
            where=option("label_smoothing"),
            hint="leave it out",
        )
    if task.is_own and not hasattr(task.function, "loss"):
        hint = "give the function an attribute loss, itself a function of outputs and targets"
        raise UsageError(f"{task.text} has no loss to train by", where=option("task"), hint=hint)
    if task.row.predicted is not None:
        return CrossEntropy(label_smoothing)
    return TaskLoss(task, label_smoothing)


def loss_on_labels(label_smoothing: float = 0.0, task: TaskSpec = CLASSIFY) -> Objective:
    """The loss of a task with its targets, as distillation makes it; raises as :func:`label_loss`."""
    return label_loss(task, label_smoothing)


def guesses(task: TaskSpec) -> bool:
    """True if guessing has the logarithm of the number of classes for a loss."""
    return task.loss is not None and LOSSES[task.loss].guesses


def returns_losses(task: TaskSpec) -> bool:
    """True if a network itself computes the loss of a task, and returns that in training."""
    return task.loss is not None and LOSSES[task.loss].given is not None


class Distillation:
    """Weighted sum of the loss with labels and the divergence from a teacher's outputs.

    ``(1 - w) hard + w T^2 KL(softmax(teacher / T) || softmax(student / T))``: the divergence is the mean over
    the batch, and ``T^2`` keeps its gradients' size whatever the temperature. G. Hinton, O. Vinyals and
    J. Dean, Distilling the Knowledge in a Neural Network, 2015.

    Args:
        teacher: a network with the same inputs and classes. It is copied, so that training a network that
            shares its weights leaves it as it is.
        weight: ``w``, the teacher's share.
        temperature: ``T``.
        hard: the objective with labels; plain cross-entropy by default.
        task: what both are for. Where its output stands for no probabilities, the mean squared difference of
            the two outputs is in place of the divergence.
    """

    def __init__(
        self,
        teacher: nn.Module,
        weight: float,
        temperature: float,
        hard: Objective | None = None,
        task: TaskSpec = CLASSIFY,
    ) -> None:
        self.task = task
        self.teacher = copy.deepcopy(teacher).eval().requires_grad_(False)
        self.weight = weight
        self.temperature = temperature
        self.hard = hard or CrossEntropy()

    def __call__(self, logits: Tensor, targets: Any, inputs: StepInputs) -> Tensor:
        """The mean over the batch, in nats.

        Raises:
            UsageError: teacher and student have different classes, or return no single output.
        """
        with torch.no_grad():
            output = self.task.find(call(self.teacher.to(tensors_of(inputs.batch)[0].device), inputs.batch))
        if not isinstance(output, Tensor) or output.shape != logits.shape:
            raise UsageError(
                f"the teacher returns {form_of(output)}, the student {form_of(logits)}",
                where=option("teacher"),
            )
        hard = self.hard(logits, targets, inputs)
        return (1 - self.weight) * hard + self.weight * self._soft(logits, output.to(logits.dtype))

    def _soft(self, logits: Tensor, outputs: Tensor) -> Tensor:
        """Distance of the student's output from the teacher's."""
        mine, theirs = self.task.softmax_rows(logits), self.task.softmax_rows(outputs)
        if mine is None or theirs is None:
            return F.mse_loss(logits, outputs)
        soft = F.kl_div(
            F.log_softmax(mine / self.temperature, 1),
            F.log_softmax(theirs / self.temperature, 1),
            reduction="batchmean",
            log_target=True,
        )
        return self.temperature**2 * soft


def objective(config: TrainConfig, original: nn.Module | None = None, task: TaskSpec = CLASSIFY) -> Objective:
    """Objective that ``config`` asks for.

    Args:
        config: label smoothing, and the teacher with its weight and temperature.
        original: the network before compression, which a teacher is made of.
        task: what the network is for.

    Raises:
        UsageError: it asks for a teacher, and there is none or no output to compare, or the task has no loss.
    """
    hard = label_loss(task, config.label_smoothing)
    if config.teacher is None:
        return hard
    if original is None:
        raise UsageError(
            "there is no earlier network to learn from", where=option("teacher"), hint="leave it out"
        )
    teacher: nn.Module | None = TEACHERS[config.teacher].network(original)
    if teacher is None:
        return hard
    if returns_losses(task):
        problem = f"compares outputs, and in training a network to {task.text} returns losses in their place"
        raise UsageError(problem, where=option("teacher"), hint="leave it out")
    return Distillation(teacher, config.distill_weight, config.temperature, hard, task)
