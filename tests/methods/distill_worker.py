"""Distils alone when called, together with others under torchrun."""

import sys
from dataclasses import replace
from pathlib import Path

from distill_networks import CONFIG, fresh, within

from modelopt_cli.data import open_data
from modelopt_cli.methods.distill.apply import apply
from modelopt_cli.methods.distill.config import DistillConfig
from modelopt_cli.training.distributed import world
from modelopt_cli.training.state import State, write_state

LOSS = "ce+kd+mse+dkd+std+hint:0.1+at"
"""All terms that look at one sample at a time."""


def distilled() -> State:
    """Weights by name. Batches are uneven, and the last of an epoch is a single sample."""
    digits = open_data("digits?split=train").sample(49)
    config = replace(CONFIG, ema=0.8, clip=1.0)
    result = apply(fresh(4, seed=2), DistillConfig(LOSS), within(digits, fresh(16, seed=1), config))
    return State({name: tensor.double() for name, tensor in result.program.state_dict().items()})


if __name__ == "__main__":
    write_state(distilled(), Path(sys.argv[1]) / f"rank{world().rank}")
