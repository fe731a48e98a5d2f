"""The loss of distillation: labels and a teacher, together."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from modelopt_cli.errors import InputError
from modelopt_cli.methods.distill.cache import Cache
from modelopt_cli.methods.distill.config import DistillConfig
from modelopt_cli.methods.distill.pairs import Pair
from modelopt_cli.methods.distill.table import LOSSES
from modelopt_cli.methods.distill.taps import Taps
from modelopt_cli.methods.distill.teacher import Answer, Teacher
from modelopt_cli.methods.distill.terms import LABELS
from modelopt_cli.training import Objective, StepInputs


class Distillation(nn.Module):
    """The weighted sum of the terms of a config; adapters of features are its own, and learn along.

    Args:
        config: the terms and the temperature.
        teacher: looks at its places of ``pairs``.
        taps: of the student, at its places of ``pairs``.
        pairs: the features that are compared.
        hard: the labels' part.
        samples: how many are trained on.
        cache: of the teacher's answers; without it the teacher is asked about every batch.
    """

    def __init__(
        self,
        config: DistillConfig,
        teacher: Teacher,
        taps: Taps,
        pairs: Sequence[Pair],
        hard: Objective,
        samples: int,
        cache: Cache | None = None,
    ) -> None:
        super().__init__()
        self._cache = cache
        self._config, self._teacher, self._taps, self._hard = config, teacher, taps, hard
        self._pairs = tuple(pairs)
        self.comparisons = nn.ModuleList(_comparison(pair, samples) for pair in pairs)

    def forward(self, logits: Tensor, targets: Tensor, inputs: StepInputs) -> Tensor:
        """The loss of a batch, a scalar.

        Raises:
            InputError: the teacher has other classes.
        """
        if self._cache is None:
            answer = self._teacher(inputs.images)
        else:
            answer = self._cache.answer(inputs, self._teacher)
        if answer.logits.shape != logits.shape:
            raise InputError(
                f"answers {answer.logits.shape[1]} classes, the student {logits.shape[1]}",
                where="the teacher",
            )
        total = logits.new_zeros(())
        for term in self._config.terms:
            if term.name == LABELS and term.weight:
                total = total + term.weight * self._hard(logits, targets, inputs)
            elif term.weight and LOSSES[term.name].looks_at == "logits":
                compare: Callable[..., Tensor] = LOSSES[term.name].make
                temperature = self._config.temperature
                total = total + term.weight * compare(logits, answer.logits, targets, temperature)
        return total + self._features(logits, answer)

    def _features(self, logits: Tensor, answer: Answer) -> Tensor:
        total = logits.new_zeros(())
        ours = {place: self._taps.take(place) for place in {pair.student for pair in self._pairs}}
        for pair, compare in zip(self._pairs, self.comparisons, strict=True):
            mine, theirs = ours[pair.student], answer.features[pair.teacher]
            if LOSSES[pair.term.name].looks_at == "embeddings":
                mine, theirs = _embedded(mine), _embedded(theirs)
            total = total + pair.term.weight * compare(mine, theirs)
        return total


def _comparison(pair: Pair, samples: int) -> nn.Module:
    loss, shapes = LOSSES[pair.term.name], (pair.student.shape, pair.teacher.shape)
    if loss.looks_at == "embeddings":
        shapes = _width(shapes[0]), _width(shapes[1])
    made: nn.Module = loss.make(*shapes, samples)
    return made


def _embedded(feature: Tensor) -> Tensor:
    """``(N, D)``: the mean over positions of maps ``(N, C, H, W)`` and of tokens ``(N, T, C)``."""
    if feature.dim() <= 2:
        return feature
    return feature.flatten(2).mean(2) if feature.dim() != 3 else feature.mean(1)


def _width(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:1] if len(shape) != 2 else shape[1:]
