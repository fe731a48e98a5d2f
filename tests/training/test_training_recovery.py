"""A training that diverges goes back to its last good state, and on with a smaller learning rate."""

import json
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_helpers import Breaking, Watcher, differing, noisy_patterns, small_network, weights_of

from modelopt_cli.errors import UsageError
from modelopt_cli.training import CrossEntropy, Objective, TrainConfig, Training, fit, loop, recovery
from modelopt_cli.training.distributed import world
from modelopt_cli.training.learner import Learner
from modelopt_cli.training.loader import training_batches
from modelopt_cli.training.run_folder import Run
from modelopt_cli.training.snapshot import Place

DATA = noisy_patterns(64)
CONFIG = TrainConfig(epochs=4, batch_size=16, lr=0.2, schedule="constant")
"""4 epochs of 4 steps."""


def by_hand(returns: Mapping[int, int]) -> nn.Module:
    """The same in plain torch; ``returns`` says before which step the training goes back to which."""
    network = small_network().train()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    heavy = [p for p in network.parameters() if p.dim() > 1]
    light = [p for p in network.parameters() if p.dim() <= 1]
    groups = [{"params": heavy, "weight_decay": 5e-4}, {"params": light, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.2, momentum=0.9)
    rate, step, left, states = 0.2, 0, dict(returns), []
    batches = [b for epoch in range(4) for b in training_batches(DATA, batch_size=16, epoch=epoch, seed=5)]
    while step < 16:
        if step in left:
            weights, momenta = states[left.pop(step)]
            network.load_state_dict(weights)
            for parameter, momentum in momenta.items():
                optimizer.state[parameter]["momentum_buffer"] = momentum.clone()
            rate, step = rate / 4, returns[step]
            continue
        momenta = {p: state["momentum_buffer"].clone() for p, state in optimizer.state.items()}
        states[step:] = [(weights_of(network), momenta)]
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = F.cross_entropy(network(batches[step].inputs), batches[step].labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
    return network


@pytest.mark.parametrize(("factor", "noticed", "problem"), [
    (math.nan, 10, "the loss is not a finite number at step 11 of 16"),
    (-1e4, 12, "at the start, at step 12 of 16"),
], ids=["not finite", "far above its start"])  # fmt: skip
def test_back_to_the_last_good_state(factor: float, noticed: int, problem: str, tmp_path: Path) -> None:
    """As a plain loop, bit for bit: the third epoch goes wrong, and the second one's end is not trusted."""
    network, notes = small_network(), list[str]()
    with Run(tmp_path / "run", identity={}, resume=False) as run:
        training = Training(DATA, config=CONFIG, run=run, note=notes.append)
        trained = fit(network, training, seed=5, callbacks=[Breaking(factor=factor)])
        lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert not differing(network.state_dict(), by_hand({noticed: 4}).state_dict())
    (note,) = notes
    assert note.startswith("train: the loss is ")
    assert note.endswith(f"{problem}; going back to step 4 with the learning rate 0.05 instead of 0.2")
    assert (trained.lr, trained.returns, trained.steps) == (0.05, 1, 16)
    assert [(line["epoch"], line["lr"], line["returns"]) for line in lines] == [
        *((1, 0.2, 0), (2, 0.05, 1), (3, 0.05, 1), (4, 0.05, 1))
    ]


def test_back_to_the_start_where_nothing_better_was_reached() -> None:
    """A network that is built to diverge gets there like one that was given the smaller rate."""

    def steep() -> nn.Sequential:
        network = nn.Sequential(nn.Flatten(), nn.Linear(72, 64), nn.Linear(64, 64), nn.Linear(64, 3))
        with torch.no_grad():
            for i, parameter in enumerate(network.parameters()):
                parameter.copy_(
                    torch.linspace(-3, 3, parameter.numel()).sin().view(parameter.shape) * (1 + i)
                )
        return network

    found, given, notes = steep(), steep(), list[str]()
    trained = fit(found, Training(DATA, config=CONFIG, note=notes.append), seed=5)
    *returned, still_high = notes
    assert len(returned) == trained.returns > 0
    assert all("; going back to step 0 with" in note for note in returned)
    assert still_high.startswith("train: the loss is still high: ")
    rate = 0.2 / 4**trained.returns
    assert not fit(given, Training(DATA, config=replace(CONFIG, lr=rate)), seed=5).returns
    assert not differing(found.state_dict(), given.state_dict())


def attempt(folder: Path, *, resume: bool, stop: int | None, config: TrainConfig) -> tuple[Any, ...]:
    network, breaking = small_network(), Breaking(factor=-1e4, stop={stop} if stop is not None else set())
    with Run(folder, identity={}, resume=resume) as run:
        state = run.load("train")
        # What breaks the weights has no state of its own: it is done where the saved weights show it.
        breaking.done = state is not None and bool(
            state.tensors["network/7.weight"].abs().max() > 100 or state.about["returns"]
        )
        training = Training(DATA, config=config, run=run)
        trained = fit(network, training, seed=5, callbacks=[breaking])
        return weights_of(network), replace(trained, seconds=0), run.metrics.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"ema": 0.9, "save_every": 3, "val_fraction": 0.2}], ids=str)
def test_interrupted_after_any_step_it_ends_with_the_same_bytes(more: dict[str, Any], tmp_path: Path) -> None:
    """Before the weights break, between that and the return, and after it."""
    config = replace(CONFIG, **more)
    weights, trained, metrics = attempt(tmp_path / "whole", resume=False, stop=None, config=config)
    assert trained.returns == 1
    for stop in (7, 8, 9, 10, 12):
        folder = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            attempt(folder, resume=False, stop=stop, config=config)
        again = attempt(folder, resume=True, stop=None, config=config)
        assert not differing(again[0], weights)
        assert again[1:] == (trained, metrics)


def test_a_few_returns_and_no_more() -> None:
    notes: list[str] = []
    training = Training(DATA, config=replace(CONFIG, lr=1e30), note=notes.append)
    with pytest.raises(UsageError, match=r"train: the loss is not a finite number at step 2 of 16; lower lr"):
        fit(small_network(), training, seed=5)
    assert [note.rpartition(" with the learning rate ")[2] for note in notes] == [
        f"{1e30 / 4**i:.3g} instead of {4e30 / 4**i:.3g}" for i in range(1, 6)
    ]


def test_no_return_where_the_first_loss_is_no_number() -> None:
    """No rate can help."""
    network, notes = small_network(), list[str]()
    with torch.no_grad():
        network[7].weight.fill_(math.nan)  # type: ignore[operator, union-attr]
    with pytest.raises(UsageError, match=r"at step 1 of 16; look for it in the data"):
        fit(network, Training(DATA, config=CONFIG, note=notes.append), seed=5)
    assert not notes


def test_weights_that_the_last_step_breaks_do_not_pass() -> None:
    """No loss shows them."""
    notes: list[str] = []
    training = Training(DATA, config=CONFIG, note=notes.append)
    trained = fit(small_network(), training, seed=5, callbacks=[Breaking(after=15, factor=math.inf)])
    assert trained.returns == 1
    assert notes[0].startswith(
        "train: a weight is not a finite number at step 16 of 16; going back to step 8 "
    )


def test_long_epochs_have_good_states_within_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "WINDOW", 2)
    notes: list[str] = []
    network, training = small_network(), Training(DATA, config=CONFIG, note=notes.append)
    fit(network, training, seed=5, callbacks=[Breaking(after=10, factor=math.nan)])
    assert notes[0].partition("; ")[2].startswith("going back to step 8 ")
    assert not differing(network.state_dict(), by_hand({11: 8}).state_dict())


@pytest.mark.parametrize(
    ("after", "early", "returns"), [(5, 100, 0), (5, 4, 1), (13, 100, 1)], ids=["early", "late", "at the end"]
)
def test_a_loss_above_its_start_is_forgiven_early_only(
    after: int, early: int, returns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few times the loss at the start; the network recovers from it, where it is given the time."""
    monkeypatch.setattr(recovery, "EARLY", early)
    notes: list[str] = []
    training = Training(DATA, config=CONFIG, note=notes.append)
    trained = fit(small_network(), training, seed=5, callbacks=[Breaking(after=after, factor=-6)])
    assert (trained.returns, len(notes), trained.loss < math.log(3)) == (returns, returns, True)


class AlwaysBreaking(Watcher):
    """Sets the last weights to large ones in the last epoch, however often it is begun."""

    def before_step(self, network: nn.Module, step: int, steps: int) -> None:
        super().before_step(network, step, steps)
        if step >= 12:
            with torch.no_grad():
                large = torch.linspace(-9, 9, 48).sin().mul(9).view(3, 16)
                network[-1].weight.copy_(large)  # type: ignore[operator, union-attr, index]


def test_a_loss_above_its_start_ends_no_training_and_is_said() -> None:
    notes: list[str] = []
    training = Training(DATA, config=CONFIG, note=notes.append)
    trained = fit(small_network(), training, seed=5, callbacks=[AlwaysBreaking()])
    assert (trained.returns, trained.steps, len(notes)) == (5, 16, 6)
    still_high = f"train: the loss is still high: its mean over the last epoch is {trained.loss:.4g}, where "
    assert notes[-1].startswith(still_high)


@pytest.mark.parametrize(
    ("start", "loss", "diverged"),
    [
        *((2.7, 2.9, False), (2.7, 3.0, True)),  # an untrained network; guessing has 2.303
        *((1.02, 1.2, False), (1.02, 1.63, True)),  # one that was trained and lost some of its channels
        *((0.01, 1.2, False), (0.01, 1.63, True)),
    ],
)
def test_tuning_does_not_end_above_its_start(start: float, loss: float, diverged: bool) -> None:
    learner = Learner(
        *(nn.Linear(2, 10), TrainConfig(), CrossEntropy(), (), world("cpu")),
        classes=10,
        seed=0,
        steps_per_epoch=1,
    )
    place = Place(start=start, step=learner.steps)
    ends = pytest.raises(recovery.Diverged) if diverged else nullcontext()
    with ends:
        recovery.Recovery(learner, "tune").judge(8 * loss, 8, place)


@pytest.mark.parametrize(("start", "loss", "labels", "others"), [
    (2.7, 2.4, True, False),  # guessing has 2.303
    (2.7, 2.2, False, False),
    (2.2, 2.25, True, True),
    (500.0, 100.0, True, False),
    (500.0, 501.0, True, True),
    (0.01, 0.2, False, False),
    (0.01, 1.5, True, True),
])  # fmt: skip
def test_what_counts_as_a_high_loss_at_the_end(start: float, loss: float, labels: bool, others: bool) -> None:
    """Guessing is the measure of cross-entropy alone, and little is said of a network trained before."""

    def said(objective: Objective) -> bool:
        network, data = nn.Linear(2, 10), TrainConfig()
        learner = Learner(network, data, objective, (), world("cpu"), classes=10, seed=0, steps_per_epoch=1)
        return recovery.Recovery(learner, "train").still_high(Place(start=start, loss=loss)) is not None

    assert said(CrossEntropy()) is labels
    assert said(lambda logits, targets, inputs: logits.sum()) is others
