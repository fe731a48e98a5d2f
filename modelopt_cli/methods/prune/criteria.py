"""Criteria: the importance of weights, channels and layers, each as published.

A criterion is one row of ``CRITERIA``: how a weight scores, what of a network has to be collected for that,
and how scores of weights become one of a channel. Scores are larger for what is more important.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelopt_cli.errors import UsageError
from modelopt_cli.lazy_names import deferred
from modelopt_cli.methods.prune.structures import CHANNELS, LAYERS, WEIGHTS, Granularity, SparsityPattern
from modelopt_cli.settings import option

if TYPE_CHECKING:
    from torch import Tensor

    from modelopt_cli.data import Data
    from modelopt_cli.methods.context import Context
    from modelopt_cli.program import Program
    from modelopt_cli.program.channels import Member

    Score = Callable[["ScoredParameter"], Tensor]
    """The importance of each element of a parameter, of its shape."""
    Collect = Callable[[Program, Sequence[str], Data, Context], dict[str, Tensor]]
    """The statistic of parameters by name, from the network, their names, the data and run settings."""


@dataclass(frozen=True)
class ScoredParameter:
    """A parameter to be scored.

    Attributes:
        name: in the network.
        values: of any shape.
        statistic: what the criterion collected for it, of the same shape; None if it collects nothing.
        seed: of random scores.
    """

    name: str
    values: Tensor
    statistic: Tensor | None = None
    seed: int = 0

    @property
    def collected(self) -> Tensor:
        """The statistic of a criterion that collects one."""
        assert self.statistic is not None
        return self.statistic


@dataclass(frozen=True)
class ChannelScore:
    """The way from scores of parameters to those of coupled channels.

    A channel appears in many parameters: as a row of the layers that make it, as an element of norms, as a
    column of the layers that read it. In each parameter its score is the sum over the elements that go with
    it; the channel's score is the mean of that over the parameters.

    Attributes:
        roles: the members of a group that are looked at, of ``program.channels.dependencies.ROLES``.
        batch_norms: of the norms, those over a batch alone.
        score: of the elements; None for the criterion's own.
        of_parameter: instead of the sums, the scores in a parameter ``(channels,)`` float64, NaN for channels
            that are not in it; from its values as a matrix ``(rows, columns)`` whose rows are channels, its
            member of the group, and the number of channels.
        of_group: instead of all that, scores ``(channels,)`` from a group's name, their number and a seed.
        relative: divide the scores in a parameter by their mean over the channels. Layers differ in the size
            of their weights for reasons that say nothing of importance (fan-in, a batch norm behind them
            that undoes any scale). Scores of different groups compare for the same reason.
        obstacle: the reason given for a group that has no such parameters.
    """

    roles: tuple[str, ...] = ("out", "in", "norm")
    batch_norms: bool = False
    score: Score | None = None
    of_parameter: Callable[[Tensor, Member, int], Tensor] | None = None
    of_group: Callable[[str, int, int], Tensor] | None = None
    relative: bool = True
    obstacle: str = "no weights"


@dataclass(frozen=True)
class Pruned:
    """A network with pruned weights.

    Attributes:
        program: a copy with the new weights, on the CPU; its encodings are those it had before.
        masks: parameter name -> booleans, False where the weight is zero.
    """

    program: Program
    masks: dict[str, Tensor]


@dataclass(frozen=True)
class Criterion:
    """One measure of importance.

    Attributes:
        help: one line.
        paper: where it was published.
        granularities: what it can rank.
        score: of single weights; None where only channels have one.
        channel: how that becomes the score of a channel.
        collect: computes statistics from data; None if the weights alone are enough.
        needs_labels: the data need labels.
        watches_inputs: it looks at what weights are multiplied with, so that a weight whose inputs cannot be
            watched has no score.
        comparable: scores of weights of different layers mean the same; if not, each layer's are divided by
            their mean before an allocation compares them.
        additive: scores are parts of one quantity, so that those of all parameters add up.
        allocation: the one that suits it best.
        while_training: weights can be ranked while they are trained: nothing has to be collected.
        compensate: prunes weights so that those that stay make up for them; None just zeroes the lowest.
        obstacle: why it cannot prune a parameter in a pattern; None where it can.
    """

    help: str
    paper: str
    granularities: tuple[Granularity, ...]
    score: Score | None = None
    channel: ChannelScore = ChannelScore()
    collect: Collect | None = None
    needs_labels: bool = False
    watches_inputs: bool = False
    comparable: bool = True
    additive: bool = False
    allocation: str = "global"
    while_training: bool = False
    compensate: Callable[[Program, SparsityPattern, Mapping[str, float], Data, Context], Pruned] | None = None
    obstacle: Callable[[Program, str, SparsityPattern], str | None] = lambda program, name, pattern: None

    @property
    def needs_data(self) -> bool:
        """True if it looks at samples."""
        return self.collect is not None


def _absolute(parameter: ScoredParameter) -> Tensor:
    return parameter.values.abs()


def _squares(parameter: ScoredParameter) -> Tensor:
    """Squares; in float64 where those of float32 would all be infinite, or zero."""
    values = parameter.values
    largest = float(values.abs().max()) if values.numel() else 0.0
    return (values if largest == 0 or 1e-15 < largest < 1e15 else values.double()).square()


def _collected(parameter: ScoredParameter) -> Tensor:
    return parameter.collected


def _times_input_norm(parameter: ScoredParameter) -> Tensor:
    return parameter.values.abs() * parameter.collected


def _squares_times_curvature(parameter: ScoredParameter) -> Tensor:
    return parameter.values.double().square() * parameter.collected


def _random(parameter: ScoredParameter) -> Tensor:
    count = parameter.values.numel()
    return random_scores(parameter.name, count, parameter.seed).view(parameter.values.shape)


def random_scores(name: str, count: int, seed: int) -> Tensor:
    """Uniform numbers that depend on the name and the seed, not on what else is scored."""
    import torch

    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(count, generator=generator)


def _distances(filters: Tensor, member: Member, channels: int) -> Tensor:
    """Score of a channel: the sum of its Euclidean distances to all others (He et al., eq. 4).

    The filter nearest to the geometric median, which the others can replace best, has the least.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    present = member.units.unique()
    vectors = pad_sequence([filters[i] for i in member.index if len(i)], batch_first=True).flatten(1)
    sums = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist").sum(1)
    return sums.new_full((channels,), torch.nan).index_copy(0, present, sums)


_STATISTICS = "modelopt_cli.methods.prune.criterion_statistics"
_squared_gradients = deferred(_STATISTICS, "squared_gradients")
EVERYTHING = (WEIGHTS, CHANNELS, LAYERS)

CRITERIA: dict[str, Criterion] = {
    "l1": Criterion(
        "absolute values",
        "Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017",
        EVERYTHING,
        _absolute,
        while_training=True,
    ),
    "l2": Criterion(
        "squares",
        "Han et al., Learning both Weights and Connections for Efficient Neural Networks, NIPS 2015",
        EVERYTHING,
        _squares,
        while_training=True,
    ),
    "bn-scale": Criterion(
        "scales of the batch norms",
        "Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017",
        (CHANNELS,),
        channel=ChannelScore(
            ("norm",),
            batch_norms=True,
            score=_absolute,
            relative=False,
            obstacle="no batch norm with weights",
        ),
    ),
    "taylor": Criterion(
        "first-order change of the loss",
        "Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019",
        EVERYTHING,
        _collected,
        # The weights that read a channel would count the same change of the loss a second time.
        ChannelScore(("out", "bias", "norm", "tensor"), relative=False),
        lambda program, names, data, context: _squared_gradients(program, data, context),
        needs_labels=True,
        additive=True,
    ),
    "fpgm": Criterion(
        "distance to the other filters",
        "He et al., Filter Pruning via Geometric Median, CVPR 2019",
        (CHANNELS,),
        channel=ChannelScore(("out",), of_parameter=_distances),
        comparable=False,
    ),
    "wanda": Criterion(
        "weight times the norm of its input",
        "Sun et al., A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024",
        (WEIGHTS, CHANNELS),
        _times_input_norm,
        ChannelScore(("out", "in"), obstacle="no weights whose inputs can be watched"),
        deferred(_STATISTICS, "input_norms"),
        watches_inputs=True,
        comparable=False,
        allocation="uniform",
    ),
    "obs": Criterion(
        "cost of a removal that the other weights make up for",
        "Hassibi and Stork, Second Order Derivatives for Network Pruning, NIPS 1992; "
        "Frantar and Alistarh, SparseGPT, ICML 2023",
        (WEIGHTS,),
        _squares_times_curvature,
        collect=deferred(_STATISTICS, "curvatures"),
        watches_inputs=True,
        allocation="lamp",
        compensate=deferred("modelopt_cli.methods.prune.obs", "obs_prune"),
        obstacle=deferred("modelopt_cli.methods.prune.obs", "obs_obstacle"),
    ),
    "random": Criterion(
        "none: a baseline",
        "none",
        EVERYTHING,
        _random,
        ChannelScore(of_group=random_scores),
        allocation="uniform",
    ),
}
"""By the name used on the command line."""

AUTO_CRITERION = "l2"
"""The best of those that need no data."""


def alternative() -> str:
    """The option to use where a criterion cannot be used, for messages."""
    return option("criterion", AUTO_CRITERION)


def give_data() -> str:
    """The options that give data to look at, for messages."""
    return f"give {option('calibration')} or {option('data')}"


def able(granularity: Granularity) -> str:
    """The names of the criteria that can rank a granularity, for messages."""
    return ", ".join(name for name, row in CRITERIA.items() if granularity in row.granularities)


def require_data(name: str, data: Data | None) -> None:
    """Make sure that a criterion has what it looks at.

    Args:
        name: a key of ``CRITERIA``.
        data: samples to calibrate on, or None.

    Raises:
        UsageError: there are no data, or no labels.
    """
    row = CRITERIA[name]
    instead = f"use {alternative()}, which needs no data"
    if row.needs_data and data is None:
        hint = f"{give_data()}, or {instead}"
        raise UsageError(f"criterion {name} needs data to calibrate on", hint=hint)
    if row.needs_labels and data is not None and not data.labelled:
        hint = f"give {option('calibration')} with labels, or {instead}"
        raise UsageError(f"criterion {name} needs data with labels", hint=hint)
