"""Embeddings: vectors whose angles say how alike two samples are."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from modelopt_cli.data.targets import RawTarget, TargetFormat, Targets
from modelopt_cli.errors import DataError
from modelopt_cli.tasks.draws import Counts, Values, in_rows
from modelopt_cli.tasks.regression import finite_target, stacked
from modelopt_cli.tasks.task import Misfit
from modelopt_cli.tasks.task_output import finite, require

MASK = "attention_mask"
_TWO = "a pair is two samples of one number and one score"


class SimilarityTargets(TargetFormat):
    """Likeness of pairs of samples, or the vector that each sample should have.

    Of pairs, ``pair`` int64 ``(N,)`` numbers the pair that a sample belongs to, and ``score`` float32
    ``(N,)`` says how alike its two are, on any scale. Of vectors, ``vector`` is float32 ``(N, D)``.
    """

    def check(self, raw: RawTarget, inputs: Any, classes: int | None) -> dict[str, Tensor]:
        """The target of one sample; see :class:`TargetFormat`."""
        if isinstance(raw, Tensor) and raw.is_floating_point() and raw.dim() == 1:
            return {"vector": finite_target(raw.float())}
        if not isinstance(raw, Mapping) or "pair" not in raw or "score" not in raw:
            raise DataError("target is neither a vector nor a dictionary of pair and score")
        pair, score = (torch.as_tensor(raw[name]) for name in ("pair", "score"))
        if pair.numel() != 1 or score.numel() != 1 or pair.is_floating_point():
            raise DataError("target needs an integer as pair, and a number as score")
        return {"pair": pair.long().view(()), "score": finite_target(score.float().view(()))}

    def collate(self, targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The parts of the targets, each ``(N, ...)``."""
        if any(target.keys() != targets[0].keys() for target in targets):
            raise DataError("some targets are vectors, others pairs")
        return {name: stacked([target[name] for target in targets]) for name in targets[0]}


class Embedded(NamedTuple):
    """Embeddings of samples.

    Attributes:
        vectors: ``(N, D)``, of length 1, float32.
    """

    vectors: Tensor


def targets(names: tuple[str, ...] | None = None) -> SimilarityTargets:
    """The format of the targets."""
    return SimilarityTargets()


def judged(output: Any, wanted: Targets, inputs: Any) -> Embedded:
    """Embeddings of length 1.

    Raises:
        InputError: the network returns no vector for each sample, or NaN.
        Misfit: targets are vectors of another length.
    """
    assert isinstance(wanted, dict)
    samples = len(next(iter(wanted.values())))
    vectors = pooled(output, inputs, samples)
    if "vector" in wanted and wanted["vector"].shape != vectors.shape:
        raise Misfit(
            0, f"target has {wanted['vector'].shape[1]} numbers, the network returns {vectors.shape[1]}"
        )
    return Embedded(F.normalize(vectors))


def pooled(output: Any, inputs: Any, samples: int) -> Tensor:
    """Vectors ``(N, D)``: the output, or its mean over the tokens that the attention mask leaves.

    Raises:
        InputError: the output is of another form.
    """
    fits = isinstance(output, Tensor) and output.dim() in (2, 3) and len(output) == samples
    require(fits, output, samples, "a network for embeddings", "dimensions", "give one")
    checked = finite(output)
    if checked.dim() == 2:
        return checked
    mask = inputs.get(MASK) if isinstance(inputs, Mapping) else None
    if mask is None or mask.shape != checked.shape[:2]:
        return checked.mean(1)
    weights = mask.to(checked.dtype).unsqueeze(2)
    vectors: Tensor = (checked * weights).sum(1) / weights.sum(1).clamp(min=1)
    return vectors


def kept(embedded: Embedded, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The vector and the target of each sample, for both metrics."""
    return {"own": embedded.vectors, **wanted}


class Pairs(NamedTuple):
    """Pairs that are complete.

    Attributes:
        cosines: of their embeddings, ``(P,)``.
        scores: that they should have, ``(P,)``; None where the pairs are of an output and its target.
        alone: places of samples whose other is not there, in order.
    """

    cosines: NDArray[np.float64]
    scores: NDArray[np.float64] | None
    alone: tuple[int, ...] = ()


def pairs_of(parts: dict[str, NDArray[Any]]) -> Pairs:
    """The pairs among all samples; a sample whose other is not there is left out.

    Raises:
        Misfit: a pair has a third sample, or two scores.
    """
    own = parts["own"].astype(np.float64)
    if "vector" in parts:
        wanted = parts["vector"].astype(np.float64)
        length = np.linalg.norm(wanted, axis=1).clip(1e-12)
        return Pairs((own * wanted).sum(1) / length, None)
    order = np.argsort(parts["pair"], kind="stable")
    numbers, scores = parts["pair"][order], parts["score"][order]
    same = np.append(numbers[1:] == numbers[:-1], False)  # as the next one
    third = np.flatnonzero(same[:-1] & same[1:])
    if third.size:
        first = third[np.argmin(order[third + 2])]
        raise Misfit(int(order[first + 2]), f"is a third sample of pair {numbers[first]}", hint=_TWO)
    first = np.flatnonzero(same)
    earlier, later = order[first], order[first + 1]
    if (unlike := first[scores[first] != scores[first + 1]]).size:
        at = unlike[np.argmin(order[unlike + 1])]
        told = f"{scores[at + 1]:g}, the first sample of the pair {scores[at]:g}"
        raise Misfit(
            int(order[at + 1]), f"pair {numbers[at]} has two scores: this sample says {told}", hint=_TWO
        )
    alone = np.setdiff1d(np.arange(len(order)), np.concatenate([earlier, later]))
    own_scores = parts["score"][earlier].astype(np.float64)
    return Pairs((own[earlier] * own[later]).sum(1), own_scores, tuple(alone.tolist()))


def mean_cosine(pairs: Pairs, counts: Counts) -> Values:
    """The mean cosine of the pairs of each draw."""
    return counts @ pairs.cosines / counts.sum(1)  # type: ignore[no-any-return]


def spearman(pairs: Pairs, counts: Counts) -> Values:
    """Spearman's rank correlation of cosines and scores, -1 to 1: Pearson's of their ranks, ties sharing one.

    C. Spearman, The Proof and Measurement of Association between Two Things, 1904.
    """
    scores = pairs.scores
    assert scores is not None
    return in_rows(counts, len(scores), lambda some: _correlation(pairs.cosines, scores, some))


def _correlation(x: NDArray[np.float64], y: NDArray[np.float64], counts: Counts) -> Values:
    a, b = (_ranks(values, counts) for values in (x, y))
    total = counts.sum(1, keepdims=True)
    a, b = (ranks - (ranks * counts).sum(1, keepdims=True) / total for ranks in (a, b))
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = np.sqrt((counts * a * a).sum(1) * (counts * b * b).sum(1))
        return (counts * a * b).sum(1) / spread  # type: ignore[no-any-return]


def _ranks(values: NDArray[np.float64], counts: Counts) -> Counts:
    """Rank of each value in each draw, up to a constant; the mean of those that equal values share."""
    order = np.argsort(values, kind="stable")
    groups = np.cumsum(np.append(0, np.diff(values[order]) != 0))
    ends = np.append(np.flatnonzero(np.diff(groups)), len(order) - 1)
    upto = counts[:, order].cumsum(1)[:, ends]
    before = np.concatenate([np.zeros((len(counts), 1)), upto[:, :-1]], 1)
    ranks = np.empty_like(counts)
    ranks[:, order] = ((before + upto) / 2)[:, groups]
    return ranks
