"""The largest learning rate, where nobody gives one: a short range test before the first step.

L. Smith, "Cyclical learning rates for training neural networks", WACV 2017, section 3.3: train a little with
a rate that grows, and see where the loss begins to rise. Networks that normalise what each layer returns do
not need it: their weights' scale has no influence on their outputs, and the usual rates suit them all.
"""

from collections.abc import Iterable, Iterator
from itertools import islice, pairwise
from operator import attrgetter

from torch import Tensor, fx, nn

from modelopt_cli.training.learner import Learner
from modelopt_cli.training.loader import Batch
from modelopt_cli.training.meter import LossMeter
from modelopt_cli.training.optim import NORMS
from modelopt_cli.training.snapshot import Place, kept, restore

DOUBLINGS = 8
"""The first rate is the usual one halved so often, and each is twice the one before."""
BATCHES = 4
"""Batches of the test, the same for every rate, so that losses differ by the rate alone; a step for each."""
TOO_HIGH = 1.5
"""The loss has risen when it is so many times the smallest at the rates before."""
STEPS = BATCHES * (DOUBLINGS + 1)


def needs_test(learner: Learner) -> bool:
    """True if the rate of a training is to be found by :func:`tested_rate`."""
    return learner.config.lr is None and not is_normalised(learner.network)


def is_normalised(network: nn.Module) -> bool:
    """True if every layer with weights but the last is followed by one that normalises.

    Over samples or over channels.
    """
    normalise = [
        isinstance(it, NORMS) for it in _layers(network) if isinstance(it, NORMS) or _has_weights(it)
    ]
    return any(normalise) and all(layer or following for layer, following in pairwise(normalise))


def _layers(network: nn.Module) -> Iterator[nn.Module | Tensor]:
    """Layers and single weights, in the order in which a graph runs them or, without one, of their names."""
    if not isinstance(network, fx.GraphModule):
        yield from network.modules()
        return
    for node in network.graph.nodes:
        if node.op == "call_module":
            yield from network.get_submodule(node.target).modules()
        elif node.op == "get_attr":
            yield attrgetter(node.target)(network)


def _has_weights(layer: nn.Module | Tensor) -> bool:
    """True if parameters of the layer itself learn, other than biases and scales of channels."""
    own = [layer] if isinstance(layer, Tensor) else layer.parameters(recurse=False)
    return any(p.requires_grad and p.dim() > 1 for p in own)


def tested_rate(learner: Learner, batches: Iterable[Batch]) -> float:
    """The largest tested rate below that from which on the loss rises; the learner is as it was before.

    Collective: every process gets the same one.

    Args:
        learner: one that has taken no step.
        batches: the first of its training, of which ``BATCHES`` are used.
    """
    before = kept(learner, Place(), {})
    first = list(islice(batches, BATCHES))
    learner.network.train()
    rates = [learner.lr * 0.5**halvings for halvings in range(DOUBLINGS, -1, -1)]
    largest, smallest_loss = rates[0], float("inf")
    for rate in rates:
        loss = _loss_at(rate, learner, first)
        if not loss <= TOO_HIGH * smallest_loss:
            break
        largest, smallest_loss = rate, min(smallest_loss, loss)
    restore(learner, before)
    return largest


def _loss_at(rate: float, learner: Learner, batches: list[Batch]) -> float:
    """The mean loss over a step on each batch; NaN where one is not finite."""
    learner.meter = LossMeter()
    for step, batch in enumerate(batches):
        learner.step(batch, step, rate)
    bad = learner.meter.take_in()
    broken, total, samples = learner.world.sum(bad is not None, learner.meter.total, learner.meter.samples)
    return float("nan") if broken else total / samples
