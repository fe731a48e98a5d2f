"""Batch norms that stay while an int8 network learns, although they were folded into its weights.

Weights of few bits jump from one integer to the next, and what a layer returns jumps with them; a norm that
uses the statistics of each batch takes that out again (R. Krishnamoorthi, "Quantizing deep convolutional
networks for efficient inference", 2018). So each layer whose norm was folded gets one back that changes
nothing at the start, with mean and variance of the float layer's results as what it restores. After training
its statistics are taken again, from the weights as they are then (M. Nagel et al., "Overcoming Oscillations
in Quantization-Aware Training", ICML 2022), and it is folded into the weight's scales and the bias, which
leaves the integers as they are.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from modelopt_cli.methods.prune.batch_norms import NORMS, Pool
from modelopt_cli.methods.quantize.calibration import calibrate
from modelopt_cli.methods.quantize.learning.latent_layers import Latent, LatentNorm
from modelopt_cli.program import Program
from modelopt_cli.program.calls import source
from modelopt_cli.program.input_batch import Inputs, batch_size, call, to

LEAST_VALUES = 32
"""Values of a channel in all calibration data below which their variance says too little for a norm."""

MOMENTUM = 0.1
"""Momentum of norms whose own have none, since they take the mean over all batches."""


def folded_norms(before: Program, after: Program) -> dict[str, nn.Module]:
    """Batch norms of a Program that are in the layers before them in another form of it.

    Args:
        before: with norms.
        after: a form of it for inference, in which layers have the same names.

    Returns:
        The norm of each layer, by the layer's name; of layers that are called once.
    """
    left = {str(node.target): node for node in after.graph.find_nodes(op="call_module")}
    norms: dict[str, nn.Module] = {}
    for node in before.graph.find_nodes(op="call_module"):
        norm, value = before.get_submodule(str(node.target)), source(node)
        if not isinstance(norm, NORMS) or norm.running_mean is None or str(node.target) in left:
            continue
        if isinstance(value, fx.Node) and value.op == "call_module" and _called_once(value, after):
            norms[str(value.target)] = norm
    return norms


def _called_once(node: fx.Node, program: Program) -> bool:
    return [each.target for each in program.graph.find_nodes(op="call_module")].count(node.target) == 1


def identity_norms(before: Program, after: Program, batches: Iterable[Inputs]) -> dict[str, LatentNorm]:
    """A norm for each layer whose own was folded; it changes nothing at the start.

    Args:
        before: with norms.
        after: the same without; layers have the same names.
        batches: of inputs, from which mean and variance of each layer's results are taken.

    Raises:
        DataError: there are none, or the network is not finite on them.
    """
    norms = folded_norms(before, after)
    pools = {name: Pool() for name in norms}
    watched = {
        node: [_Watched(pools[str(node.target)])]
        for node in after.graph.find_nodes(op="call_module")
        if node.target in norms
    }
    if watched:
        calibrate(after, watched, batches)
    return {name: _identity(norms[name], pool) for name, pool in pools.items() if pool.count >= LEAST_VALUES}


class _Watched:
    """Shows a pool the values of an activation."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    def update(self, x: Tensor) -> None:
        """Take in one batch."""
        self.pool.add(x)


def _identity(like: Any, pool: Pool) -> LatentNorm:
    """A norm like another that takes away the mean and the variance of a pool, and puts them back."""
    mean, variance = _statistics(pool)
    return LatentNorm(mean, variance, like.eps, MOMENTUM if like.momentum is None else like.momentum)


def _statistics(pool: Pool) -> tuple[Tensor, Tensor]:
    return pool.mean.float(), (pool.squares / max(pool.count - 1, 1)).float()


def restore_statistics(network: nn.Module, batches: Iterable[Inputs], device: str) -> None:
    """Take the statistics of the norms of latent layers again, from the weights as they are.

    Every batch goes through with the norms as in training, as in ``prune.batch_norms.recalibrate``.

    Args:
        network: in evaluation mode, which it is in afterwards, too.
        batches: of its inputs; one of a single sample is left out.
        device: where to compute.
    """
    norms = [
        layer.norm for layer in network.modules() if isinstance(layer, Latent) and layer.norm is not None
    ]
    if not norms:
        return
    pools = [Pool() for _ in norms]
    home = next(network.parameters()).device
    network.to(device)
    with ExitStack() as hooks, torch.no_grad():
        for norm, pool in zip(norms, pools, strict=True):
            norm.train()
            handle = norm.register_forward_pre_hook(partial(_add, pool))
            hooks.callback(handle.remove)
        for batch in batches:
            if batch_size(batch) > 1:
                call(network, to(batch, device))
    network.to(home).eval()
    for norm, pool in zip(norms, pools, strict=True):
        if pool.count:
            mean, variance = _statistics(pool)
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)


def _add(pool: Pool, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    pool.add(inputs[0])
