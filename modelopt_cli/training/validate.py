"""Accuracy on the validation samples, each classified by one process."""

from collections.abc import Iterator

from torch import nn

from modelopt_cli.data import Data
from modelopt_cli.measure import accuracy
from modelopt_cli.measure.tally import Tally
from modelopt_cli.program.input_batch import to
from modelopt_cli.tasks import TaskSpec
from modelopt_cli.training.distributed import World
from modelopt_cli.training.loader import ordered_batches


def correct(
    network: nn.Module, data: Data | None, batch_size: int, *, workers: int, device: str
) -> tuple[int, int]:
    """Number of samples that are classified correctly, and number of samples; (0, 0) for None.

    The network's own mode is used.

    Raises:
        InputError: the network returns NaN.
        DataError: a sample cannot be read.
    """
    if data is None:
        return 0, 0
    tally = Tally("the network", labelled=True)
    for _ in judged(network, data, batch_size, tally, workers=workers, device=device):
        pass
    right = tally.result().correct
    assert right is not None
    return int(right.sum()), right.size


def judged(
    network: nn.Module, data: Data, batch_size: int, tally: Tally, *, workers: int, device: str
) -> Iterator[None]:
    """Adds a batch to ``tally`` whenever the next item is asked for. Raises as :func:`correct`."""
    for inputs, labels in ordered_batches(data, batch_size, workers=workers):
        tally.add(accuracy.run(network, to(inputs, device), "the network"), labels, inputs)
        yield


def percent(network: nn.Module, shard: Data | None, batch_size: int, *, workers: int, world: World) -> float:
    """Top-1 accuracy over the shards of all processes, in percent."""
    modes = network.training
    network.eval()
    try:
        right, total = world.sum(*correct(network, shard, batch_size, workers=workers, device=world.device))
    finally:
        network.train(modes)
    return 100.0 * right / total


def main_metric(
    network: nn.Module, data: Data, batch_size: int, task: TaskSpec, *, workers: int, device: str
) -> float | None:
    """The task's main metric on all of the data; None where it is not a number, see ``Metric.undefined``.

    Raises:
        InputError: the network is not one for the task, or returns NaN.
        DataError: a sample cannot be read, or its target does not go with the network.
    """
    tally, modes = Tally("the network", task, labelled=True, name=data.where), network.training
    network.eval()
    try:
        for _ in judged(network, data, batch_size, tally, workers=workers, device=device):
            pass
    finally:
        network.train(modes)
    scored = tally.result()
    return scored.metrics()[next(iter(scored.rows))]
