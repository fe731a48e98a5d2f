"""Which weights of a network are shared, what they are called, and why the others are not.

What sharing made of each layer, to be shown.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt_cli.artifact.codecs.codebook import DTYPES
from modelopt_cli.artifact.encodings import is_pruned, is_shared
from modelopt_cli.errors import NothingCompressed, UsageError
from modelopt_cli.methods.layer_selection import select_layers, weight_labels
from modelopt_cli.methods.share.config import ShareConfig
from modelopt_cli.program import Encoding
from modelopt_cli.program.coverage import Coverage


@dataclass(frozen=True)
class Chosen:
    """Weights to share.

    Attributes:
        layers: what each is called in reports, by parameter name.
        reasons: why others are left as they are, by what they are called.
    """

    layers: dict[str, str]
    reasons: dict[str, str]


def choose(
    weights: Mapping[str, Tensor],
    encodings: Mapping[str, Encoding],
    config: ShareConfig,
    others: Mapping[str, str] | None = None,
) -> Chosen:
    """The weights that can be shared and are wanted.

    Args:
        weights: by parameter name; those on the meta device will do.
        encodings: how they are stored so far.
        config: the globs, and vectors or not.
        others: tensors that are no weights for a reason, by parameter name.

    Raises:
        NothingCompressed: there are none.
        UsageError: a glob matches no layer.
    """
    names = weight_labels(weights)
    obstacles = {
        label: (others or {}).get(name) or obstacle(weights[name], encodings.get(name), config)
        for name, label in names.items()
    }
    reasons = {label: why for label, why in obstacles.items() if why is not None}
    able = [label for label, why in obstacles.items() if why is None]
    selected, left_out = select_layers(able, config, obstacles) if able else ([], {})
    reasons |= left_out
    if not selected:
        raise nothing(reasons)
    return Chosen({name: label for name, label in names.items() if label in selected}, reasons)


def obstacle(weight: Tensor, encoding: Encoding | None, config: ShareConfig) -> str | None:
    """Why a weight cannot be shared so; None where it can."""
    if weight.dtype not in DTYPES:
        return f"its type is {str(weight.dtype).removeprefix('torch.')}"
    if config.vector > 1:
        row = weight[0].numel()
        if row % config.vector:
            return f"rows of {row} weights cannot be cut into vectors of {config.vector}"
        if is_pruned(encoding):
            return "it is pruned, and pruned weights are shared one by one"
    return None


def require_no_more(name: str, before: Tensor, after: Tensor, encoding: Encoding | None) -> None:
    """Make sure of what an earlier sharing promised: a weight gets no more different values than it has.

    Args:
        name: of the parameter.
        before: its values as they were given.
        after: as they are now.
        encoding: how it was stored.

    Raises:
        UsageError: it was shared, and has more now.
    """
    if not is_shared(encoding):
        return
    few, many = (len(values.detach().unique()) for values in (before, after))
    if many > few:
        raise UsageError(
            f"is shared already, and would get {many} different values instead of {few}",
            where=name,
            hint="ask for fewer, or start from the network before it was shared",
        )


def nothing(reasons: Mapping[str, str]) -> NothingCompressed:
    """The error that says why nothing could be shared."""
    name, why = next(iter(reasons.items()), ("", ""))
    what = f"no layer can be shared ({name}: {why})" if name else "no layer can be shared"
    return NothingCompressed(what, hint="nothing was written; see --include, --exclude and --vector")


@dataclass(frozen=True)
class SharedLayer:
    """One weight before and after.

    Attributes:
        name: of its layer.
        kind: of its layer.
        weights: how many there are.
        values: how many different ones after.
        bits: empirical entropy of the values, in bits for a weight, without regard to their order.
        error: squared change of the weights over their squares; None where they cannot be compared, since a
            batch norm was folded into them.
        reason: why it was left alone, or an empty string.
    """

    name: str
    kind: str
    weights: int
    values: int
    bits: float
    error: float | None
    reason: str


def summary(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], coverage: Coverage, *, comparable: bool
) -> tuple[SharedLayer, ...]:
    """Every weight-carrying layer, in the order of ``coverage``.

    Args:
        before: the weights as they were, by parameter name.
        after: the same as they are.
        coverage: what became of each layer.
        comparable: whether the same weights can be compared.
    """
    names = {label: name for name, label in weight_labels(after).items()}
    layers = []
    for layer in coverage.layers:
        name = names.get(layer.name)
        if name is None:
            continue
        values, bits = _spread(after[name])
        error = _error(before[name], after[name]) if comparable and name in before else None
        count = after[name].numel()
        layers.append(SharedLayer(layer.name, layer.kind, count, values, bits, error, layer.reason))
    return tuple(layers)


def _spread(weight: Tensor) -> tuple[int, float]:
    """How many different values there are, and their entropy."""
    counts = torch.unique(weight.detach().flatten(), return_counts=True)[1].double()
    return len(counts), float((counts / counts.sum() * (counts.sum() / counts).log2()).sum())


def _error(before: Tensor, after: Tensor) -> float:
    old, new = before.detach().double(), after.detach().double()
    energy = float(old.square().sum())
    return float((new - old).square().sum()) / energy if energy else 0.0
