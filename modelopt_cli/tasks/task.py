"""A task: what a network is for, and with that its targets, its metrics and its loss. Imports no torch."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from modelopt_cli.data.targets import TargetFormat

Scalar: TypeAlias = bool | int | float | str
LOSS = "loss"


@dataclass(frozen=True)
class Logits:
    """Outputs that stand for probabilities of classes.

    Attributes:
        axis: dimension of the classes.
        ranks: numbers of dimensions that such outputs may have; others stand for no probabilities.
        exclusive: True if one class is right, and the probabilities are a softmax; False if each class is
            there or not by itself, and they are sigmoids.
        labels: ``labels(targets, output)``, the right class of each row of logits, ``(rows,)``, and
            ``segmentation.IGNORED`` where none counts; None where the targets do not say it row by row.
    """

    axis: int
    ranks: tuple[int, ...]
    exclusive: bool = True
    labels: Callable[[Any, Any], Any] | None = None


@dataclass(frozen=True)
class Task:
    """Purpose of a network, with targets, metrics and loss: one row of ``TASKS``.

    Attributes:
        help: one line for the documentation.
        target: what a sample's target is, for the documentation; see ``modelopt_cli.data.targets``.
        form: makes the format that checks and collates targets, from the task's options and, as ``names``,
            the names of the network's classes or None.
        judged: what the metrics score: ``judged(output, targets, inputs, **options)``, from the output that
            ``outputs`` names, of a batch. It raises ``InputError`` where the network returns another form,
            and ``Misfit`` where a target does not go with it.
        outputs: names of the output that is judged and learned, in the order in which they are looked for;
            else it is the only tensor, or the first. Empty where all outputs are judged together.
        losses: keys of ``training.catalog.LOSSES``, the default first; the option ``loss`` chooses one.
            Empty where nothing can be learned from its targets.
        distilled_by: the sum of ``methods.distill.losses.LOSSES`` that ``distill`` learns by where none is
            given; None where the network's outputs cannot be compared in training.
        logits: where the classes of the output are; None where it stands for no probabilities.
        predicted: the class of each sample, ``(N,)``, from the output, or None for one of another form; None
            where samples have no such class.
        counted: ``counted(targets, inputs)``, bool ``(N, T)``, which tokens of a batch are no padding, or
            None where nothing says so. Targets are None where there are none.
        options: what may follow its name, ``NAME?key=value``, and the defaults; of texts all there are, the
            default first.
        batch_axis: dimension of the samples in an output that ``outputs`` names, for a number of them:
            ``batch_axis(output, samples, **options)``. None where it is always the first.
        infer: options that a network tells by what it does: ``infer(output_for)`` with the output that
            ``outputs`` names for a number of samples. None where there are none.
        spelling: of tasks that a name stands for; None for the name itself.
    """

    help: str
    target: str
    form: "Callable[..., TargetFormat]"
    judged: Callable[..., Any]
    outputs: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()
    distilled_by: str | None = "ce+mse"
    logits: Logits | None = None
    predicted: Callable[[Any], Any] | None = None
    counted: Callable[[Any, Any], Any] | None = None
    options: Mapping[str, Scalar | tuple[str, ...]] = field(default_factory=dict)
    batch_axis: Callable[..., int] | None = None
    infer: Callable[[Callable[[int], Any]], Mapping[str, Scalar]] | None = None
    spelling: re.Pattern[str] | None = None

    @property
    def all_options(self) -> Mapping[str, Scalar | tuple[str, ...]]:
        """Options of the task, and that of the loss where there are several."""
        return {**self.options, LOSS: self.losses} if len(self.losses) > 1 else self.options


class Misfit(Exception):
    """The target of a sample does not go with the network's output.

    Args:
        place: of the sample in its batch.
        message: what does not go together.
        hint: what to do next.
    """

    def __init__(self, place: int, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.place, self.message, self.hint = place, message, hint
