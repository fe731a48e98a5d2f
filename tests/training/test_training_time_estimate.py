"""The time estimate of ``fit``: exact figures of a clock that only work moves, and nothing changed by it."""

import random
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from training_helpers import differing, noisy_patterns, normalised_network, small_network, weights_of

from modelopt_cli.training import CrossEntropy, TrainConfig, Training, fit, time_estimate, timing
from modelopt_cli.training.learner import Learner
from modelopt_cli.training.timing import TIMED, WARM_UP, Timing, timed


@pytest.fixture
def clock(monkeypatch):
    """Stands still but for what is added to ``now``."""
    made = SimpleNamespace(now=100.0)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: made.now))
    return made


@pytest.fixture
def costly(clock, monkeypatch):
    """Steps take 2 seconds, the first 10 more; batches of validation half a second."""
    step, judged, taken = Learner.step, time_estimate.judged, []

    def slow_step(self, batch, number, rate):
        clock.now += 2 if taken else 12
        taken.append(number)
        step(self, batch, number, rate)

    def slow_judged(*args, **kwargs):
        for _ in judged(*args, **kwargs):
            clock.now += 0.5
            yield

    monkeypatch.setattr(Learner, "step", slow_step)
    monkeypatch.setattr(time_estimate, "judged", slow_judged)
    return taken


def foreseen(training, **keywords):
    """The time estimate of one training."""
    training.estimates.clear()
    fit(normalised_network(), training, seed=0, **keywords)
    (found,) = training.estimates
    return found


def test_a_timing_leaves_out_the_start_and_extreme_values(clock):
    def work():
        for seconds in (9, 5, 4, 1, 2, 30, 1, 1):
            clock.now += seconds
            yield

    found = timed(work())
    assert found == Timing((9, 5, 4), (1, 2, 30, 1, 1))
    assert (found.each, found.count) == (1, 8)
    assert found.total(2) == 14
    assert found.total(103) == 18 + 100


@pytest.mark.parametrize(("pieces", "apart", "rest"), [(1, 0, 1), (2, 1, 1), (4, 3, 1), (99, WARM_UP, TIMED)])
def test_something_is_always_left_to_time(pieces, apart, rest, clock):
    found = timed(iter(range(pieces)))
    assert (len(found.first), len(found.rest)) == (apart, rest)


def test_steps_and_validations_are_counted_and_multiplied(costly):
    config = TrainConfig(epochs=5, batch_size=8, ema=0.9)
    found = foreseen(Training(noisy_patterns(64), noisy_patterns(20, seed=1), config, estimates=[]))
    assert (found.stage, found.train_samples, found.val_samples) == ("train", 64, 20)
    assert (found.epochs, found.steps_per_epoch, found.steps) == (5, 8, 40)
    assert found.timed_steps == TIMED
    assert (found.seconds_per_step, found.seconds_per_kept_step) == (2, None)
    assert found.validation_seconds == 5 * 3 * 0.5
    assert found.seconds == 10 + 40 * 2 + 7.5
    assert costly == list(range(WARM_UP + TIMED))  # over the end of the first epoch, of 8 steps


def test_epochs_whose_answers_are_kept_have_a_rate_of_their_own(costly, clock):
    class Asking(CrossEntropy):
        """Takes 7 seconds for images that it has not seen yet."""

        known: ClassVar[set[bytes]] = set()

        def __call__(self, logits, targets, inputs):
            image = inputs.batch.numpy().tobytes()
            clock.now += 0 if image in self.known else 7
            self.known.add(image)
            return super().__call__(logits, targets, inputs)

    config = TrainConfig(epochs=10, batch_size=8, augment="cifar", augmentation_cycle=2)
    training = Training(noisy_patterns(64), None, config, estimates=[])
    found = foreseen(training, objective=Asking(), kept_after=2)
    assert (found.seconds_per_step, found.seconds_per_kept_step) == (9, 2)
    assert found.seconds == 10 + 2 * 8 * 9 + 8 * 8 * 2
    Asking.known.clear()
    costly.clear()
    found = foreseen(training, objective=Asking(), kept_after=12)
    assert found.seconds_per_kept_step is None


def test_nothing_changes(tmp_path):
    """Neither the network, its mode and gradients, nor any generator of random numbers."""
    network = small_network(dropout=0.5)
    before, modes = weights_of(network), [module.training for module in network.modules()]
    parameters = list(network.parameters())
    for generator in (random, np.random):
        generator.seed(5)
    states = [random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()]
    config = TrainConfig(epochs=3, batch_size=8, augment="cifar", mixup=0.2, ema=0.9, lr=1.0)
    training = Training(noisy_patterns(), noisy_patterns(20), config, estimates=[])
    network.eval()
    done = fit(network, training, seed=0)
    assert (done.epochs, done.steps, done.best) == (0, 0, None)
    assert differing(before, weights_of(network)) == []
    assert all(a is b for a, b in zip(parameters, network.parameters(), strict=True))
    assert all(p.grad is None for p in parameters)
    assert modes == [True] * len(modes)
    assert not any(module.training for module in network.modules())
    assert states == [random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()]


def test_a_failing_step_brings_the_weights_back_too():
    network = small_network()
    before = weights_of(network)
    training = Training(noisy_patterns(), None, TrainConfig(epochs=3, batch_size=8, lr=1e30), estimates=[])
    with pytest.raises(Exception, match="not a finite number"):
        fit(network, training, seed=0)
    assert differing(before, weights_of(network)) == []
