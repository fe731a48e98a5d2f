"""Tables of one size for every weight: what ``--bits N`` and ``--entries N`` do to a Program."""

from collections.abc import Mapping

import torch
from torch import Tensor

from modelopt_cli.methods.context import Context
from modelopt_cli.methods.matrices import DECONVS
from modelopt_cli.methods.prune.masks import Masks
from modelopt_cli.methods.share.compensate import Levels
from modelopt_cli.methods.share.config import ShareConfig
from modelopt_cli.methods.share.importance import fisher
from modelopt_cli.methods.share.layers import Layer, layers, put, watchable
from modelopt_cli.methods.share.shared import Shared
from modelopt_cli.methods.share.tables import Weight, price_of_bit, share, share_all
from modelopt_cli.methods.walk import evaluation_copy
from modelopt_cli.program import Program


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
