"""Losses that training minimises: with labels, and with a teacher."""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelopt_cli.errors import UsageError
from modelopt_cli.program.inputs import call
from modelopt_cli.settings import option
from modelopt_cli.training.catalog import TEACHERS
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
    """

    def __init__(
        self, teacher: nn.Module, weight: float, temperature: float, hard: Objective | None = None
    ) -> None:
        self.teacher = copy.deepcopy(teacher).eval().requires_grad_(False)
        self.weight = weight
        self.temperature = temperature
        self.hard = hard or CrossEntropy()

    def __call__(self, logits: Tensor, targets: Tensor, inputs: StepInputs) -> Tensor:
        """The mean over the batch, in nats.

        Raises:
            UsageError: teacher and student have different classes.
        """
        with torch.no_grad():
            outputs = call(self.teacher.to(logits.device), inputs.batch).to(logits.dtype)
        if outputs.shape != logits.shape:
            raise UsageError(
                f"the teacher returns {tuple(outputs.shape)}, the student {tuple(logits.shape)}",
                where=option("teacher"),
            )
        soft = F.kl_div(
            F.log_softmax(logits / self.temperature, 1),
            F.log_softmax(outputs / self.temperature, 1),
            reduction="batchmean",
            log_target=True,
        )
        hard = self.hard(logits, targets, inputs)
        return (1 - self.weight) * hard + self.weight * self.temperature**2 * soft


def objective(config: TrainConfig, original: nn.Module | None = None) -> Objective:
    """Objective that ``config`` asks for.

    Args:
        config: label smoothing, and the teacher with its weight and temperature.
        original: the network before compression, which a teacher is made of.

    Raises:
        UsageError: it asks for a teacher, and there is none.
    """
    hard = CrossEntropy(config.label_smoothing)
    if config.teacher is None:
        return hard
    if original is None:
        raise UsageError(
            "there is no earlier network to learn from", where=option("teacher"), hint="leave it out"
        )
    teacher: nn.Module = TEACHERS[config.teacher].network(original)
    return Distillation(teacher, config.distill_weight, config.temperature, hard)
