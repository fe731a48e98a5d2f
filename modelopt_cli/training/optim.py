"""Optimizer of a training, its state as plain tensors, and the learning rate of every step."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from modelopt_cli.training.catalog import OPTIMIZERS, SCHEDULES
from modelopt_cli.training.config import TrainConfig

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""The layers that normalise."""
WARMUP_SHARE = 0.05
"""Fraction of the steps over which a rate that nobody gave grows."""


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that learn, in two groups: those that decay, and biases and those of norms.

    A parameter counts as a bias or a norm's by its layer, by a name that ends in ``bias``, or by having one
    dimension at most. A group with nothing in it is left out.
    """
    spared = {id(p) for m in network.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}
    decaying: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        spare = id(parameter) in spared or name.endswith("bias") or parameter.dim() <= 1
        (undecayed if spare else decaying).append(parameter)
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Optimizer that ``config`` names, over the parameters of ``network`` that learn."""
    groups = parameter_groups(network, config.weight_decay)
    row = OPTIMIZERS[config.optimizer]
    settings = {name: getattr(config, name) for name in row.settings}
    optimizer: torch.optim.Optimizer = row.make(groups, lr=config.peak_lr, **settings)
    return optimizer


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


def factor(schedule: str, step: int, steps: int, warmup: int = 0) -> float:
    """Learning rate at ``step`` as a fraction of the largest, 0 to 1.

    Over the first ``warmup`` steps it grows in equal parts, ``(step + 1) / (warmup + 1)``, so that the first
    step after them has the full rate (Goyal et al. 2017). From there the schedule says it.

    Args:
        schedule: a key of ``SCHEDULES``.
        step: counted from 0.
        steps: of the training.
        warmup: how many of them the rate grows over.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return SCHEDULES[schedule].factor(step, steps, warmup)


def warmup_steps(config: TrainConfig, steps: int, steps_per_epoch: int) -> int:
    """Number of ``steps`` over which the learning rate grows.

    Where neither it nor the rate is given, ``WARMUP_SHARE`` of them; a rate that is given is taken as it is.
    """
    if config.warmup is not None:
        return round(config.warmup * steps_per_epoch)
    return round(WARMUP_SHARE * steps) if config.lr is None else 0


def learning_rate(config: TrainConfig, largest: float, step: int, steps: int, steps_per_epoch: int) -> float:
    """Learning rate of ``step``, counted from 0, of ``steps``, where ``largest`` is that of factor 1."""
    return largest * factor(config.schedule, step, steps, warmup_steps(config, steps, steps_per_epoch))
