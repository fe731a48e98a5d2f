"""The choices that ``share`` offers, one row each. Imports no torch: the command line reads its help here.

Nothing else compares a row's name: code asks the row. A new choice is a row here, with its function or
class wherever it fits; functions are imported when they are first called.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelopt_cli.lazy_names import deferred

if TYPE_CHECKING:
    from torch import Tensor

    from modelopt_cli.methods.context import Context
    from modelopt_cli.methods.share.clustered_weight import ClusteredWeight
    from modelopt_cli.methods.share.points import Array, Points
    from modelopt_cli.program import Program
    from modelopt_cli.training import Callback


def _from(module: str, name: str) -> Callable[..., Any]:
    return deferred(f"modelopt_cli.methods.share.{module}", name)


@dataclass(frozen=True)
class Scope:
    """The weights that have a codebook in common.

    Attributes:
        help: one line.
        rows: output channels to a codebook, given a weight's output channels and ``--group``.
        grouped: uses ``--group``.
        whole_network: all weights have one codebook, so that none can be clustered by itself.
    """

    help: str
    rows: Callable[[int, int], int]
    grouped: bool = False
    whole_network: bool = False


def _equal_groups(channels: int, group: int) -> int:
    """Channels to a group: at most ``group``, and so that all groups but the last have as many."""
    return -(-channels // -(-channels // group))


SCOPES: dict[str, Scope] = {
    "tensor": Scope("a codebook for each weight", lambda channels, group: channels),
    "channels": Scope("a codebook for every --group output channels", _equal_groups, grouped=True),
    "network": Scope("one codebook for all weights", lambda channels, group: channels, whole_network=True),
}


@dataclass(frozen=True)
class Init:
    """A place where scalar k-means starts.

    Attributes:
        help: one line.
        paper: where it is described.
        start: the first centroids, without the fixed zero or with it, from the points to cluster, the size
            of the codebook, whether one centroid is fixed at 0, and a seed.
        best_of_all: the results from all rows are compared, and the best is taken.
    """

    help: str
    paper: str
    start: "Callable[[Points, int, bool, int], Array]"
    best_of_all: bool = False


_HAN = "Han, Mao and Dally, Deep Compression, ICLR 2016, section 3.2"
INITS: dict[str, Init] = {
    "linear": Init(
        "evenly spaced values from the smallest to the largest", _HAN, _from("kmeans", "linear_start")
    ),
    "density": Init(
        "values with the same number of weights between them", _HAN, _from("kmeans", "density_start")
    ),
    "kmeans++": Init(
        "weights drawn by their squared distance from those drawn before",
        "Arthur and Vassilvitskii, SODA 2007",
        _from("kmeans", "plus_plus_start"),
    ),
    "exact": Init(
        "the best codebook, by dynamic programming; never worse than the others, and slower",
        "Wang and Song, R Journal 2011; Grønlund et al., 2017",
        _from("kmeans", "exact_start"),
        best_of_all=True,
    ),
}


@dataclass(frozen=True)
class Weighting:
    """A measure of how much the error of each weight counts.

    Attributes:
        help: one line.
        paper: where it is described; empty for none.
        needs_data: looks at calibration data, without labels.
        importance: of the squared error of each value of the named weights, from the network, the names, the
            context and the most samples to look at; None counts all the same.
        compensates: clusters layer by layer, the weights not yet clustered making up for the error.
        suits_auto: may be asked for with ``--bits auto``.
    """

    help: str
    paper: str = ""
    needs_data: bool = False
    importance: "Callable[[Program, Iterable[str], Context, int], dict[str, Tensor]] | None" = None
    compensates: bool = False
    suits_auto: bool = True


WEIGHTINGS: dict[str, Weighting] = {
    "none": Weighting("every weight counts the same"),
    "fisher": Weighting(
        "by the mean squared gradient of the network's log-likelihood, with labels drawn from its outputs",
        "Martens, JMLR 2020, section 5",
        needs_data=True,
        importance=_from("fisher", "fisher"),
        suits_auto=False,
    ),
    "hessian": Weighting(
        "by the error in the layer's outputs; weights not yet clustered make up for it",
        "Hassibi and Stork, NIPS 1992; Frantar, Singh and Alistarh, NeurIPS 2022; GPTQ, ICLR 2023",
        needs_data=True,
        compensates=True,
    ),
}
NO_DATA = next(name for name, row in WEIGHTINGS.items() if not row.needs_data)
"""The weighting to hint at where there are no data."""


@dataclass(frozen=True)
class Tuning:
    """A way to fine-tune clustered weights.

    Attributes:
        help: one line.
        paper: where it is described.
        callback: takes part in training and leaves clustered weights behind after every step; made from
            the weights' clusters and original values, by parameter name, and the number of epochs.
        keeps_assignments: no weight moves to another centroid, which ``--bits auto`` counts on.
    """

    help: str
    paper: str
    callback: "Callable[[Mapping[str, ClusteredWeight], Mapping[str, Tensor], int], Callback]"
    keeps_assignments: bool = False


TUNINGS: dict[str, Tuning] = {
    "fixed": Tuning(
        "centroids learn, by the mean gradient of their weights; every weight keeps its centroid",
        "Han, Mao and Dally, Deep Compression, ICLR 2016, section 3.3",
        _from("codebook_tuning", "FixedAssignment"),
        keeps_assignments=True,
    ),
    "epoch": Tuning(
        "weights learn too, and go to the nearest centroid at the beginning of every epoch",
        "Carreira-Perpiñán and Idelbayev, 2017",
        _from("codebook_tuning", "EpochAssignment"),
    ),
    "dkm": Tuning(
        "differentiable k-means: every weight is a mixture of centroids that gets sharper, and both learn",
        "Cho et al., ICLR 2022",
        _from("codebook_tuning", "SoftAssignment"),
    ),
}


@dataclass(frozen=True)
class Budget:
    """A limit that ``--bits auto`` meets.

    Attributes:
        help: one line.
        metric: the name of the limited quantity in the history.
        limit: the limit in that quantity's unit, from the option's value.
        search: finds the network; see ``budget.Search``.
        on_data: looks at the outputs on calibration data, which then cannot judge the result.
        line: the report's line, with ``wanted`` and ``reached``; empty for fractions of the original.
    """

    help: str
    metric: str
    limit: Callable[[float], float]
    search: "Callable[..., Any]"
    on_data: bool = False
    line: str = ""


BUDGETS: dict[str, Budget] = {
    "bytes": Budget("fraction of the file to keep", "bytes", float, _from("budget", "FileSearch")),
    "ratio": Budget(
        "how many times smaller the file becomes",
        "bytes",
        lambda ratio: 1 / ratio,
        _from("budget", "FileSearch"),
    ),
    "max_drop": Budget(
        "what may be lost of the main metric on the calibration data or, without labels, of agreement",
        "max_drop",
        float,
        _from("budget", "DropSearch"),
        on_data=True,
        line="lost on samples held out of the calibration data: at most {wanted:g}{unit} wanted, "
        "at most {reached:.3g} reached (upper end of the 95 % interval)",
    ),
}
