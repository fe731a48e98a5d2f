"""The rates that are taken where none is given: every built-in network learns with them."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_helpers import Watcher, differing, noisy_patterns, plain_network, small_network

from modelopt_cli.checkpoint.builtin import BUILTINS
from modelopt_cli.data import open_data
from modelopt_cli.data.preprocess import PreprocessOverrides
from modelopt_cli.program import InputSpec
from modelopt_cli.training import OPTIMIZERS, TrainConfig, Training, fit
from modelopt_cli.training.loader import training_batches
from modelopt_cli.training.rates import is_normalised
from modelopt_cli.training.run import Run
from modelopt_cli.training.schedule import warmup_steps

DATA = noisy_patterns(64)


def losses(name: str, folder: Path, config: TrainConfig, samples: int, width: float = 1.0) -> list[float]:
    """Of every epoch of a built-in network on bundled digits."""
    builtin = BUILTINS[name]
    shape = (builtin.channels, builtin.size, builtin.size)
    enlarged = PreprocessOverrides(resize=builtin.size, mean=(0.3,), std=(0.15,))
    digits = open_data("digits?split=train", input=InputSpec(shape), overrides=enlarged)
    torch.manual_seed(0)
    with Run(folder, identity={}, resume=False) as run:
        fit(
            builtin.make(width=width),
            Training(replace(digits, indices=range(samples)), config=config, run=run),
            seed=0,
        )
        lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert {line["returns"] for line in lines} == {0}
    return [line["loss"] for line in lines]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", BUILTINS)
def test_every_builtin_learns_with_the_defaults(name: str, optimizer: str, tmp_path: Path) -> None:
    config = TrainConfig(epochs=3, optimizer=optimizer, batch_size=16)
    first, *_, last = losses(name, tmp_path / "run", config, samples=32, width=0.5)
    assert last < first


def test_lenet5_learns_where_the_usual_rate_has_it_diverge(tmp_path: Path) -> None:
    first, *_, last = losses("lenet5", tmp_path / "run", TrainConfig(epochs=6), samples=384)
    assert last < 0.8 * first


def test_the_rate_is_the_largest_before_the_loss_rises() -> None:
    """The test again in plain torch, and a training that was given what it finds."""
    config = TrainConfig(epochs=2, batch_size=16, warmup=0.5)
    expected = rate_by_hand(plain_network(scale=100), config)
    assert 0.0125 / 256 < expected < 0.0125, "this would show nothing"
    trained, given = (plain_network(scale=100) for _ in range(2))
    notes: list[str] = []
    found = fit(trained, Training(DATA, config=config, note=notes.append), seed=3)
    assert found.lr == expected
    (note,) = notes
    assert note.startswith(f"train: the learning rate is {expected:.3g} instead of 0.0125: ")
    fit(given, Training(DATA, config=replace(config, lr=expected)), seed=3)
    assert not differing(trained.state_dict(), given.state_dict())  # the test leaves no trace


def rate_by_hand(network: nn.Module, config: TrainConfig) -> float:
    network.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    heavy, light = ([p for p in network.parameters() if (p.dim() > 1) is kind] for kind in (True, False))
    optimizer = torch.optim.SGD(
        [{"params": heavy, "weight_decay": config.weight_decay}, {"params": light, "weight_decay": 0.0}],
        lr=1.0,
        momentum=config.momentum,
    )
    batches = list(itertools.islice(training_batches(DATA, batch_size=16, epoch=0, seed=3), 4))
    best, smallest = 0.0, float("inf")
    for rate in (0.0125 / 2**i for i in range(8, -1, -1)):
        total = 0.0
        for batch in batches:
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = F.cross_entropy(network(batch.images), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() / 4
        if not total <= 1.5 * smallest:
            return best
        best, smallest = rate, min(smallest, total)
    return best


@pytest.mark.parametrize(
    "more", [{"ema": 0.9}, {"optimizer": "adamw"}, {"mixup": 0.3, "augment": "cifar", "amp": True}], ids=str
)
def test_the_rate_test_leaves_no_trace(more: dict[str, Any]) -> None:
    """In the moving average, the optimizer, companions and what is drawn."""
    config = TrainConfig(epochs=2, batch_size=16, warmup=0.5, **more)
    found, given = (plain_network(16) for _ in range(2))
    watchers = [Watcher(), Watcher()]
    rate = fit(found, Training(DATA, config=config), seed=3, companions=watchers[:1]).lr
    fit(given, Training(DATA, config=replace(config, lr=rate)), seed=3, companions=watchers[1:])
    assert not differing(found.state_dict(), given.state_dict())
    assert watchers[0].steps == watchers[1].steps


@pytest.mark.parametrize(
    ("network", "lr"),
    [(small_network, None), (lambda: plain_network(scale=1000), 1e-4)],
    ids=["normalised", "given"],
)
def test_other_rates_are_not_tested(network: Any, lr: float | None) -> None:
    config = TrainConfig(epochs=1, batch_size=16, lr=lr)
    watcher, notes = Watcher(), list[str]()
    trained = fit(network(), Training(DATA, config=config, note=notes.append), seed=0, companions=[watcher])
    assert (trained.lr, notes, len(watcher.weights)) == (config.peak_lr, [], 4)


@pytest.mark.parametrize(
    ("layer", "normalised"),
    [
        *(
            (nn.BatchNorm2d(2), True),
            (nn.GroupNorm(1, 2), True),
            (nn.LayerNorm(2), True),
            (nn.RMSNorm(2), True),
        ),
        *((nn.InstanceNorm2d(2), True), (nn.LocalResponseNorm(2), False), (nn.Dropout(), False)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layers_that_normalise(layer: nn.Module, normalised: bool) -> None:
    assert is_normalised(nn.Sequential(nn.Linear(2, 2), nn.Sequential(layer))) is normalised


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 10),
        ({"lr": 0.1}, 0),
        ({"warmup": 0.0}, 0),
        ({"warmup": 1.5}, 30),
        ({"lr": 0.1, "warmup": 1.0}, 20),
    ],
    ids=str,
)
def test_steps_of_warming_up(options: dict[str, Any], steps: int) -> None:
    assert warmup_steps(TrainConfig(epochs=10, **options), 200, 20) == steps
