"""Two processes that torchrun starts fill one cache together, and then write over each other's entries."""

import sys
from pathlib import Path

import numpy as np
import torch
from distill_cache_cases import CLASSES, context, taught
from torch import Tensor

from modelopt_cli.methods.distill.cache import Cache, CacheRequest
from modelopt_cli.methods.distill.cache_layout import Layout
from modelopt_cli.methods.distill.teacher import TeacherOutput
from modelopt_cli.training import StepInputs
from modelopt_cli.training.distributed import World, world
from modelopt_cli.training.state import State, write_state

ROUNDS, WIDE = 200, 100_000


def struggle(here: World, folder: Path) -> int:
    """How many logits were neither process's; entries are wide, so that writing one takes its time."""
    cache = Cache(CacheRequest(folder, {}), Layout(4, 1, WIDE, WIDE), {}, here)
    inputs = StepInputs(torch.zeros(4, 1), torch.arange(4))

    def answering(images: Tensor) -> TeacherOutput:
        return TeacherOutput(torch.full((4, WIDE), float(here.rank + 1)))

    torn = 0
    for _ in range(ROUNDS):
        logits = cache.output(inputs, answering).logits
        same = (logits == logits[:, :1]).all(1) & ((logits[:, 0] == 1) | (logits[:, 0] == 2))
        torn += int((~same).sum())
        cache._entries["checksum"][:, np.random.default_rng().integers(4)] = 0
    return int(here.sum(torn)[0])


def main(folder: Path) -> None:
    here = world()
    tensors = taught(context(folder / "logits"))
    torn = struggle(here, folder / "struggle")
    if here.main:
        write_state(State(tensors, {"torn": torn, "classes": CLASSES}), folder / "together")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
