"""Codebooks of one size for every weight, which is what ``--bits N`` and ``--centroids N`` make."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt_cli.methods.context import Context
from modelopt_cli.methods.layer_pass import evaluation_copy
from modelopt_cli.methods.matrices import DECONVS
from modelopt_cli.methods.prune.masks import Masks
from modelopt_cli.methods.share.clustered_weight import ClusteredWeight, stacked
from modelopt_cli.methods.share.compensation import (
    CalibratedLayer,
    Levels,
    calibrated_layers,
    set_values,
    watchable,
)
from modelopt_cli.methods.share.config import ShareConfig
from modelopt_cli.methods.share.entropy_constrained import assign_rated, constrain
from modelopt_cli.methods.share.kmeans import assign, cluster
from modelopt_cli.methods.share.product_quantization import assign_vectors, cluster_vectors
from modelopt_cli.program import Program


@dataclass(frozen=True)
class Weight:
    """A weight to cluster.

    Attributes:
        values: floats ``(O, ...)``.
        pruned: its zeros are to stay zeros.
        importance: of the squared error of each value, of the values' shape; None is the same for all.
    """

    values: Tensor
    pruned: bool = False
    importance: Tensor | None = None


def cluster_network(
    program: Program, names: Iterable[str], config: ShareConfig, context: Context
) -> tuple[Program, dict[str, ClusteredWeight]]:
    """A copy of the network with its weights clustered, and their clusters by parameter name.

    Args:
        program: it is not changed.
        names: parameters to cluster.
        config: size of the codebooks, scope, weighting.
        context: data, for weightings that need them.

    Raises:
        UsageError: data are needed and there are none.
        DataError: they are empty or do not fit.
    """
    names = list(names)
    network = evaluation_copy(program, context.device)
    unpruned = {name: mask for name, mask in Masks.of(program).masks.items() if name in names}
    weighting = config.weighting_row
    if weighting.compensates:
        clustered = _layer_by_layer(network, names, config, context, unpruned)
    else:
        importance: dict[str, Tensor] = {}
        if weighting.importance is not None:
            importance = weighting.importance(program, names, context, config.calibration_samples)
        weights = {
            name: Weight(program.get_parameter(name).detach(), name in unpruned, importance.get(name))
            for name in names
        }
        clustered = cluster_all(weights, config, context.seed)
    network = network.cpu()
    with torch.no_grad():
        for name, each in clustered.items():
            network.get_parameter(name).copy_(each.decode())
    return network, clustered


def _layer_by_layer(
    network: Program,
    names: list[str],
    config: ShareConfig,
    context: Context,
    unpruned: Mapping[str, Tensor],
) -> dict[str, ClusteredWeight]:
    """Clusters that make up for errors, each layer on the inputs that the clustered layers before it give."""
    clustered: dict[str, ClusteredWeight] = {}

    def plain(name: str) -> Weight:
        return Weight(network.get_parameter(name).detach().cpu(), name in unpruned)

    # One codebook for all must be known before the first layer is changed.
    together = config.scope_row.whole_network
    common = cluster_all({n: plain(n) for n in names}, config, context.seed) if together else {}
    for layer in calibrated_layers(network, watchable(network, names), context, config.calibration_samples):
        name = layer.parameter
        curvature = layer.curvature()
        values, mask = layer.module.weight.detach().cpu(), unpruned.get(name)
        weight = Weight(values, mask is not None, layer.importance(curvature).cpu())
        each = common.get(name) or cluster_weight(weight, config, context.seed)
        bias = None
        # The weight of a transposed convolution does not begin with its outputs, as rows of `Levels` do.
        if config.vector == 1 and (len(each.codebooks) == 1 or not isinstance(layer.module, DECONVS)):
            levels = _levels(layer, each, price_of_bit(weight, config))
            index, bias = layer.choose(curvature, levels, mask)
            each = ClusteredWeight(each.shape, index.flatten(1), each.codebooks, each.pruned)
        set_values(layer.module, each.decode(), bias)
        clustered[name] = each
    for name in names:
        if name not in clustered:
            clustered[name] = common.get(name) or cluster_weight(plain(name), config, context.seed)
    return {name: clustered[name] for name in names}


def _levels(layer: CalibratedLayer, clustered: ClusteredWeight, price: float) -> Levels:
    """The centroids of each row's codebook, each at the bits that its frequency costs."""
    values = clustered.codebooks.squeeze(-1).double()
    zero = (values == 0).long().argmax(1)
    used = torch.bincount(clustered.codes(), minlength=values.numel()).view_as(values) + 0.5
    costs = price * (used.sum(1, keepdim=True) / used).log2()
    if len(values) == 1:
        return Levels(values[0], costs[0], zero[0])
    groups, count = getattr(layer.module, "groups", 1), clustered.shape[0]
    rows = (part.repeat_interleave(clustered.group_rows, 0)[:count] for part in (values, costs, zero))
    return Levels(*(part.unflatten(0, (groups, -1)) for part in rows))


def cluster_all(weights: Mapping[str, Weight], config: ShareConfig, seed: int) -> dict[str, ClusteredWeight]:
    """Clusters of many weights, in codebooks of the config's size.

    Args:
        weights: by parameter name.
        config: size, scope, init, vector, rate.
        seed: for starts that are drawn.
    """
    if not config.scope_row.whole_network:
        return {name: cluster_weight(weight, config, seed) for name, weight in weights.items()}
    pruned = any(weight.pruned for weight in weights.values())
    values = torch.cat([weight.values.float().flatten() for weight in weights.values()])
    known = [weight.importance for weight in weights.values() if weight.importance is not None]
    importance = torch.cat([each.flatten() for each in known]) if len(known) == len(weights) else None
    codebook = _codebook(Weight(values, pruned, importance), config, seed)
    return {name: _assigned(weight, [codebook], config) for name, weight in weights.items()}


def cluster_weight(weight: Weight, config: ShareConfig, seed: int) -> ClusteredWeight:
    """Clusters of one weight; see :func:`cluster_all`."""
    parts = _groups(weight, config)
    if config.vector > 1:
        return _vector_clusters(weight, parts, config, seed)
    return _assigned(weight, [_codebook(part, config, seed) for part in parts], config)


def _groups(weight: Weight, config: ShareConfig) -> list[Weight]:
    """The runs of output channels that get a codebook each."""
    rows = config.scope_row.rows(len(weight.values), config.group)
    values = weight.values.split(rows)
    importance = [None] * len(values) if weight.importance is None else weight.importance.split(rows)
    return [Weight(v, weight.pruned, i) for v, i in zip(values, importance, strict=True)]


def _codebook(weight: Weight, config: ShareConfig, seed: int) -> tuple[Tensor, Tensor]:
    """A codebook, and the cost of its centroids: nothing where ``rate`` is 0."""
    centroids = cluster(
        weight.values,
        config.size,
        init=config.init,
        importance=weight.importance,
        fixed_zero=weight.pruned,
        seed=seed,
    )
    price = price_of_bit(weight, config)
    if not price:
        return centroids, torch.zeros(len(centroids))
    codebook, bits = constrain(
        weight.values, centroids, price, importance=weight.importance, fixed_zero=weight.pruned
    )
    return codebook, bits.double() * price


def price_of_bit(weight: Weight, config: ShareConfig) -> float:
    """The squared error that a bit is worth: the rate times the variance, as the importance weights it."""
    if not config.rate:
        return 0.0
    mean = 1.0 if weight.importance is None else float(weight.importance.double().mean())
    return config.rate * float(weight.values.double().var(correction=0)) * mean


def _assigned(weight: Weight, codebooks: list[tuple[Tensor, Tensor]], config: ShareConfig) -> ClusteredWeight:
    """The weight with the best centroid of its group's codebook for each value."""
    indices = [
        _indices(part, codebook, costs, config)
        for part, (codebook, costs) in zip(_groups(weight, config), codebooks, strict=True)
    ]
    stack = stacked([codebook.unsqueeze(-1) for codebook, _ in codebooks])
    return ClusteredWeight(tuple(weight.values.shape), torch.cat(indices), stack, weight.pruned)


def _indices(weight: Weight, codebook: Tensor, costs: Tensor, config: ShareConfig) -> Tensor:
    """The centroid of each value, ``(rows, n)``."""
    values = weight.values.flatten(1)
    if config.rate:
        scale = None if weight.importance is None else weight.importance.flatten(1)
        index = assign_rated(values, codebook, costs, 1.0, scale)
    else:
        index = assign(values, codebook)
    if weight.pruned:
        index = index.masked_fill(values == 0, int((codebook == 0).nonzero()[0]))
    return index


def _vector_clusters(weight: Weight, parts: list[Weight], config: ShareConfig, seed: int) -> ClusteredWeight:
    codebooks, indices = [], []
    for part in parts:
        blocks = part.values.float().reshape(-1, config.vector)
        importance = None if part.importance is None else part.importance.reshape(-1, config.vector)
        codebook = cluster_vectors(blocks, config.size, importance=importance, seed=seed)
        # By length, so that the index says how large a vector is: what the entropy coder expects.
        codebook = codebook[codebook.square().sum(1).argsort(stable=True)]
        index = assign_vectors(blocks, codebook, importance).reshape(len(part.values), -1)
        indices.append(index.to(torch.int32))
        codebooks.append(codebook)
    return ClusteredWeight(tuple(weight.values.shape), torch.cat(indices), stacked(codebooks))
