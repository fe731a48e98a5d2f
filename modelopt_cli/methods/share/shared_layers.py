"""The layers that ``share`` clusters: their selection beforehand, and a summary of each afterwards."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt_cli.artifact.codecs.codebook import Codebook
from modelopt_cli.artifact.encodings import is_pruned, is_shared
from modelopt_cli.errors import NothingCompressed, UsageError
from modelopt_cli.measure.layer_status import Coverage
from modelopt_cli.methods.layer_selection import nothing_done, select_layers, weight_labels
from modelopt_cli.methods.share.config import ShareConfig
from modelopt_cli.program import Encoding


@dataclass(frozen=True)
class SelectedWeights:
    """The weights to cluster, and the reasons for the others.

    Attributes:
        labels: the name of each in reports, by parameter name.
        reasons: why others are left as they are, by label.
    """

    labels: dict[str, str]
    reasons: dict[str, str]


def select_weights(
    weights: Mapping[str, Tensor],
    encodings: Mapping[str, Encoding],
    config: ShareConfig,
    exempt: Mapping[str, str] | None = None,
) -> SelectedWeights:
    """Weights that can be clustered and that the config asks for.

    Args:
        weights: by parameter name; those on the meta device will do.
        encodings: how they are stored so far.
        config: the globs, and vectors or not.
        exempt: tensors that are no weights for a reason, by parameter name.

    Raises:
        NothingCompressed: there are none.
        UsageError: a glob matches no layer.
    """
    labels = weight_labels(weights)
    obstacles = {
        label: (exempt or {}).get(name) or obstacle(weights[name], encodings.get(name), config)
        for name, label in labels.items()
    }
    reasons = {label: reason for label, reason in obstacles.items() if reason is not None}
    able = [label for label, reason in obstacles.items() if reason is None]
    selected, skipped = select_layers(able, config, obstacles) if able else ([], {})
    reasons |= skipped
    if not selected:
        raise nothing_to_share(reasons)
    return SelectedWeights({name: label for name, label in labels.items() if label in selected}, reasons)


def keeps_zeros(weight: Tensor, encoding: Encoding | None, config: ShareConfig) -> bool:
    """True of a weight whose zeros stay zero: a pruned one, or one with a row of nothing but zeros.

    Such a row is the padding of an embedding, say, or a channel that is off. Blocks of several numbers have
    no zero of their own.
    """
    if is_pruned(encoding):
        return True
    return config.vector == 1 and weight.dim() > 1 and not bool(weight.flatten(1).any(1).all())


def obstacle(weight: Tensor, encoding: Encoding | None, config: ShareConfig) -> str | None:
    """The reason why a weight cannot be clustered as the config says; None where it can."""
    if weight.dtype not in Codebook.dtypes:
        return f"its type is {str(weight.dtype).removeprefix('torch.')}"
    if config.vector > 1:
        row = weight[0].numel()
        if row % config.vector:
            return f"rows of {row} weights cannot be cut into vectors of {config.vector}"
        if is_pruned(encoding):
            return "it is pruned, and pruned weights are shared one by one"
    return None


def refuse_more_values(name: str, before: Tensor, after: Tensor, encoding: Encoding | None) -> None:
    """Keep the promise of an earlier ``share``: a weight gets no more distinct values than it had.

    Args:
        name: of the parameter.
        before: its values as they were given.
        after: as they are now.
        encoding: how it was stored.

    Raises:
        UsageError: it was shared, and has more distinct values now.
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


def nothing_to_share(reasons: Mapping[str, str]) -> NothingCompressed:
    """The error for a network without a weight to cluster, with the first layer's reason."""
    return nothing_done("shared", reasons, "vector")


@dataclass(frozen=True)
class SharedLayer:
    """One weight before and after.

    Attributes:
        name: label of its layer.
        kind: of its layer.
        weights: number of its values.
        values: number of its distinct values after.
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
        before: the original weights, by parameter name.
        after: the same weights now.
        coverage: the outcome for each layer.
        comparable: False where batch norms were folded into the weights.
    """
    names = {label: name for name, label in weight_labels(after).items()}
    layers = []
    for layer in coverage.layers:
        name = names.get(layer.name)
        if name is None:
            continue
        values, bits = _values_and_entropy(after[name])
        error = _relative_error(before[name], after[name]) if comparable and name in before else None
        count = after[name].numel()
        layers.append(SharedLayer(layer.name, layer.kind, count, values, bits, error, layer.reason))
    return tuple(layers)


def _values_and_entropy(weight: Tensor) -> tuple[int, float]:
    """The number of distinct values, and their entropy in bits."""
    counts = torch.unique(weight.detach().flatten(), return_counts=True)[1].double()
    return len(counts), float((counts / counts.sum() * (counts.sum() / counts).log2()).sum())


def _relative_error(before: Tensor, after: Tensor) -> float:
    old, new = before.detach().double(), after.detach().double()
    energy = float(old.square().sum())
    return float((new - old).square().sum()) / energy if energy else 0.0
