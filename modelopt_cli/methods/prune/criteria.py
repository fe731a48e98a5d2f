"""Criteria: what makes a weight or a channel worth keeping, each as published."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt_cli.errors import UsageError
from modelopt_cli.methods.matrices import weights_of
from modelopt_cli.methods.prune.config import CRITERION_NAMES
from modelopt_cli.methods.prune.masks import Masks
from modelopt_cli.methods.prune.statistics import Statistics
from modelopt_cli.program import Program

NOTHING, INPUTS, LABELS = "nothing", "inputs", "labels"
Score = Callable[[str, Tensor, Statistics, int], Tensor]


@dataclass(frozen=True)
class Criterion:
    """One measure of importance.

    Attributes:
        paper: where it was published.
        needs: "nothing", "inputs" (samples to calibrate on) or "labels" (samples with labels).
        families: what it can rank: "weights", "channels", "layers".
        score: importance of each weight, of the weight's shape, from the parameter's name and
            values, the statistics and the seed; None where only whole filters have one.
    """

    paper: str
    needs: str
    families: tuple[str, ...]
    comparable: bool
    score: Score | None


def _l1(name: str, weight: Tensor, statistics: Statistics, seed: int) -> Tensor:
    return weight.abs()


def _l2(name: str, weight: Tensor, statistics: Statistics, seed: int) -> Tensor:
    """Squares; in float64 where those of float32 would all be infinite, or zero."""
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    return (weight if largest == 0 or 1e-15 < largest < 1e15 else weight.double()).square()


def _taylor(name: str, weight: Tensor, statistics: Statistics, seed: int) -> Tensor:
    return statistics.taylor[name]


def _wanda(name: str, weight: Tensor, statistics: Statistics, seed: int) -> Tensor:
    return weight.abs() * statistics.norms[name]


def _obs(name: str, weight: Tensor, statistics: Statistics, seed: int) -> Tensor:
    return weight.double().square() * statistics.curvatures[name]


def _random(name: str, weight: Tensor, statistics: Statistics, seed: int) -> Tensor:
    return random_scores(name, weight.numel(), seed).view(weight.shape)


def random_scores(name: str, count: int, seed: int) -> Tensor:
    """Uniform numbers that depend on the name and the seed, not on what else is scored."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(count, generator=generator)


CRITERIA: dict[str, Criterion] = {
    "l1": Criterion(
        "Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017",
        NOTHING,
        CRITERION_NAMES["l1"],
        True,
        _l1,
    ),
    "l2": Criterion(
        "Han et al., Learning both Weights and Connections for Efficient Neural Networks, NIPS 2015",
        NOTHING,
        CRITERION_NAMES["l2"],
        True,
        _l2,
    ),
    "bn-scale": Criterion(
        "Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017",
        NOTHING,
        CRITERION_NAMES["bn-scale"],
        True,
        None,
    ),
    "taylor": Criterion(
        "Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019",
        LABELS,
        CRITERION_NAMES["taylor"],
        True,
        _taylor,
    ),
    "fpgm": Criterion(
        "He et al., Filter Pruning via Geometric Median, CVPR 2019",
        NOTHING,
        CRITERION_NAMES["fpgm"],
        False,
        None,
    ),
    "wanda": Criterion(
        "Sun et al., A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024",
        INPUTS,
        CRITERION_NAMES["wanda"],
        False,
        _wanda,
    ),
    "obs": Criterion(
        "Hassibi and Stork, Second Order Derivatives for Network Pruning, NIPS 1992; "
        "Frantar and Alistarh, SparseGPT, ICML 2023",
        INPUTS,
        CRITERION_NAMES["obs"],
        True,
        _obs,
    ),
    "random": Criterion("none: a baseline", NOTHING, CRITERION_NAMES["random"], True, _random),
}
"""By the name used on the command line."""


def criterion_for(name: str, family: str, *, data: bool, labels: bool) -> Criterion:
    """The criterion of that name, if it can be used.

    Args:
        name: a key of ``CRITERIA``.
        family: "weights", "channels" or "layers".
        data: whether there are samples to calibrate on.
        labels: whether they have labels.

    Raises:
        UsageError: it is unknown, cannot rank this family, or lacks what it needs.
    """
    if name not in CRITERIA:
        raise UsageError(f"unknown criterion {name!r}", hint=f"one of {', '.join(CRITERIA)}")
    criterion = CRITERIA[name]
    if family not in criterion.families:
        able = ", ".join(other for other, row in CRITERIA.items() if family in row.families)
        raise UsageError(f"criterion {name} cannot rank {family}", hint=f"one of {able}")
    free = "use --criterion l2, which needs no data"
    if criterion.needs != NOTHING and not data:
        raise UsageError(
            f"criterion {name} needs data to calibrate on", hint=f"give --calib or --data, or {free}"
        )
    if criterion.needs == LABELS and not labels:
        raise UsageError(
            f"criterion {name} needs data with labels", hint=f"give --calib with labels, or {free}"
        )
    return criterion


def weight_scores(
    program: Program,
    criterion: str,
    statistics: Statistics,
    parameters: Iterable[str] | None = None,
    *,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The importance of every weight.

    Args:
        program: the network.
        criterion: a key of ``CRITERIA`` that ranks weights.
        statistics: what ``collect`` found for this criterion; an empty one if it needs nothing.
        parameters: names of the weights, or None for all of ``weights_of``.
        seed: of the criterion ``random``.

    Returns:
        By parameter name a float tensor of the weight's shape: larger means more important, and
        ``-inf`` marks zeros that earlier pruning promised to keep.

    Raises:
        UsageError: the criterion has no score for single weights.
    """
    score = CRITERIA[criterion].score
    if score is None:
        raise UsageError(f"criterion {criterion} cannot rank weights", hint="use --structure channels")
    weights = weights_of(program)
    names = list(weights) if parameters is None else list(parameters)
    scores = {name: score(name, weights[name].detach(), statistics, seed) for name in names}
    return held(scores, Masks.of(program).masks)


def held(scores: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores with ``-inf`` where a mask is False."""
    return {
        name: score.masked_fill(~masks[name], -torch.inf) if name in masks else score
        for name, score in scores.items()
    }
