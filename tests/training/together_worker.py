"""Calls ``fit`` in the processes that torchrun starts: through, interrupted and resumed, diverging."""

import math
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from training_helpers import Breaking, Watcher, noisy_patterns, plain_network, small_network

from modelopt_cli.errors import UsageError
from modelopt_cli.training import TrainConfig, Training, fit
from modelopt_cli.training.distributed import world
from modelopt_cli.training.run_folder import Run
from modelopt_cli.training.state import State, write_state

# 41 samples make batches of 16, 16 and 9; with validation out of 9 samples, 5 fall to one process of two.
TRAINING = Training(
    noisy_patterns(41),
    noisy_patterns(9, seed=1),
    TrainConfig(epochs=4, batch_size=16, lr=0.1, mixup=0.3, ema=0.8, clip=1.0, augment="cifar"),
)


STEEP = Training(noisy_patterns(41), config=TrainConfig(epochs=4, batch_size=16))


class Interrupting(Watcher):
    """Has the second process alone told to stop, in the middle of a step."""

    def after_step(self, network: nn.Module, step: int, steps: int) -> None:
        super().after_step(network, step, steps)
        if step == 4 and network is self.watched and world().rank == 1:
            signal.raise_signal(signal.SIGINT)


def trained(training: Training, callback: Watcher) -> State:
    network = small_network(seed=world().rank)  # the main process's weights are what counts
    result = fit(network, training, seed=3, callbacks=[callback])
    figures = {"epochs": result.epochs, "best": result.best, "loss": result.loss}
    return State(network.state_dict(), figures)


def recovered() -> State:
    """A training whose rate is found by a test, and whose weights break in the third epoch."""
    network = plain_network(scale=100)
    result = fit(network, STEEP, seed=3, callbacks=[Breaking(after=7, factor=math.nan)])
    return State(network.state_dict(), {"lr": result.lr, "returns": result.returns, "loss": result.loss})


def main(folder: Path) -> None:
    here = world()
    through = trained(TRAINING, Watcher())
    with Run(folder / "run", identity={}, resume=False) as run:
        try:
            trained(replace(TRAINING, run=run), Interrupting())
        except KeyboardInterrupt:
            here.barrier()  # the main process has written the state by now
            stopped = run.load("train")
    here.barrier()
    assert stopped is not None
    with Run(folder / "run", identity={}, resume=True) as run:
        resumed = trained(replace(TRAINING, run=run), Watcher())
    try:
        trained(replace(TRAINING, config=TrainConfig(epochs=4, batch_size=16, lr=1e30)), Watcher())
    except UsageError as error:
        diverged = str(error)
    back = recovered()
    everyone = here.gather(torch.tensor([stopped.about["place"]["step"]]))
    if here.main:
        about = {**through.about, "diverged": diverged, "stopped": everyone.tolist()}
        write_state(State(through.tensors, about), folder / "through")
        write_state(resumed, folder / "resumed")
        write_state(back, folder / "recovered")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
