"""An interrupted training, resumed, ends with the bytes of one that was never interrupted."""

import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training_helpers import Watcher, differing, noisy_patterns, small_network, weights_of

from modelopt_cli.cli.failures import Terminated
from modelopt_cli.cli.main import _terminate
from modelopt_cli.errors import ArtifactError
from modelopt_cli.training import TrainConfig, Trained, Training, fit
from modelopt_cli.training.run_folder import Run
from modelopt_cli.training.state import State

DATA = noisy_patterns(100)
EVERYTHING = TrainConfig(
    epochs=4,
    batch_size=16,
    lr=0.3,
    nesterov=True,
    warmup=0.5,
    label_smoothing=0.1,
    mixup=0.3,
    ema=0.9,
    clip=1.0,
    val_fraction=0.1,
    augment="cifar",
)
STEPS = 4 * 6


class Ended(Exception):
    """Ends a training from within."""


class Growing(Watcher):
    """Masks that grow, and so depend on all steps so far."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = torch.ones(4, 2, 3, 3, dtype=torch.bool)

    def before_step(self, network: nn.Module, step: int, steps: int) -> None:
        super().before_step(network, step, steps)
        weight = network.get_parameter("0.weight").detach()
        kth = 1 + len(self.steps)
        self.mask &= weight.abs() >= weight.abs().flatten().kthvalue(kth).values

    def after_step(self, network: nn.Module, step: int, steps: int) -> None:
        with torch.no_grad():
            network.get_parameter("0.weight").mul_(self.mask)
        super().after_step(network, step, steps)

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), "mask": self.mask}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        super().restore(state)
        self.mask = state["mask"]


@dataclass
class Done:
    """What a training left."""

    weights: dict[str, Tensor]
    trained: Trained
    metrics: bytes


def attempt(folder: Path, config: TrainConfig, callback: Growing, *, resume: bool, **changes: Any) -> Done:
    network = small_network(dropout=0.3)
    with Run(folder, identity={"config": config.as_dict()}, resume=resume) as run:
        training = replace(Training(DATA, config=config, run=run), **changes)
        trained = fit(network, training, seed=7, callbacks=[callback])
        return Done(weights_of(network), replace(trained, seconds=0), run.metrics.read_bytes())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """By optimizer."""
    return {
        kind: attempt(tmp_path_factory.mktemp("runs") / "run", of_kind(kind), Growing(), resume=False)
        for kind in ("sgd", "adamw")
    }


def of_kind(kind: str) -> TrainConfig:
    return EVERYTHING if kind == "sgd" else replace(EVERYTHING, optimizer="adamw", lr=0.01, nesterov=False)


def check_equal(found: Done, expected: Done) -> None:
    assert not differing(found.weights, expected.weights)
    assert found.trained == expected.trained
    assert found.metrics == expected.metrics


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_interrupted_at_random_steps(kind: str, tmp_path: Path, uninterrupted: dict[str, Done]) -> None:
    """Five interruptions of one training, by a signal that arrives in the middle of a step."""
    generator = np.random.default_rng(len(kind))
    ends = sorted(generator.choice(STEPS - 1, 5, replace=False).tolist())
    config, done = of_kind(kind), 0

    class Interrupting(Growing):
        def after_step(self, network: nn.Module, step: int, steps: int) -> None:
            super().after_step(network, step, steps)
            if network is self.watched and step in ends:
                ends.remove(step)
                signal.raise_signal(signal.SIGINT)

    for end in list(ends):
        with pytest.raises(KeyboardInterrupt):
            attempt(tmp_path / "run", config, Interrupting(), resume=bool(done))
        done = end + 1
        assert state_of(tmp_path / "run", config).about["place"]["step"] == done
    check_equal(attempt(tmp_path / "run", config, Growing(), resume=True), uninterrupted[kind])


def state_of(folder: Path, config: TrainConfig) -> State:
    with Run(folder, identity={"config": config.as_dict()}, resume=True) as run:
        state = run.load("train")
    assert state is not None
    return state


@pytest.mark.parametrize("step", [0, 1, 5, 6, 10, 23])
def test_a_failure_within_a_step_goes_back_to_the_last_state(
    step: int, tmp_path: Path, uninterrupted: dict[str, Done]
) -> None:
    config = replace(EVERYTHING, save_every=4)
    callback = Growing()
    callback.before = {step: Ended()}
    with pytest.raises(Ended):
        attempt(tmp_path / "run", config, callback, resume=False)
    if step >= 4:
        saved = state_of(tmp_path / "run", config).about["place"]["step"]
        assert saved == max(step // 4 * 4, step // 6 * 6)
    check_equal(attempt(tmp_path / "run", config, Growing(), resume=True), uninterrupted["sgd"])


def test_interrupted_while_samples_are_read(tmp_path: Path, uninterrupted: dict[str, Done]) -> None:
    """Between two steps everything is saved, whatever it is that ends the training."""
    reports = iter(range(100))

    def report(stage: str, done: int, total: int | None) -> None:
        if next(reports) == 1:
            raise Ended

    with pytest.raises(Ended):
        attempt(tmp_path / "run", EVERYTHING, Growing(), resume=False, progress=report)
    assert state_of(tmp_path / "run", EVERYTHING).about["place"]["step"] > 0
    check_equal(attempt(tmp_path / "run", EVERYTHING, Growing(), resume=True), uninterrupted["sgd"])


def test_interrupted_in_validation_and_after_the_end(
    tmp_path: Path, uninterrupted: dict[str, Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelopt_cli.training import loop

    calls = []

    def interrupted(*args: Any, **options: Any) -> float:
        calls.append(len(calls))
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return percent(*args, **options)

    percent = loop.percent
    monkeypatch.setattr(loop, "percent", interrupted)
    with pytest.raises(KeyboardInterrupt):
        attempt(tmp_path / "run", EVERYTHING, Growing(), resume=False)
    assert state_of(tmp_path / "run", EVERYTHING).about["place"]["step_in_epoch"] == 6
    for _ in range(2):  # the second time there is nothing left to do
        check_equal(attempt(tmp_path / "run", EVERYTHING, Growing(), resume=True), uninterrupted["sgd"])
    assert len(calls) == 5


def test_killed_between_log_and_state(
    tmp_path: Path, uninterrupted: dict[str, Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line of an epoch whose state was not saved is dropped, and written again."""
    save = Run.save

    def full(self: Run, stage: str, state: State) -> None:
        if state.about["place"]["epoch"] > 1:
            raise OSError("no space")
        save(self, stage, state)

    monkeypatch.setattr(Run, "save", full)
    with pytest.raises(OSError, match="no space"):
        attempt(tmp_path / "run", EVERYTHING, Growing(), resume=False)
    monkeypatch.undo()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert state_of(tmp_path / "run", EVERYTHING).about["place"]["epoch"] == 1
    check_equal(attempt(tmp_path / "run", EVERYTHING, Growing(), resume=True), uninterrupted["sgd"])


def test_termination_waits_for_the_step_too(tmp_path: Path, uninterrupted: dict[str, Done]) -> None:
    class Terminating(Growing):
        def before_step(self, network: nn.Module, step: int, steps: int) -> None:
            super().before_step(network, step, steps)
            if step == 3:
                signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        with pytest.raises(Terminated):
            attempt(tmp_path / "run", EVERYTHING, Terminating(), resume=False)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # as the command line wants it
    finally:
        signal.signal(signal.SIGTERM, before)
    assert state_of(tmp_path / "run", EVERYTHING).about["place"]["step"] == 4
    check_equal(attempt(tmp_path / "run", EVERYTHING, Growing(), resume=True), uninterrupted["sgd"])


def test_a_second_interruption_does_not_wait(tmp_path: Path) -> None:
    class Stuck(Growing):
        def after_step(self, network: nn.Module, step: int, steps: int) -> None:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("unreachable")

    with pytest.raises(KeyboardInterrupt):
        attempt(tmp_path / "run", EVERYTHING, Stuck(), resume=False)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_state_of_another_training_is_refused(tmp_path: Path) -> None:
    with Run(tmp_path / "run", identity={}, resume=False) as run:
        training = Training(DATA, config=TrainConfig(epochs=1, batch_size=16), run=run)
        fit(small_network(), training, seed=0)
        with pytest.raises(ArtifactError, match="another one, of 7 steps, not 14"):
            fit(small_network(), replace(training, config=TrainConfig(epochs=2, batch_size=16)), seed=0)
        with pytest.raises(ArtifactError, match="another one, with other weights"):
            fit(nn.Sequential(nn.Flatten(), nn.Linear(72, 3)), training, seed=0)
