"""Tables of a given size for one weight or many, and the nearest entry for every weight.

Tables of one size for every weight: what ``--bits N`` and ``--entries N`` do to a Program.

How much an error of each weight matters, from data without labels.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from modelopt_cli.methods.context import Context
from modelopt_cli.methods.layer_pass import calibration_data, evaluation_copy, no_samples, refuse_infinite
from modelopt_cli.methods.matrices import DECONVS
from modelopt_cli.methods.prune.masks import Masks
from modelopt_cli.methods.share.clustered_weight import Shared
from modelopt_cli.methods.share.compensation import Layer, Levels, layers, put, watchable
from modelopt_cli.methods.share.config import ShareConfig
from modelopt_cli.methods.share.entropy_constrained import assign_rated, constrain
from modelopt_cli.methods.share.kmeans import assign, cluster
from modelopt_cli.methods.share.product_quantization import assign_vectors, cluster_vectors
from modelopt_cli.program import Program


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


def share_weights(
    program: Program, names: Mapping[str, str], config: ShareConfig, context: Context
) -> tuple[Program, dict[str, Shared]]:
    """A copy of the network with its weights shared, and their tables.

    Args:
        program: it is not changed.
        names: weights to share.
        config: size of the tables, scope, weighting.
        context: data for the weightings ``fisher`` and ``hessian``.

    Raises:
        UsageError: data are needed and there are none.
        DataError: they are empty or do not fit.
    """
    network = evaluation_copy(program, context.device)
    free = {name: mask for name, mask in Masks.of(program).masks.items() if name in names}
    if config.weighting == "hessian":
        found = _compensated(network, names, config, context, free)
    else:
        importance = {}
        if config.weighting == "fisher":
            importance = fisher(program, names, context, config.calibration_samples)
        weights = {
            name: Weight(program.get_parameter(name).detach(), name in free, importance.get(name))
            for name in names
        }
        found = share_all(weights, config, context.seed)
    network = network.cpu()
    with torch.no_grad():
        for name, shared in found.items():
            network.get_parameter(name).copy_(shared.decode())
    return network, found


def _compensated(
    network: Program,
    names: Mapping[str, str],
    config: ShareConfig,
    context: Context,
    free: Mapping[str, Tensor],
) -> dict[str, Shared]:
    """Layer by layer, each on the inputs that the shared layers before it give."""
    found: dict[str, Shared] = {}
    common = _common(network, names, config, context, free)
    for layer in layers(network, watchable(network, names), context, config.calibration_samples):
        name = layer.parameter
        curvature = layer.curvature()
        values, pruned = layer.module.weight.detach().cpu(), free.get(name)
        weight = Weight(values, pruned is not None, layer.importance(curvature).cpu())
        shared = common.get(name) or share(weight, config, context.seed)
        bias = None
        # The weight of a transposed convolution does not begin with its outputs, as rows of `Levels` do.
        if config.vector == 1 and (len(shared.table) == 1 or not isinstance(layer.module, DECONVS)):
            levels = _levels(layer, shared, price_of_bit(weight, config))
            index, bias = layer.choose(curvature, levels, pruned)
            shared = Shared(shared.shape, index.flatten(1), shared.table, shared.pruned)
        put(layer.module, shared.decode(), bias)
        found[name] = shared
    for name in names:
        if name not in found:
            weight = Weight(network.get_parameter(name).detach().cpu(), name in free)
            found[name] = common.get(name) or share(weight, config, context.seed)
    return {name: found[name] for name in names}


def _common(
    network: Program,
    names: Mapping[str, str],
    config: ShareConfig,
    context: Context,
    free: Mapping[str, Tensor],
) -> dict[str, Shared]:
    """Weights by the one table of all of them, where that is the scope."""
    if config.scope != "network":
        return {}
    weights = {name: Weight(network.get_parameter(name).detach().cpu(), name in free) for name in names}
    return share_all(weights, config, context.seed)


def _levels(layer: Layer, shared: Shared, price: float) -> Levels:
    """The entries of each row's table, at so much for a bit."""
    table = shared.table.squeeze(-1).double()
    zero = (table == 0).long().argmax(1)
    used = torch.bincount(shared.codes(), minlength=table.numel()).view_as(table) + 0.5
    rates = price * (used.sum(1, keepdim=True) / used).log2()
    if len(table) == 1:
        return Levels(table[0], rates[0], zero[0])
    groups = getattr(layer.module, "groups", 1)
    rows = (part.repeat_interleave(shared.group_rows, 0)[: shared.shape[0]] for part in (table, rates, zero))
    return Levels(*(part.unflatten(0, (groups, -1)) for part in rows))


def fisher(program: Program, names: Iterable[str], context: Context, samples: int) -> dict[str, Tensor]:
    """The diagonal of the Fisher information: mean squared gradient of the log-likelihood, by parameter.

    Labels are drawn from the network's own answers, which makes it the true Fisher information and not the
    empirical one (Martens, "New insights and perspectives on the natural gradient method", 2020, section 5).
    So drawn, gradients of different samples have mean zero and are independent: the expected square of their
    sum is the sum of their squares, and a batch needs one backward pass.

    Args:
        program: the network; it is not changed.
        names: parameters.
        context: data, seed, batch size, device, progress.
        samples: how many to look at, at most.

    Raises:
        UsageError: no data.
        DataError: no samples, or the network gives no finite numbers on them.
    """
    data = calibration_data(context, "weighting fisher", samples, "--weighting none")
    network = evaluation_copy(program, context.device).requires_grad_(True)
    parameters = {name: network.get_parameter(name) for name in names}
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    draw, seen = torch.Generator().manual_seed(context.seed), 0
    for images, _ in data.batches(context.batch_size, workers=context.workers):
        logits = network(images.to(context.device)).flatten(1)
        refuse_infinite(logits, data.name)
        chances = F.softmax(logits.detach().double(), 1).cpu()
        labels = torch.multinomial(chances, 1, generator=draw).squeeze(1)
        loss = F.cross_entropy(logits, labels.to(context.device), reduction="sum")
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                sums[name] += gradient.float().square()
        seen += len(images)
        if context.progress is not None:
            context.progress(seen, data.size)
    if not seen:
        raise no_samples()
    return {name: (total / seen).cpu() for name, total in sums.items()}
