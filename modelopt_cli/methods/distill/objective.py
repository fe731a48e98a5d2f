"""Loss of distillation: the weighted sum of its terms, on labels, logits and features."""

from collections.abc import Sequence

from torch import Tensor, nn

from modelopt_cli.errors import InputError
from modelopt_cli.methods.distill.cache import Cache
from modelopt_cli.methods.distill.config import DistillConfig
from modelopt_cli.methods.distill.feature_pairs import Pair
from modelopt_cli.methods.distill.feature_points import FeatureValues
from modelopt_cli.methods.distill.losses import LooksAt, Term
from modelopt_cli.methods.distill.teacher import Teacher, TeacherOutput
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
    ) -> None:
        super().__init__()
        self._cache = cache
        self._teacher, self._values = teacher, values
        self._temperature = config.temperature
        self._pairs = tuple(pairs)
        used = [term for term in config.terms if term.weight]
        self._on_labels: list[tuple[Term, Objective]] = [
            (term, term.loss.make(label_smoothing)) for term in used if term.loss.looks_at is LooksAt.LABELS
        ]
        self._on_logits = [term for term in used if term.loss.looks_at is LooksAt.LOGITS]
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
        for term in self._on_logits:
            loss = term.loss.make(logits, output.logits, targets, self._temperature)
            total = total + term.weight * loss
        return total + self._features(logits, output)

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
