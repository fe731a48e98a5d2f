"""Loss of distillation: the weighted sum of its terms, on labels, logits and features."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_cli.errors import InputError, UsageError
from modelopt_cli.methods.distill.cache import Cache
from modelopt_cli.methods.distill.config import DistillConfig
from modelopt_cli.methods.distill.feature_pairs import Pair
from modelopt_cli.methods.distill.feature_points import FeatureValues
from modelopt_cli.methods.distill.losses import LOSSES, LooksAt, Needs, Term
from modelopt_cli.methods.distill.teacher import Teacher, TeacherOutput
from modelopt_cli.program.input_batch import tensors_of
from modelopt_cli.settings import option
from modelopt_cli.tasks import CLASSIFY, TaskSpec
from modelopt_cli.tasks.segmentation import IGNORED
from modelopt_cli.training import Objective, StepInputs
from modelopt_cli.training.objectives import returns_losses

_NAMES = {Needs.PROBABILITIES: "probabilities of classes", Needs.CLASSES: "classes of which one is right"}


class DistillationLoss(nn.Module):
    """Weighted sum of the terms of a config; adapters of features are its own, and learn along.

    Args:
        config: the terms and the temperature.
        teacher: records its points of ``pairs``.
        values: of the student, at its points of ``pairs``.
        pairs: the features that are compared.
        label_smoothing: of the terms on labels, 0 to below 1.
        samples: number of training samples.
        cache: of the teacher's logits; without it the teacher is called for every batch.
    """

    def __init__(
        self,
        config: DistillConfig,
        teacher: Teacher,
        values: FeatureValues,
        pairs: Sequence[Pair],
        label_smoothing: float,
        samples: int,
        cache: Cache | None = None,
        task: TaskSpec = CLASSIFY,
    ) -> None:
        super().__init__()
        self._task = task
        self._cache = cache
        self._teacher, self._values = teacher, values
        self._temperature = config.temperature
        self._pairs = tuple(pairs)
        used = [term for term in config.terms if term.weight]
        self._on_labels: list[tuple[Term, Objective]] = [
            (term, term.loss.make(label_smoothing, task))
            for term in used
            if term.loss.looks_at is LooksAt.LABELS
        ]
        self._on_logits = [term for term in used if term.loss.compares_outputs]
        for term in self._on_logits:
            _require_comparable(term, task)
        self.comparisons = nn.ModuleList(_comparison(pair, samples) for pair in pairs)

    def forward(self, logits: Any, targets: Any, inputs: StepInputs) -> Tensor:
        """Loss of a batch, a scalar.

        Raises:
            InputError: the teacher has other classes.
        """
        if self._cache is None:
            output = self._teacher(inputs.batch)
        else:
            output = self._cache.output(inputs, self._teacher)
        total = torch.zeros((), device=tensors_of(inputs.batch)[0].device)
        for term, on_labels in self._on_labels:
            total = total + term.weight * on_labels(logits, targets, inputs)
        if output.logits is not None:
            if output.logits.shape != logits.shape:
                raise InputError(_differing(logits.shape, output.logits.shape), where="the teacher")
            for term in self._on_logits:
                mine, theirs, labels = self._rows(logits, output.logits, targets, term.loss.needs)
                loss = term.loss.make(mine, theirs, labels, self._temperature)
                total = total + term.weight * loss
        return total + self._features(output)

    def _rows(self, output: Tensor, wanted: Tensor, targets: Any, needs: Needs) -> tuple[Tensor, Tensor, Any]:
        """Rows of student and teacher and the labels, of each sample, pixel or token that has a label."""
        where, task = self._task.row.logits, self._task
        get = task.softmax_rows if needs is Needs.PROBABILITIES else task.logits
        mine, theirs = get(output), get(wanted)
        if where is None or mine is None or theirs is None:
            if needs is not Needs.NUMBERS:
                raise InputError("returns no logits for this task", where="the student")
            return output, wanted, targets
        if where.labels is None:
            return mine, theirs, targets
        labels = where.labels(targets, output)
        if self._task.row.predicted is not None:  # each sample has a label, or several that are mixed
            return mine, theirs, labels
        kept = labels != IGNORED
        return mine[kept], theirs[kept], labels[kept]

    def _features(self, output: TeacherOutput) -> Tensor | float:
        total: Tensor | float = 0.0
        ours = {point: self._values.take(point) for point in {pair.student for pair in self._pairs}}
        for pair, compare in zip(self._pairs, self.comparisons, strict=True):
            mine, theirs = ours[pair.student], output.features[pair.teacher]
            if pair.term.loss.looks_at is LooksAt.EMBEDDINGS:
                mine, theirs = _embedded(mine), _embedded(theirs)
            total = total + pair.term.weight * compare(mine, theirs)
        return total


def _require_comparable(term: Term, task: TaskSpec) -> None:
    """Refuse a term on logits that cannot compare a task's outputs; raises UsageError."""
    where, loss = task.row.logits, term.loss
    kind = Needs.NUMBERS if where is None else Needs.CLASSES if where.exclusive else Needs.PROBABILITIES
    if returns_losses(task):
        problem = f"{term.name} compares outputs, and in training a network to {task.text} returns losses"
    elif kind < loss.needs:
        problem = f"{term.name} compares {_NAMES[loss.needs]}, and {task.text} has none"
    elif loss.needs_labels and (where is None or where.labels is None):
        problem = f"{term.name} needs the right class of each row of logits, which {task.text} does not have"
    else:
        return
    able = [name for name, each in LOSSES.items() if each.compares_outputs and each.needs <= kind]
    hint = "name losses on labels and features, such as ce+hint"
    if not returns_losses(task):
        hint += f", or on its outputs, such as ce+{able[0]}"
    raise UsageError(problem, where=option("loss"), hint=hint)


def _differing(student: Sequence[int], teacher: Sequence[int]) -> str:
    if len(student) == len(teacher) == 2:
        return f"has {teacher[1]} classes, the student {student[1]}"
    return f"returns {tuple(teacher)}, the student {tuple(student)}"


def _comparison(pair: Pair, samples: int) -> nn.Module:
    loss, shapes = pair.term.loss, (pair.student.shape, pair.teacher.shape)
    if loss.looks_at is LooksAt.EMBEDDINGS:
        shapes = _width(shapes[0]), _width(shapes[1])
    comparison: nn.Module = loss.make(*shapes, samples)
    return comparison


def _embedded(feature: Tensor) -> Tensor:
    """``(N, D)``: the mean over positions of maps ``(N, C, H, W)`` and of tokens ``(N, T, C)``."""
    if feature.dim() <= 2:
        return feature
    return feature.flatten(2).mean(2) if feature.dim() != 3 else feature.mean(1)


def _width(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:1] if len(shape) != 2 else shape[1:]
