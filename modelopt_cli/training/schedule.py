"""The learning rate of every step, as a share of the largest."""

import math

from modelopt_cli.training.config import TrainConfig

STEP_AT = (0.5, 0.75)
"""Shares of the steps at which ``step`` divides by 10 (He et al. 2016)."""
WARMUP_SHARE = 0.05
"""Share of the steps over which a rate that nobody gave grows."""


def factor(schedule: str, step: int, steps: int, warmup: int = 0) -> float:
    """The learning rate at ``step``, 0 to 1.

    Over the first ``warmup`` steps it grows in equal parts, ``(step + 1) / (warmup + 1)``, so that the first
    step after them has the whole rate (Goyal et al. 2017). From there:

    * ``cosine``: ``(1 + cos(pi t)) / 2`` with ``t`` the share of the remaining steps that are done
      (Loshchilov and Hutter, SGDR, 2017);
    * ``step``: 1, then 0.1 from half of all steps on, and 0.01 from three quarters on;
    * ``constant``: 1.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "cosine":
        return (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))) / 2
    if schedule == "step":
        return float(0.1 ** sum(step >= share * steps for share in STEP_AT))
    return 1.0


def warmup_steps(config: TrainConfig, steps: int, steps_per_epoch: int) -> int:
    """Over how many of ``steps`` the learning rate grows.

    Where neither it nor the rate is given, a ``WARMUP_SHARE`` of all; a rate that is given is taken as it is.
    """
    if config.warmup is not None:
        return round(config.warmup * steps_per_epoch)
    return round(WARMUP_SHARE * steps) if config.lr is None else 0


def learning_rate(config: TrainConfig, largest: float, step: int, steps: int, steps_per_epoch: int) -> float:
    """The learning rate of ``step``, counted from 0, of ``steps``, where ``largest`` is that of no factor."""
    return largest * factor(config.schedule, step, steps, warmup_steps(config, steps, steps_per_epoch))
