"""Schedules, optimizers, averages, mixup, objectives and the split against formulas written out here."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from modelopt_cli.checkpoint.builtin import BUILTINS
from modelopt_cli.data import open_data
from modelopt_cli.errors import DataError, UsageError
from modelopt_cli.program import InputSpec
from modelopt_cli.program.capture import capture
from modelopt_cli.training import CrossEntropy, Distillation, StepInputs, TrainConfig, objective
from modelopt_cli.training.ema import MovingAverage
from modelopt_cli.training.mixup import draw_mixup, mix
from modelopt_cli.training.optim import learning_rate, make_optimizer, optimizer_state, restore_optimizer
from modelopt_cli.training.split import hold_out, samples


def rates(config: TrainConfig, per_epoch: int) -> list[float]:
    steps = config.epochs * per_epoch
    return [learning_rate(config, config.peak_lr, step, steps, per_epoch) for step in range(steps)]


def test_cosine_follows_torch() -> None:
    config = TrainConfig(epochs=3, lr=0.4)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)
    for rate in rates(config, 10):
        assert rate == pytest.approx(reference.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        reference.step()


def test_warm_up_then_cosine() -> None:
    found = rates(TrainConfig(epochs=2, lr=1.0, warmup=0.4), 10)
    assert found[:5] == pytest.approx([1 / 5, 2 / 5, 3 / 5, 4 / 5, 1.0])
    assert found[5:] == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 16)) for i in range(1, 16)])


def test_step_and_constant() -> None:
    steps = rates(TrainConfig(epochs=4, lr=2.0, schedule="step"), 5)
    assert steps == pytest.approx([2.0] * 10 + [0.2] * 5 + [0.02] * 5)
    assert rates(TrainConfig(epochs=1, lr=2.0, schedule="constant"), 3) == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ({}, 0.1),
        ({"batch_size": 32}, 0.025),
        ({"optimizer": "adamw", "batch_size": 32}, 1e-3),
        ({"lr": 3.0}, 3.0),
    ],
)
def test_default_learning_rate(options: dict[str, Any], rate: float) -> None:
    assert TrainConfig(**options).peak_lr == pytest.approx(rate)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"optimizer": "lion"}, "optimizer"),
        ({"schedule": "linear"}, "schedule"),
        ({"augment": "strong"}, "augment"),
        ({"teacher": "resnet"}, "teacher"),
        ({"epochs": 0}, "epochs"),
        ({"lr": 0.0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"momentum": 1.0}, "momentum"),
        ({"val_fraction": -0.1}, "val_fraction"),
        ({"distill_weight": 1.5}, "distill_weight"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov"),
        ({"optimizer": "adamw", "nesterov": True}, "no meaning for adamw"),
        ({"optimizer": "adamw", "momentum": 0.8}, "no meaning for adamw"),
        ({"warmup": 1e308}, "warmup"),
    ],
)
def test_settings_out_of_range_are_named(options: dict[str, Any], names: str) -> None:
    with pytest.raises(UsageError, match=names):
        TrainConfig(**options)


class Mixed(nn.Module):
    """One of everything that may or may not decay."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)
        self.layer_norm, self.linear = nn.LayerNorm((3, 2)), nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(3, 3), requires_grad=False)


def test_only_weights_decay() -> None:
    network = Mixed()
    optimizer = make_optimizer(network, TrainConfig(weight_decay=0.1))
    by_decay = {g["weight_decay"]: {id(p) for p in g["params"]} for g in optimizer.param_groups}
    names = {
        decay: {n for n, p in network.named_parameters() if id(p) in ids} for decay, ids in by_decay.items()
    }
    assert names[0.1] == {"conv.weight", "linear.weight"}
    assert names[0.0] == {
        *("conv.bias", "linear.bias", "norm.weight", "norm.bias"),
        *("layer_norm.weight", "layer_norm.bias", "scale"),
    }


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_optimizer_state_goes_into_another_optimizer(kind: str) -> None:
    torch.manual_seed(0)
    config = TrainConfig(optimizer=kind, lr=0.1)
    first = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(4, 2, 5, 5)

    def learn(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        network(x).square().sum().backward()
        optimizer.step()

    optimizer = make_optimizer(first, config)
    learn(first, optimizer)
    second = copy.deepcopy(first)
    again = make_optimizer(second, config)
    saved = {
        name: t.clone(memory_format=torch.contiguous_format) for name, t in optimizer_state(optimizer).items()
    }
    restore_optimizer(again, saved)
    for _ in range(2):
        learn(first, optimizer)
        learn(second, again)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_moving_average_follows_its_formula() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    average = MovingAverage(network, 0.6)
    expected = {name: t.clone() for name, t in network.state_dict().items()}
    for step in range(20):
        for tensor in network.state_dict().values():
            tensor.add_(torch.randn(()).to(tensor.dtype) if tensor.is_floating_point() else 1)
        decay = min(0.6, (1 + step) / (10 + step))
        average.update(step)
        for name, tensor in network.state_dict().items():
            old = expected[name]
            expected[name] = (
                decay * old + (1 - decay) * tensor if tensor.is_floating_point() else tensor.clone()
            )
    for name, tensor in average.network.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-12, atol=1e-12)
    assert not average.network.training


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def some_logits(seed: int) -> tuple[Tensor, np.ndarray]:
    logits = np.random.default_rng(seed).normal(size=(5, 4)) * 3
    return torch.from_numpy(logits), logits


def test_label_smoothing_by_hand() -> None:
    logits, plain = some_logits(1)
    labels = np.array([0, 3, 1, 1, 2])
    targets = 0.8 * np.eye(4)[labels] + 0.2 / 4
    expected = -(targets * log_softmax(plain)).sum(1).mean()
    found = CrossEntropy(0.2)(logits, torch.from_numpy(labels), StepInputs(torch.empty(0)))
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_mixup_by_hand() -> None:
    generator = np.random.default_rng(0)
    images, labels = generator.normal(size=(5, 2, 3)), np.array([0, 3, 1, 1, 2])
    partner, share = np.array([4, 0, 1, 3, 2]), 0.3
    mixed, targets = mix(
        torch.from_numpy(images), torch.from_numpy(labels), 4, share, torch.from_numpy(partner)
    )
    np.testing.assert_allclose(mixed.numpy(), share * images + (1 - share) * images[partner], rtol=1e-12)
    wanted = share * np.eye(4)[labels] + (1 - share) * np.eye(4)[labels[partner]]
    np.testing.assert_allclose(targets.numpy(), wanted, rtol=1e-12)

    logits, plain = some_logits(2)
    smooth = 0.9 * wanted + 0.1 / 4
    expected = -(smooth * log_softmax(plain)).sum(1).mean()
    found = CrossEntropy(0.1)(logits, targets, StepInputs(mixed))
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_mixup_draws_belong_to_the_step() -> None:
    share, partner = draw_mixup(0.4, 9, seed=3, step=7)
    assert 0 <= share <= 1
    assert sorted(partner.tolist()) == list(range(9))
    again = draw_mixup(0.4, 9, seed=3, step=7)
    assert again[0] == share
    assert torch.equal(again[1], partner)
    shares = [draw_mixup(0.4, 9, seed=3, step=step)[0] for step in range(2000)]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.03)
    assert np.var(shares) == pytest.approx(1 / (4 * (2 * 0.4 + 1)), abs=0.01)  # of Beta(a, a)


def test_distillation_by_hand() -> None:
    torch.manual_seed(0)
    teacher = nn.Linear(3, 4).double()
    images = torch.randn(5, 3, dtype=torch.float64)
    logits, plain = some_logits(3)
    labels = torch.tensor([0, 3, 1, 1, 2])
    answers = images.numpy() @ teacher.weight.detach().numpy().T + teacher.bias.detach().numpy()
    temperature, weight = 3.0, 0.7
    soft, own = log_softmax(answers / temperature), log_softmax(plain / temperature)
    divergence = (np.exp(soft) * (soft - own)).sum(1).mean()
    hard = -log_softmax(plain)[np.arange(5), labels.numpy()].mean()
    expected = (1 - weight) * hard + weight * temperature**2 * divergence
    config = TrainConfig(teacher="self", distill_weight=weight, temperature=temperature)
    found = objective(config, teacher)(logits, labels, StepInputs(images))
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_teacher_does_not_change_with_the_student() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)).train()
    aim = Distillation(network, 1.0, 1.0)
    images = torch.randn(6, 3)
    with torch.no_grad():
        logits = network.eval()(images).clone()
        network[0].weight.add_(1.0)  # type: ignore[operator, union-attr]
    loss = aim(logits, torch.zeros(6, dtype=torch.int64), StepInputs(images))
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_teacher_is_missing_or_of_other_classes() -> None:
    with pytest.raises(UsageError, match="no earlier network"):
        objective(TrainConfig(teacher="self"))
    with pytest.raises(UsageError, match="the teacher returns"):
        Distillation(nn.Linear(3, 5), 0.5, 1.0)(
            torch.zeros(2, 4), torch.zeros(2).long(), StepInputs(torch.zeros(2, 3))
        )


def test_split_is_disjoint_complete_and_always_the_same() -> None:
    data = open_data("digits", input_spec=InputSpec((1, 8, 8)))
    train, val = hold_out(data, 0.25)
    assert (len(val), len(train)) == (round(0.25 * len(data)), len(data) - len(val))
    chosen = [*(train.indices or ()), *(val.indices or ())]
    assert sorted(chosen) == list(data.indices if data.indices is not None else range(len(data)))
    assert hold_out(data, 0.25)[1].indices == val.indices
    nested = hold_out(train, 0.5)[1].indices or ()
    assert set(nested) <= set(train.indices or ())


def test_samples_are_the_same_objects_again() -> None:
    data = open_data("digits", input_spec=InputSpec((1, 8, 8)))
    first, again = samples(data, None, 0.1, 10), samples(data, None, 0.1, 10)
    assert first[0] is again[0]
    assert first[1] is again[1]
    own = samples(data, data.sample(5), 0.1, 10)
    assert len(own[0]) == len(data)
    assert own[1] is not None
    assert len(own[1]) == 5
    assert samples(data, None, 0.0, 10)[1] is None


def test_what_cannot_be_split() -> None:
    data = open_data("digits", input_spec=InputSpec((1, 8, 8)))
    with pytest.raises(DataError, match="too few"):
        hold_out(data.sample(1), 0.5)
    with pytest.raises(DataError, match="no labels"):
        samples(open_data("synthetic:1x8x8?n=4", input_spec=InputSpec((1, 8, 8))), None, 0.0, 10)
    with pytest.raises(DataError, match="has 10 classes"):
        samples(data, None, 0.0, 9)


def test_the_average_of_a_graph_follows_each_tensor_under_its_own_name() -> None:
    """A copied graph has its parameters in another order, some of them of the same shape."""
    torch.manual_seed(0)
    module = BUILTINS["resnet8"].make(10, 3, width=0.25)
    network = capture(module, InputSpec((3, 32, 32)))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    average = MovingAverage(network, 0.5)
    with torch.no_grad():
        for tensor in network.parameters():
            tensor.copy_(torch.randn_like(tensor))
    average.update(0)
    followed = average.network.state_dict()
    for name, tensor in network.named_parameters():
        expected = before[name] + 0.9 * (tensor - before[name])
        torch.testing.assert_close(followed[name], expected)
