"""The optimizers: what they change, what they decay, and their state as plain tensors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from modelopt_cli.training.config import TrainConfig

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""The layers that normalise."""


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that learn, in two groups: those that decay, and biases and those of norms.

    A parameter counts as a bias or a norm's by its layer, by a name that ends in ``bias``, or by having one
    dimension at most. A group with nothing in it is left out.
    """
    spared = {id(p) for m in network.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        spare = id(parameter) in spared or name.endswith("bias") or parameter.dim() <= 1
        (others if spare else decaying).append(parameter)
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer ``config`` names, over the parameters of ``network`` that learn."""
    groups = parameter_groups(network, config.weight_decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.peak_lr)
    return torch.optim.SGD(groups, lr=config.peak_lr, momentum=config.momentum, nesterov=config.nesterov)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Take ``rate`` from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Momenta and counts, as ``<number of the parameter>.<what>``; the tensors are the live ones."""
    return {
        f"{number}.{key}": value
        for number, parameter in enumerate(_parameters(optimizer))
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Take up what ``optimizer_state`` gave, in each parameter's own memory format and on its device."""
    parameters = _parameters(optimizer)
    optimizer.state.clear()
    for name, value in state.items():
        number, _, key = name.partition(".")
        parameter = parameters[int(number)]
        if value.shape == parameter.shape and value.dim():
            value = torch.empty_like(parameter).copy_(value)
        optimizer.state[parameter][key] = value.clone()


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
