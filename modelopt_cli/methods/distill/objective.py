"""Loss of distillation: the weighted sum of its terms, on labels, logits and features."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from modelopt_cli.errors import InputError, UsageError
from modelopt_cli.methods.distill.cache import Cache
from modelopt_cli.methods.distill.config import DistillConfig
from modelopt_cli.methods.distill.feature_pairs import Pair
from modelopt_cli.methods.distill.feature_points import FeatureValues
from modelopt_cli.methods.distill.losses import LooksAt, Term
from modelopt_cli.methods.distill.teacher import Teacher, TeacherOutput
from modelopt_cli.settings import option
from modelopt_cli.tasks import CLASSIFY, TaskSpec
from modelopt_cli.tasks.segmentation import IGNORED
from modelopt_cli.training import Objective, StepInputs


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
        self._on_logits = [term for term in used if term.loss.looks_at is LooksAt.LOGITS]
        if self._on_logits and (task.row.logits is None or not task.row.logits.exclusive):
            raise UsageError(
                f"{self._on_logits[0].name} compares probabilities of classes, and {task.text} has none",
                where=option("loss"),
                hint="name losses on labels and features, such as ce+hint",
            )
        self.comparisons = nn.ModuleList(_comparison(pair, samples) for pair in pairs)

    def forward(self, logits: Tensor, targets: Tensor, inputs: StepInputs) -> Tensor:
        """Loss of a batch, a scalar.

        Raises:
            InputError: the teacher has other classes.
        """
        if self._cache is None:
            output = self._teacher(inputs.batch)
        else:
            output = self._cache.output(inputs, self._teacher)
        if output.logits.shape != logits.shape:
            raise InputError(
                f"has {output.logits.shape[1]} classes, the student {logits.shape[1]}",
                where="the teacher",
            )
        total = logits.new_zeros(())
        for term, on_labels in self._on_labels:
            total = total + term.weight * on_labels(logits, targets, inputs)
        if self._on_logits:
            mine, theirs, labels = self._rows(logits, output.logits, targets)
            for term in self._on_logits:
                loss = term.loss.make(mine, theirs, labels, self._temperature)
                total = total + term.weight * loss
        return total + self._features(logits, output)

    def _rows(self, logits: Tensor, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor, Any]:
        """Logits of student and teacher and the labels, of each sample, pixel or token that has a label."""
        mine, theirs = self._task.logits(logits), self._task.logits(outputs)
        if mine is None or theirs is None:
            raise InputError("returns no logits for this task", where="the student")
        labelled = isinstance(targets, Tensor) and targets.dim() > 1 and targets.numel() == len(mine)
        if self._task.row.predicted is not None or not labelled:
            return mine, theirs, targets
        labels = targets.flatten()
        kept = labels != IGNORED
        return mine[kept], theirs[kept], labels[kept]

    def _features(self, logits: Tensor, output: TeacherOutput) -> Tensor:
        total = logits.new_zeros(())
        ours = {point: self._values.take(point) for point in {pair.student for pair in self._pairs}}
        for pair, compare in zip(self._pairs, self.comparisons, strict=True):
            mine, theirs = ours[pair.student], output.features[pair.teacher]
            if pair.term.loss.looks_at is LooksAt.EMBEDDINGS:
                mine, theirs = _embedded(mine), _embedded(theirs)
            total = total + pair.term.weight * compare(mine, theirs)
        return total


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
