"""``fit`` against a loop written out in plain torch, and what it promises of the network it leaves."""

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training_helpers import CLASSES, SHAPE, Watcher, differing, noisy_patterns, small_network, weights_of

from modelopt_cli.data import open_data
from modelopt_cli.errors import DataError, InputError, UsageError
from modelopt_cli.kernels import prepare
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.quantize.apply import apply
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.program import InputSpec
from modelopt_cli.program.capture import capture
from modelopt_cli.training import TrainConfig, Training, fit, loop
from modelopt_cli.training.loader import training_batches
from modelopt_cli.training.run_folder import Run
from modelopt_cli.training.split import hold_out


def plain_loop(network: nn.Module, epochs: int, lr: float, weight_decay: float) -> None:
    """SGD with momentum and a cosine, as anybody would write it."""
    network.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    heavy = [p for p in network.parameters() if p.dim() > 1]
    light = [p for p in network.parameters() if p.dim() <= 1]
    groups = [{"params": heavy, "weight_decay": weight_decay}, {"params": light, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
    step = 0
    for epoch in range(epochs):
        for batch in training_batches(DATA, batch_size=16, epoch=epoch, seed=5):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 + math.cos(math.pi * step / (4 * epochs))) / 2
            loss = F.cross_entropy(network(batch.inputs), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1


DATA = noisy_patterns(64)


def test_equals_a_plain_loop_bit_for_bit() -> None:
    """20 steps; as a module and as a Program."""
    expected = small_network()
    plain_loop(expected, epochs=5, lr=0.2, weight_decay=1e-2)
    module, program = small_network(), capture(small_network(), InputSpec(SHAPE))
    training = Training(DATA, config=TrainConfig(epochs=5, batch_size=16, lr=0.2, weight_decay=1e-2))
    for network in (module, program):
        trained = fit(network, training, seed=5)
        assert (trained.epochs, trained.steps, trained.best) == (5, 20, None)
        assert not differing(expected.state_dict(), network.state_dict())


def test_adamw_amp_and_clipping_equal_a_plain_loop() -> None:
    expected, found = small_network(), small_network()
    expected.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in expected.parameters() if (p.dim() > 1) is heavy], "weight_decay": decay}
         for heavy, decay in ((True, 0.1), (False, 0.0))], lr=0.01
    )  # fmt: skip
    for batch in training_batches(DATA, batch_size=16, epoch=0, seed=0):
        with torch.autocast("cpu", torch.bfloat16):
            logits = expected(batch.inputs)
        assert logits.dtype is torch.bfloat16
        optimizer.zero_grad()
        F.cross_entropy(logits.float(), batch.labels).backward()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in expected.parameters()))  # type: ignore[union-attr]
        assert norm > 0.05
        for p in expected.parameters():
            assert p.grad is not None
            p.grad.mul_(0.05 / (norm + 1e-6))
        optimizer.step()
    config = TrainConfig(epochs=1, batch_size=16, optimizer="adamw", lr=0.01, weight_decay=0.1, clip=0.05)
    fit(found, Training(DATA, config=replace(config, schedule="constant", amp=True)), seed=0)
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_the_same_seed_gives_the_same_bits_and_leaves_the_callers_randomness() -> None:
    found = []
    for seed in (1, 1, 2):
        network = small_network(dropout=0.5)
        before = torch.get_rng_state()
        fit(network, Training(DATA, config=TrainConfig(epochs=2, batch_size=16, mixup=0.2)), seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(len(found))  # what the caller draws has no influence
        found.append(weights_of(network))
    assert not differing(found[0], found[1])
    assert differing(found[0], found[2])


def test_chance_is_different_in_every_step_and_the_same_in_every_run() -> None:
    class Drawing(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                drawn.append(float(torch.rand(())))
            return super().forward(x)

    runs = []
    for _ in range(2):
        drawn: list[float] = []
        fit(Drawing(*small_network()), Training(DATA, config=TrainConfig(epochs=2, batch_size=16)), seed=0)
        runs.append(drawn)
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 8


def test_dropout_acts_in_a_program_too() -> None:
    results = []
    for dropout in (0.0, 0.5):
        program = capture(small_network(dropout), InputSpec(SHAPE))
        fit(program, Training(DATA, config=TrainConfig(epochs=1, batch_size=16)), seed=0)
        results.append(weights_of(program))
    assert differing(*results)


def test_the_network_comes_back_ready_for_use() -> None:
    network = small_network()
    parameters = dict(network.named_parameters())
    network[0].weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    before = weights_of(network)
    fit(network, Training(DATA, config=TrainConfig(epochs=1, batch_size=16)), seed=0)
    assert not any(module.training for module in network.modules())
    for name, parameter in network.named_parameters():
        assert parameter is parameters[name]
        assert parameter.grad is None
        assert parameter.is_contiguous()
    assert set(before) - set(differing(before, network.state_dict())) == {"0.weight"}


def accuracy_of(network: nn.Module, x: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return 100 * float((network.eval()(x).argmax(1) == labels).float().mean())


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_best_weights_by_validation_come_back(ema: float) -> None:
    """Every epoch's weights are judged here again, by hand."""
    val = noisy_patterns(60, seed=1, noise=3.0)
    images, labels = next(iter(val.batches(60)))
    watcher, seen = Watcher(), []
    config = TrainConfig(epochs=8, batch_size=16, lr=0.5, schedule="constant", ema=ema)
    network = small_network()

    class Average(Watcher):
        """Sees the moving average's weights instead."""

        def after_step(self, network: nn.Module, step: int, steps: int) -> None:
            if network is not self.watched:
                self.weights.append(weights_of(network))

    watcher = Average() if ema else Watcher()
    trained = fit(network, Training(DATA, val, config), seed=0, callbacks=[watcher])
    for weights in watcher.weights[3::4]:
        judged = small_network()
        judged.load_state_dict(weights)
        seen.append(accuracy_of(judged, images, labels))
    best = int(np.argmax(seen))  # the first of equals
    assert len(seen) == 8
    assert best < 7, "the last epoch is the best: this would show nothing"
    assert trained.best == pytest.approx(seen[best])
    assert trained.best_epoch == best + 1
    assert not differing(network.state_dict(), watcher.weights[4 * best + 3])


def test_weights_are_chosen_among_the_later_epochs_only() -> None:
    val = noisy_patterns(60, seed=1, noise=3.0)
    config = TrainConfig(epochs=8, batch_size=16, lr=0.5, schedule="constant", patience=2)
    free = fit(small_network(), Training(DATA, val, replace(config, patience=0)), seed=0)
    assert free.best_epoch is not None
    late = fit(small_network(), Training(DATA, val, config), seed=0, choose_from=free.best_epoch / 8)
    assert late.best_epoch is not None
    assert late.best_epoch > free.best_epoch
    last = fit(small_network(), Training(DATA, val, config), seed=0, choose_from=1.0)
    assert (last.best_epoch, last.epochs) == (8, 8)


def test_patience_ends_training() -> None:
    val = noisy_patterns(60, seed=1, noise=3.0)
    config = TrainConfig(epochs=30, batch_size=16, lr=0.5, patience=2)
    reports: list[tuple[str, int, int | None]] = []
    training = Training(DATA, val, config, progress=lambda *report: reports.append(report))
    trained = fit(small_network(), training, seed=0, stage="tune")
    assert trained.best_epoch is not None
    assert trained.epochs == trained.best_epoch + 2 < 30
    assert trained.steps == 4 * trained.epochs
    assert reports[0] == ("tune", 1, 120)
    assert reports[-1] == ("tune", 120, 120)


def test_of_equal_epochs_the_first_counts() -> None:
    config = TrainConfig(epochs=9, batch_size=16, lr=1e-12, patience=3)
    val = noisy_patterns(60, seed=1, noise=3.0)
    trained = fit(nn.Sequential(nn.Flatten(), nn.Linear(72, 3)), Training(DATA, val, config), seed=0)
    assert (trained.best_epoch, trained.epochs) == (1, 4)


def test_validation_samples_are_not_trained_on() -> None:
    """Other images in their places change what is chosen, and nothing in the training."""
    training = Training(DATA, config=TrainConfig(epochs=2, batch_size=16, val_fraction=0.25))
    found = []
    for part in (None, 1, 0):
        watcher, data = Watcher(), noisy_patterns(64)
        if part is not None:
            changed = hold_out(DATA, 0.25)[part].indices
            data.source.images[list(changed or ())] *= -1  # type: ignore[union-attr]
        trained = fit(small_network(), replace(training, train=data), seed=0, callbacks=[watcher])
        found.append((trained.best, watcher.weights[-1]))
    (best, weights), (other_best, same), (_, others) = found
    assert best != other_best
    assert not differing(weights, same)
    assert differing(weights, others)


class Zeros:
    """Keeps the same half of the weights at zero."""

    def __init__(self, network: nn.Module) -> None:
        torch.manual_seed(1)
        self.masks = {n: torch.rand(p.shape) < 0.5 for n, p in network.named_parameters() if p.dim() > 1}
        self.networks: set[int] = set()

    def before_step(self, network: nn.Module, step: int, steps: int) -> None:
        assert step == 0 or self.holds(network)

    def after_step(self, network: nn.Module, step: int, steps: int) -> None:
        self.networks.add(id(network))
        with torch.no_grad():
            for name, mask in self.masks.items():
                network.get_parameter(name).mul_(mask)

    def holds(self, network: nn.Module) -> bool:
        return not any((network.get_parameter(n)[~mask] != 0).any() for n, mask in self.masks.items())

    def state(self) -> dict[str, Tensor]:
        return self.masks

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.masks = dict(state)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_callbacks_mask_holds_after_every_step_and_in_the_average(ema: float) -> None:
    network = small_network()
    zeros = Zeros(network)
    config = TrainConfig(epochs=3, batch_size=16, ema=ema, val_fraction=0.2)
    fit(network, Training(DATA, config=config), seed=0, callbacks=[zeros])
    assert zeros.holds(network)
    assert len(zeros.networks) == (2 if ema else 1)
    assert any((network.get_parameter(name)[mask] != 0).any() for name, mask in zeros.masks.items())


def test_a_single_sample_in_the_last_batch_is_no_trouble() -> None:
    """Batch norm over one value would be an error."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))
    trained = fit(network, Training(noisy_patterns(33), config=TrainConfig(epochs=1, batch_size=16)), seed=0)
    assert trained.steps == 2


def test_views_that_need_the_usual_memory_format() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(2, 4, 3), nn.Linear(64, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.conv(x).view(-1, 64))

    trained = fit(Net(), Training(DATA, config=TrainConfig(epochs=8, batch_size=16, lr=0.02)), seed=0)
    assert trained.loss < 0.3


@pytest.mark.parametrize(("look_every", "save_every"), [(1, 0), (1, 1), (12, 1)])
def test_a_loss_that_is_not_finite_names_the_step(
    look_every: int, save_every: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where losses are looked at rarely, and a state was to be saved meanwhile."""
    monkeypatch.setitem(loop._LOOK_EVERY, "alone on cpu", look_every)
    network, watcher = small_network(), Watcher()
    training = Training(DATA, config=TrainConfig(epochs=3, batch_size=16, lr=1e30, save_every=save_every))
    with (
        Run(tmp_path / "run", identity={}, resume=False) as run,
        pytest.raises(UsageError, match=r"tune: .* at step (\d+) of 12; lower lr") as caught,
    ):
        fit(network, replace(training, run=run), seed=0, stage="tune", callbacks=[watcher])
    saved = run.load("tune")
    found = re.search(r"at step (\d+) of", str(caught.value))
    assert found is not None
    step = int(found[1])
    assert step == len(watcher.steps) or look_every > 1
    # Nothing is saved once a loss has not been finite.
    assert saved is None if not save_every else saved is not None and saved.about["place"]["step"] < step
    with torch.no_grad():
        judged = copy.deepcopy(network).train()
        batches = list(training_batches(DATA, batch_size=16, epoch=0, seed=0))
        losses = []
        for i in (step - 2, step - 1):
            judged.load_state_dict(watcher.weights[i - 1] if i else weights_of(small_network()))
            losses.append(F.cross_entropy(judged(batches[i].inputs), batches[i].labels).item())
    assert math.isfinite(losses[0])
    assert not math.isfinite(losses[1])


def test_one_line_for_each_epoch(tmp_path: Any) -> None:
    import json

    with Run(tmp_path / "run", identity={}, resume=False) as run:
        config = TrainConfig(epochs=3, batch_size=16, lr=0.5, val_fraction=0.25)
        trained = fit(small_network(), Training(DATA, config=config, run=run), seed=0, stage="tune")
        lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [(line["stage"], line["epoch"], line["step"]) for line in lines] == [
        *(("tune", 1, 3), ("tune", 2, 6), ("tune", 3, 9))
    ]
    assert max(line["val_top1"] for line in lines) == trained.best
    assert lines[-1]["loss"] == trained.loss
    assert lines[0]["lr"] == pytest.approx(0.5 * (1 + math.cos(math.pi * 2 / 9)) / 2)


def int8_network() -> nn.Module:
    program = capture(small_network(), InputSpec(SHAPE))
    return prepare(apply(program, QuantizeConfig(observer="minmax"), Context(data=DATA)).program)


class Aux(nn.Module):
    """Answers in evaluation only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(72, CLASSES)

    def forward(self, x: Tensor) -> Any:
        logits = self.linear(x.flatten(1))
        return (logits, logits) if self.training else logits


class Raising(nn.Module):
    """Works in evaluation only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(72, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise ValueError("not like this")
        result: Tensor = self.linear(x.flatten(1))
        return result


def sparse_network() -> nn.Module:
    network = small_network()
    network.append(nn.Embedding(2, 2, sparse=True))
    return network


def small_norms() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES))


@pytest.mark.parametrize(
    ("network", "changes", "error", "says"),
    [
        (int8_network, {}, UsageError, "int8 layers cannot be trained"),
        (lambda: small_network().requires_grad_(False), {}, UsageError, "no weights that learn"),
        (lambda: nn.Conv2d(2, 2, 3), {}, InputError, "where a classifier returns"),
        (Aux, {}, InputError, "returns a tuple in training"),
        (Raising, {}, InputError, r"cannot run on samples of shape \(2, 6, 6\): not like this"),
        (sparse_network, {}, UsageError, "sparse gradients"),
        (small_norms, {"config": TrainConfig(batch_size=1)}, InputError, "raise batch_size"),
        (lambda: nn.Linear(5, 2), {}, DataError, "cannot run on samples of shape"),
        (small_network, {"config": TrainConfig(patience=3)}, UsageError, "patience: needs samples"),
        (small_network, {"config": TrainConfig(teacher="self")}, UsageError, "no earlier network"),
        (small_network, {"train": open_data("synthetic:2x6x6?n=4")}, DataError, "no labels"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 2)), {}, DataError, "has 3 classes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_trained(network: Any, changes: dict[str, Any], error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        fit(network(), replace(Training(DATA), **changes), seed=0)
