"""Trains a small network with batch norm: alone when called, together with others under torchrun."""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from modelopt_cli.data import open_data
from modelopt_cli.errors import EnvironmentFailure
from modelopt_cli.program.capture import capture
from modelopt_cli.program.input_spec import InputSpec
from modelopt_cli.training.distributed import World, world
from modelopt_cli.training.loader import ordered_batches, training_batches
from modelopt_cli.training.run_folder import Run
from modelopt_cli.training.state import State, write_state
from modelopt_cli.training.synced import synced_batch_norm


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, groups=2),
        nn.BatchNorm2d(4, affine=False, momentum=None),
        nn.Flatten(),
        nn.Linear(16, 5),
    ).double()


def train(here: World, spec: str) -> State:
    """Two epochs of uneven batches, and one of single samples, of which one process always has none."""
    data = open_data(spec)
    model = network(here.rank)
    here.broadcast(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for epoch, batch_size in enumerate((4, 5, 1)):
        batches = training_batches(
            data, batch_size=batch_size, epoch=epoch, seed=3, augment="cifar", world=here
        )
        for images, labels, weight, *_ in batches:
            optimizer.zero_grad()
            with synced_batch_norm(here, counts=weight > 0):
                logits = model(images.double())
            loss = nn.functional.cross_entropy(logits, labels) * weight
            loss.backward()
            here.sum_gradients(model.parameters())
            optimizer.step()
            losses.append(here.sum(loss.item())[0])
    mine = here.shard(data)
    correct, seen = 0, 0
    model.eval()
    for images, labels in ordered_batches(mine, 4) if mine else ():
        correct += int((model(images.double()).argmax(1) == labels).sum())
        seen += len(labels)
    figures = here.sum(correct, seen)
    numbers = {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "figures": torch.tensor(figures, dtype=torch.float64),
    }
    return State({**dict(model.state_dict()), **numbers})


def main(folder: Path) -> None:
    here = world()
    state = train(here, f"npz:{folder / 'data.npz'}")
    state.tensors["ranks"] = here.gather(torch.full((here.rank + 1,), here.rank))
    with Run(folder / "run", identity={}, resume=False) as run:
        run.save("a", State(about={"by": here.rank}))
        here.barrier()
        loaded = run.load("a")
        assert loaded is not None
        assert loaded.about == {"by": 0}
        run.finish("b", capture(network(here.rank).float().eval(), InputSpec((3, 6, 6))))
        result = run.finished("b")
        assert result is not None
        state.tensors["finished"] = next(result.parameters())[:1].double()
        run.close()
    state.tensors["finished"] = here.gather(state.tensors["finished"])
    if here.main:
        write_state(state, folder / "together")
    leave_without_notice(here, folder)


def leave_without_notice(here: World, folder: Path) -> None:
    """One process ends; the other must learn of it, whatever the launcher does."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    here.barrier()
    if not here.main:
        os._exit(3)
    try:
        here.barrier()
    except EnvironmentFailure as error:
        write_state(State(about={"error": str(error)}), folder / "left")


def samples() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {"x": draw.integers(0, 256, (13, 6, 6, 3), dtype=np.uint8), "y": draw.integers(0, 5, 13)}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
