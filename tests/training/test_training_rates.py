"""The rates that are taken where none is given: every built-in network learns with them."""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from training_helpers import Watcher, differing, noisy_patterns, normalised_network, plain_network

from modelopt_cli.checkpoint.builtin import BUILTINS
from modelopt_cli.data import open_data
from modelopt_cli.data.config import PreprocessOverrides
from modelopt_cli.program import InputSpec
from modelopt_cli.program.capture import capture
from modelopt_cli.training import OPTIMIZERS, TrainConfig, Training, fit
from modelopt_cli.training.loader import training_batches
from modelopt_cli.training.optim import warmup_steps
from modelopt_cli.training.rates import is_normalised
from modelopt_cli.training.run_folder import Run

DATA = noisy_patterns(64)


def losses(name: str, folder: Path, config: TrainConfig, samples: int, width: float = 1.0) -> list[float]:
    """Of every epoch of a built-in network on bundled digits."""
    builtin = BUILTINS[name]
    shape = (builtin.channels, builtin.size, builtin.size)
    enlarged = PreprocessOverrides(resize=builtin.size, mean=(0.3,), std=(0.15,))
    digits = open_data("digits?split=train", input_spec=InputSpec(shape), overrides=enlarged)
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
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "resnet56")) for name in BUILTINS]
)
def test_every_builtin_learns_with_the_defaults(name: str, optimizer: str, tmp_path: Path) -> None:
    config = TrainConfig(epochs=3, optimizer=optimizer, batch_size=16)
    first, *_, last = losses(name, tmp_path / "run", config, samples=32, width=0.5)
    assert last < first


@pytest.mark.slow
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
            loss = F.cross_entropy(network(batch.inputs), batch.labels)
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
    """In the moving average, the optimizer, callbacks and what is drawn."""
    config = TrainConfig(epochs=2, batch_size=16, warmup=0.5, **more)
    found, given = (plain_network(16) for _ in range(2))
    watchers = [Watcher(), Watcher()]
    rate = fit(found, Training(DATA, config=config), seed=3, callbacks=watchers[:1]).lr
    fit(given, Training(DATA, config=replace(config, lr=rate)), seed=3, callbacks=watchers[1:])
    assert not differing(found.state_dict(), given.state_dict())
    assert watchers[0].steps == watchers[1].steps


@pytest.mark.parametrize("scale", [30, 100])
def test_batch_norms_spare_no_test_where_other_layers_are_not_normalised(scale: float) -> None:
    """As in VGG networks with batch norm, whose large linear layers have none: the usual rate is too high."""

    def network() -> nn.Sequential:
        plain = plain_network(scale=scale)
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2), nn.ReLU(), *plain)

    config = TrainConfig(epochs=3, batch_size=16)
    usual = fit(network(), Training(DATA, config=replace(config, lr=config.peak_lr)), seed=3)
    assert usual.returns or usual.loss > math.log(3), "this would show nothing"
    tested = fit(network(), Training(DATA, config=config), seed=3)
    assert (tested.returns, tested.loss < 0.1) == (0, True)


@pytest.mark.parametrize(
    ("network", "lr"),
    [(normalised_network, None), (lambda: plain_network(scale=1000), 1e-6)],
    ids=["normalised", "given"],
)
def test_other_rates_are_not_tested(network: Any, lr: float | None) -> None:
    config = TrainConfig(epochs=3, batch_size=16, lr=lr)
    watcher, notes = Watcher(), list[str]()
    trained = fit(network(), Training(DATA, config=config, note=notes.append), seed=0, callbacks=[watcher])
    assert (trained.lr, len(watcher.weights)) == (config.peak_lr, 12)
    assert not any("learning rate" in note for note in notes)


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
    assert is_normalised(nn.Sequential(nn.Linear(2, 2), nn.Sequential(layer), nn.Linear(2, 2))) is normalised


def in_another_order(order: Sequence[int]) -> nn.Module:
    """Layers that are registered in one order, and called in ``order``."""

    class Reordered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2), nn.LayerNorm(2), nn.LayerNorm(2)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for number in order:
                x = self.layers[number](x)
            return x

    return Reordered()


@pytest.mark.parametrize(
    ("network", "normalised"),
    [
        (nn.Linear(2, 2), False),
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)), True),
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2), nn.Linear(2, 2)), False),
        (nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.Linear(2, 2)), False),
        (nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2), nn.BatchNorm1d(2)), True),
        (in_another_order([0, 2, 1, 3]), False),
        (fx.symbolic_trace(in_another_order([0, 2, 1, 3])), True),
        (fx.symbolic_trace(in_another_order([2, 0, 1, 3])), False),
    ],
    ids=["single", "between", "missing", "before", "frozen", "registered", "graph", "graph without"],
)
def test_every_layer_must_be_followed_by_one_that_normalises(network: nn.Module, normalised: bool) -> None:
    assert is_normalised(network) is normalised


@pytest.mark.parametrize(
    ("name", "normalised"), [("resnet8", True), ("resnet20", True), ("lenet5", False), ("cnn2", False)]
)
def test_built_in_residual_networks_keep_the_usual_rate(name: str, normalised: bool) -> None:
    """Traced as training traces them, too: the graph's modules are registered in an order of their own."""
    builtin = BUILTINS[name]
    network = builtin.make(width=0.5)
    program = capture(network, InputSpec((builtin.channels, builtin.size, builtin.size)))
    assert (is_normalised(network), is_normalised(program)) == (normalised, normalised)


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
