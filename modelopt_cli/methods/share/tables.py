"""Tables of a given size for one weight or many, and the nearest entry for every weight."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt_cli.methods.share.config import ShareConfig
from modelopt_cli.methods.share.entropy_constrained import assign_rated, constrain
from modelopt_cli.methods.share.kmeans import assign, cluster
from modelopt_cli.methods.share.shared import Shared
from modelopt_cli.methods.share.vector import assign_vectors, cluster_vectors


@dataclass(frozen=True)
class Weight:
    """A weight to share.

    Attributes:
        values: floats ``(O, ...)``.
        pruned: whether its zeros are to stay zeros.
        importance: of the squared error of each value, of the values' shape; None is the same for all.
    """

    values: Tensor
    pruned: bool = False
    importance: Tensor | None = None


def share_all(weights: Mapping[str, Weight], config: ShareConfig, seed: int) -> dict[str, Shared]:
    """Share weights by tables of a size that the config gives.

    Args:
        weights: by parameter name.
        config: entries, scope, init, vector, rate.
        seed: of what is drawn.
    """
    if config.scope != "network":
        return {name: share(weight, config, seed) for name, weight in weights.items()}
    pruned = any(weight.pruned for weight in weights.values())
    values = torch.cat([weight.values.float().flatten() for weight in weights.values()])
    known = [weight.importance for weight in weights.values() if weight.importance is not None]
    importance = torch.cat([each.flatten() for each in known]) if len(known) == len(weights) else None
    table, bits = _table(Weight(values, pruned, importance), config, seed)
    return {name: _shared(weight, [(table, bits)], config) for name, weight in weights.items()}


def share(weight: Weight, config: ShareConfig, seed: int) -> Shared:
    """Share one weight; see :func:`share_all`."""
    if config.vector > 1:
        return _share_vectors(weight, config, seed)
    return _shared(weight, [_table(part, config, seed) for part in _groups(weight, config)], config)


def _groups(weight: Weight, config: ShareConfig) -> list[Weight]:
    """The runs of output channels that get a table each: as long as one another, the last perhaps shorter."""
    rows = count = len(weight.values)
    if config.scope == "channels":
        rows = -(-count // -(-count // config.group))
    values = weight.values.split(rows)
    importance = [None] * len(values) if weight.importance is None else weight.importance.split(rows)
    return [Weight(v, weight.pruned, i) for v, i in zip(values, importance, strict=True)]


def _table(weight: Weight, config: ShareConfig, seed: int) -> tuple[Tensor, Tensor]:
    """A table, and what its entries cost: nothing where ``rate`` is 0."""
    entries = cluster(
        weight.values,
        config.size,
        init=config.init,
        importance=weight.importance,
        fixed_zero=weight.pruned,
        seed=seed,
    )
    price = price_of_bit(weight, config)
    if not price:
        return entries, torch.zeros(len(entries))
    table, bits = constrain(
        weight.values, entries, price, importance=weight.importance, fixed_zero=weight.pruned
    )
    return table, bits.double() * price


def price_of_bit(weight: Weight, config: ShareConfig) -> float:
    """The squared error that a bit is worth: the rate times the variance, as the importance weights it."""
    if not config.rate:
        return 0.0
    mean = 1.0 if weight.importance is None else float(weight.importance.double().mean())
    return config.rate * float(weight.values.double().var(correction=0)) * mean


def _shared(weight: Weight, tables: list[tuple[Tensor, Tensor]], config: ShareConfig) -> Shared:
    indices = [
        _assigned(part, table, costs, config)
        for part, (table, costs) in zip(_groups(weight, config), tables, strict=True)
    ]
    padded = _padded([table.unsqueeze(-1) for table, _ in tables])
    return Shared(tuple(weight.values.shape), torch.cat(indices), padded, weight.pruned)


def _assigned(weight: Weight, table: Tensor, costs: Tensor, config: ShareConfig) -> Tensor:
    """The entry of each weight, ``(rows, n)``."""
    values = weight.values.flatten(1)
    if config.rate:
        scale = None if weight.importance is None else weight.importance.flatten(1)
        index = assign_rated(values, table, costs, 1.0, scale)
    else:
        index = assign(values, table)
    if weight.pruned:
        index = index.masked_fill(values == 0, int((table == 0).nonzero()[0]))
    return index


def _share_vectors(weight: Weight, config: ShareConfig, seed: int) -> Shared:
    tables, indices = [], []
    for part in _groups(weight, config):
        blocks = part.values.float().reshape(-1, config.vector)
        importance = None if part.importance is None else part.importance.reshape(-1, config.vector)
        table = cluster_vectors(blocks, config.size, importance=importance, seed=seed)
        # By length, so that the index says how large a vector is: what the entropy coder expects.
        table = table[table.square().sum(1).argsort(stable=True)]
        indices.append(assign_vectors(blocks, table, importance).reshape(len(part.values), -1))
        tables.append(table)
    wide = [index.to(torch.int32) for index in indices]
    return Shared(tuple(weight.values.shape), torch.cat(wide), _padded(tables))


def _padded(tables: list[Tensor]) -> Tensor:
    """Tables ``(entries, d)`` as one, the last entry of the shorter ones repeated."""
    longest = max(map(len, tables))
    return torch.stack([torch.cat((t, t[-1:].expand(longest - len(t), -1))) for t in tables])
