"""Trains with shared weights in every mode: alone when called, together with others under torchrun."""

import sys
from dataclasses import replace
from pathlib import Path

from share_cases import CONFIG, pruned_network, shared_of, within

from modelopt_cli.data import open_data
from modelopt_cli.methods.share.choices import TUNINGS
from modelopt_cli.methods.share.codebook_tuning import fine_tune
from modelopt_cli.training.distributed import world
from modelopt_cli.training.state import State, write_state


def trained() -> State:
    """Weights by mode and name. Batches are uneven, and the last of an epoch is a single sample."""
    digits = open_data("digits?split=train").sample(49)
    program = pruned_network(digits)
    config = replace(CONFIG, ema=0.8, clip=1.0)
    tensors = {}
    for mode, tuning in TUNINGS.items():
        network, _ = fine_tune(program, shared_of(program), within(digits, config), tuning, "tune")
        tensors |= {f"{mode}/{name}": tensor for name, tensor in network.state_dict().items()}
    return State({name: tensor.double() for name, tensor in tensors.items()})


if __name__ == "__main__":
    write_state(trained(), Path(sys.argv[1]) / f"rank{world().rank}")
