"""Loss of accuracy by ``share``, measured on samples that no choice was made by."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt_cli.data import Data
from modelopt_cli.data.targets import classes_of
from modelopt_cli.errors import UsageError
from modelopt_cli.measure.statistics import Z_95, paired_difference_from_counts, proportion_interval
from modelopt_cli.methods.batches import output_rows
from modelopt_cli.methods.context import Context
from modelopt_cli.program import Program
from modelopt_cli.program.shapes import evaluation_mode
from modelopt_cli.settings import option
from modelopt_cli.training.split import hold_out

HELD_OUT = 0.5
"""Fraction of the calibration samples on which the network chosen by the others is verified."""


@dataclass(frozen=True)
class AccuracyDrop:
    """Points that a network loses on some samples: of accuracy if they have labels, else of agreement.

    Attributes:
        data: the samples.
        context: device, batch size, workers.
        classes: top classes of the original network, int64 ``(N,)``.
        labels: int64 ``(N,)``.
    """

    data: Data
    context: Context
    classes: Tensor
    labels: Tensor

    @classmethod
    def of(cls, program: Program, data: Data, context: Context) -> "AccuracyDrop":
        """The measure of what is lost against ``program``.

        Raises:
            DataError: the labels cannot be used, or their classes are not the network's.
        """
        data = context.task.read_targets(data, program.labels)
        return cls(data, context, *_classes_and_labels(program, data, context))

    def upper(self, program: Program) -> float:
        """The upper end of the 95 % interval of the points lost: Tango's, or Wilson's without labels."""
        classes, _ = _classes_and_labels(program, self.data, self.context)
        if not self.data.labelled:
            return 100 * proportion_interval(int((classes != self.classes).sum()), len(classes))[1]
        before, after = self.classes == self.labels, classes == self.labels
        lost, gained = int((before & ~after).sum()), int((~before & after).sum())
        return paired_difference_from_counts(lost, gained, len(classes)).high


def split_to_verify(context: Context, most: float) -> tuple[Data, Data]:
    """Samples to choose a network by, and others to verify it on.

    Where the network is trained on the samples too, they are verified on those that training does not see.

    Args:
        context: its data and what it trains with.
        most: points that may be lost.

    Raises:
        UsageError: there are none, they have no length, or are too few to tell such a drop.
    """
    data, training = context.data, context.training
    if data is None:
        raise UsageError(
            f"{option('max_drop')} is measured on data",
            hint=f"give {option('calibration')} or {option('data')}",
        )
    if data.size is None:
        raise UsageError(f"{option('max_drop')} holds samples out, and these have no length", where=data.name)
    if training is not None and training.val is not None:
        choosing, held = data, training.val
    else:
        unseen = training is not None and data is training.train and training.config.val_fraction
        choosing, held = hold_out(data, unseen) if unseen else data.split(round(HELD_OUT * data.size))
    for part in (choosing, held):
        if part.size is not None:
            require_enough(part.size, most, data.name)
    return choosing, held


def require_enough(samples: int, most: float, where: str) -> None:
    """Refuse samples on which even equal classes could have lost more than ``most`` points.

    Raises:
        UsageError: says how many there must be.
    """
    # Wilson's interval for 0 of n changed classes ends at z^2 / (n + z^2).
    square = Z_95 * Z_95
    if 100 * square / (samples + square) <= most:
        return
    if most <= 0:
        raise UsageError(
            "no number of samples shows that nothing is lost", where=option("max_drop"), hint="allow more"
        )
    needed = math.ceil(square * (100 / most - 1))
    raise UsageError(
        f"{samples:,} samples cannot tell a drop of {most:g} points: it takes {needed:,} to choose by, "
        "and as many to verify on",
        where=where,
        hint=f"give more with {option('calibration')}, or allow more",
    )


def _classes_and_labels(program: Program, data: Data, context: Context) -> tuple[Tensor, Tensor]:
    """Top classes of the network and labels of the samples, int64 ``(N,)`` each."""
    classes, labels = [], []
    network = program.to(context.device)
    with evaluation_mode(network), torch.inference_mode():
        for inputs, known in data.batches(context.batch_size, workers=context.workers):
            classes.append(output_rows(network, inputs, context.device).argmax(1).cpu())
            labels.append(classes_of(known))
    program.to("cpu")
    return torch.cat(classes), torch.cat(labels)
