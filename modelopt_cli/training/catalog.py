"""Optimizers, learning rate schedules, augmentations and teachers: one row each. Imports no torch.

A row is all that there is to add: the settings offer it, and the training uses its functions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from modelopt_cli.lazy_names import deferred

_AUGMENT = "modelopt_cli.training.augment"
SGD_LR = 0.1
"""Usual rate of ``sgd`` for batches of ``SGD_BATCH``, in proportion for others (Goyal et al. 2017)."""
SGD_BATCH = 128
ADAMW_LR = 1e-3
STEP_AT = (0.5, 0.75)
"""Fractions of the steps at which ``step`` divides the rate by 10 (He et al. 2016)."""


@dataclass(frozen=True)
class Optimizer:
    """Rule that changes the weights by their gradients.

    Attributes:
        help: name of the rule, and the paper.
        make: ``make(groups, lr=..., **settings)`` gives a ``torch.optim.Optimizer`` over parameter groups.
        usual_lr: largest learning rate for a batch size where none is given.
        settings: fields of ``TrainConfig`` that ``make`` takes, too; without a meaning for other rows.
    """

    help: str
    make: Callable[..., Any]
    usual_lr: Callable[[int], float]
    settings: tuple[str, ...] = ()


OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": Optimizer(
        "stochastic gradient descent with momentum",
        deferred("torch.optim", "SGD"),
        lambda batch_size: SGD_LR * batch_size / SGD_BATCH,
        ("momentum", "nesterov"),
    ),
    "adamw": Optimizer(
        "Adam with decoupled weight decay (Loshchilov and Hutter 2019)",
        deferred("torch.optim", "AdamW"),
        lambda batch_size: ADAMW_LR,
    ),
}


@dataclass(frozen=True)
class LabelLoss:
    """Loss with targets that a task is learned by.

    Attributes:
        help: the quantity.
        function: ``function(output, targets, inputs, label_smoothing=..., **options of the task)``, the mean
            over the batch; see ``training.label_losses``.
        guesses: True if it is a cross-entropy, so that equal probabilities for all classes have the logarithm
            of their number.
        smooths: True if it knows what to make of ``label_smoothing``.
        given: what the network is called with next to the inputs, from the targets, if it computes the loss
            itself; else None.
    """

    help: str
    function: Callable[..., Any]
    guesses: bool = False
    smooths: bool = False
    given: Callable[[Any], Any] | None = None


_LABELS = "modelopt_cli.training.label_losses"

LOSSES: dict[str, LabelLoss] = {
    "cross-entropy": LabelLoss(
        "cross-entropy of the classes",
        deferred("modelopt_cli.training.objectives", "cross_entropy"),
        guesses=True,
        smooths=True,
    ),
    "binary-cross-entropy": LabelLoss(
        "cross-entropy of each class by itself", deferred(_LABELS, "binary_cross_entropy"), smooths=True
    ),
    "mse": LabelLoss("mean squared error", deferred(_LABELS, "squared_error")),
    "l1": LabelLoss("mean absolute error", deferred(_LABELS, "absolute_error")),
    "huber": LabelLoss(
        "half the squared error up to an error of 1, the absolute error beyond (Huber 1964)",
        deferred(_LABELS, "huber"),
    ),
    "cross-entropy-places": LabelLoss(
        "cross-entropy of each pixel", deferred(_LABELS, "places"), guesses=True, smooths=True
    ),
    "cross-entropy-next": LabelLoss(
        "cross-entropy of each next token", deferred(_LABELS, "next_tokens"), guesses=True, smooths=True
    ),
    "ctc": LabelLoss("connectionist temporal classification (Graves et al. 2006)", deferred(_LABELS, "ctc")),
    "cosine": LabelLoss(
        "one minus the cosine with the right vector; of pairs, the squared error of their cosine",
        deferred(_LABELS, "cosine"),
    ),
    "own": LabelLoss(
        "the sum of the losses that the network itself returns in training",
        deferred(_LABELS, "own"),
        given=deferred("modelopt_cli.tasks.detection", "to_find"),
    ),
}
"""By the name in the row of a task."""


@dataclass(frozen=True)
class LRSchedule:
    """Course of the learning rate after the warm-up.

    Attributes:
        help: the course, and the paper.
        factor: ``factor(step, steps, warmup)``, the rate of a step as a fraction of the largest, 0 to 1.
            ``step`` counts from 0 to below ``steps``; the warm-up took the first ``warmup`` of them.
    """

    help: str
    factor: Callable[[int, int, int], float]


def _cosine(step: int, steps: int, warmup: int) -> float:
    return (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))) / 2


def _step(step: int, steps: int, warmup: int) -> float:
    return float(0.1 ** sum(step >= fraction * steps for fraction in STEP_AT))


SCHEDULES: dict[str, LRSchedule] = {
    "cosine": LRSchedule(
        "half a cosine from the learning rate down to 0 (Loshchilov and Hutter 2017)", _cosine
    ),
    "step": LRSchedule("divided by 10 after a half and after three quarters of the steps", _step),
    "constant": LRSchedule("the same throughout", lambda step, steps, warmup: 1.0),
}


@dataclass(frozen=True)
class Augmentation:
    """Random changes of the training images.

    Attributes:
        help: the changes.
        on_samples: ``on_samples(fill)`` gives a ``training.augment.BatchAugmentation`` of preprocessed
            images, where ``fill`` ``(C, 1, 1)`` is black after normalisation; None leaves them as they are.
        on_image: ``on_image(preprocess, size)`` gives a ``data.preprocess.ImageTransform`` that cuts an
            undecoded image to ``size`` (height, width) in place of the data's own; None keeps that.
    """

    help: str
    on_samples: Callable[..., Any] | None = None
    on_image: Callable[..., Any] | None = None

    @property
    def is_random(self) -> bool:
        """True if a sample may be another one in each epoch."""
        return self.on_samples is not None or self.on_image is not None


AUGMENTATIONS: dict[str, Augmentation] = {
    "none": Augmentation("images as they are"),
    "mnist": Augmentation(
        "turned by up to 10 degrees, moved and scaled by up to a tenth of its size",
        on_samples=deferred(_AUGMENT, "Affine"),
    ),
    "cifar": Augmentation(
        "moved by up to an eighth of its size, mirrored half the time",
        on_samples=deferred(_AUGMENT, "CropAndFlip"),
    ),
    "imagenet": Augmentation(
        "a random part of the undecoded image, resized; mirrored half the time",
        on_image=deferred(_AUGMENT, "RandomResizedCrop"),
    ),
}


@dataclass(frozen=True)
class FineTuningTeacher:
    """Network whose outputs a compressed network learns while it is fine-tuned.

    Attributes:
        help: which network that is.
        network: gives it, from the network before compression; None where there is none.
    """

    help: str
    network: Callable[[Any], Any]


OWN_TEACHER = "self"
TEACHERS: dict[str, FineTuningTeacher] = {
    OWN_TEACHER: FineTuningTeacher(
        "the network as it was before it was compressed", lambda original: original
    ),
    "none": FineTuningTeacher("no network: the labels alone", lambda original: None),
}
