"""quantize with its training: batch norms, few bits that recover, integers that compute what was trained."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelopt_cli.artifact.encodings import compact, pruned_names
from modelopt_cli.data import Data, open_data
from modelopt_cli.errors import UsageError
from modelopt_cli.kernels import prepare
from modelopt_cli.methods.batches import input_batches
from modelopt_cli.methods.context import Context, MethodResult
from modelopt_cli.methods.quantize import layer_forms
from modelopt_cli.methods.quantize.apply import apply
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.learning import integer_training, qat
from modelopt_cli.methods.quantize.learning.latent_layers import Latent, LatentNorm
from modelopt_cli.methods.quantize.learning.latent_norms import (
    folded_norms,
    identity_norms,
    restore_statistics,
)
from modelopt_cli.methods.quantize.static import quantize_static
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.capture import capture
from modelopt_cli.program.quantized import Weighted
from modelopt_cli.tasks import CLASSIFY, parse_task
from modelopt_cli.training import TrainConfig, Training, fit

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEMES = ("int8", "int8-dynamic", "int8-weight")


class Net(nn.Module):
    """A residual network of four convolutions with batch norms, for digits of 8x8."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.a, self.norm_a = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.b, self.norm_b = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.c, self.norm_c = nn.Conv2d(12, 16, 3, stride=2), nn.BatchNorm2d(16, momentum=None)
        self.fc = nn.Linear(16 * 9, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.norm_b(self.b(torch.relu(self.norm_a(self.a(x))))) + x)
        result: Tensor = self.fc(torch.relu(self.norm_c(self.c(x))).flatten(1))
        return result


@pytest.fixture(scope="module")
def digits() -> Data:
    return open_data("digits?split=train").sample(640)


@pytest.fixture(scope="module")
def network(digits: Data) -> Program:
    torch.manual_seed(0)
    network = capture(Net().eval(), InputSpec((1, 8, 8)), verify=False)
    fit(network, Training(digits, config=TrainConfig(epochs=6, batch_size=32, lr=0.05)), seed=0)
    return network


def context(digits: Data, **settings: Any) -> Context:
    config = TrainConfig(**{"epochs": 2, "batch_size": 32, **settings})
    return Context(data=digits, training=Training(digits, config=config))


def exact(program: Program) -> Program:
    return prepare(copy.deepcopy(program).eval(), "cpu", "reference")


def inputs_of(digits: Data) -> tuple[Tensor, Tensor]:
    batch: tuple[Tensor, Tensor] = next(iter(digits.batches(640)))
    return batch


def accuracy(program: Program, digits: Data) -> float:
    pictures, labels = inputs_of(digits)
    with torch.no_grad():
        return float((exact(program)(pictures).argmax(1) == labels).float().mean())


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Program]]:
    """The trained networks, as they are when they become integers."""
    trained: list[Program] = []
    convert = qat.convert

    def keeping(network: Program, program: Program) -> Program:
        trained.append(network)
        return convert(network, program)

    with monkeypatch.context() as patch:
        patch.setattr(qat, "convert", keeping)
        yield trained


def prepared(network: Program, digits: Data, **bits: Any) -> tuple[MethodResult, Program]:
    config, given = QuantizeConfig("int8", **bits), Context(data=digits)
    result = quantize_static(network, config, given)
    assert result.floats is not None
    norms = identity_norms(network, result.floats, input_batches(digits, given))
    weights = integer_training._weights(result.floats, result.program)
    return result, qat.prepare(result.program, weights, norms)


# Before a step is taken.


@pytest.mark.slow
def test_training_starts_from_the_network_as_it_was_rounded(network: Program, digits: Data) -> None:
    result, start = prepared(network, digits, weight_bits=3, act_bits=4)
    layers = {name: layer for name, layer in start.named_modules() if isinstance(layer, Latent)}
    assert {name for name, layer in layers.items() if layer.norm is not None} == {"stem", "a", "b", "c"}
    assert result.floats is not None
    for name, layer in layers.items():
        whole = result.program.get_submodule(name).weight
        assert torch.equal(layer.steps(), whole)
        before = result.floats.get_submodule(name).weight / layer.scale.view(-1, *[1] * (whole.dim() - 1))
        after = layer.weight / layer.scale.view(-1, *[1] * (whole.dim() - 1))
        free = (before - whole).abs() < 0.49  # rounded to the nearest
        torch.testing.assert_close(after[free], before[free])
        assert free.float().mean() > 0.8
    made = qat.convert(start.eval(), result.program)
    for name, tensor in made.state_dict().items():
        torch.testing.assert_close(tensor, result.program.state_dict()[name], rtol=1e-5, atol=1e-6)
    pictures, _ = inputs_of(digits)
    with torch.no_grad():
        found, expected = start(pictures), exact(result.program)(pictures)
    assert ((found - expected).abs() < 1e-4 * expected.std()).float().mean() > 0.9


def test_norms_restore_the_statistics_of_the_float_layers(network: Program, digits: Data) -> None:
    result, start = prepared(network, digits)
    assert result.floats is not None
    pictures, _ = inputs_of(digits)
    seen: dict[str, Tensor] = {}
    floats = copy.deepcopy(result.floats)
    for name in ("stem", "a", "b", "c"):
        floats.get_submodule(name).register_forward_hook(
            lambda layer, args, y, name=name: seen.update({name: y.detach()})
        )
    with torch.no_grad():
        floats(pictures)
    for name, y in seen.items():
        norm = start.get_submodule(name).norm
        assert isinstance(norm, LatentNorm)
        torch.testing.assert_close(norm.bias, y.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.weight, (y.var((0, 2, 3)) + norm.eps).sqrt(), rtol=1e-4, atol=1e-5)
    assert start.get_submodule("c").norm.momentum == 0.1  # its own has none


def test_layers_that_are_called_twice_keep_their_norms_folded() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.last = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)
            self.norm_last = nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.conv(torch.relu(self.norm(self.conv(x)))))
            result: Tensor = self.norm_last(self.last(x))
            return result

    program = capture(Twice().eval(), InputSpec((3, 4, 4)), verify=False)
    result = quantize_static(program, QuantizeConfig(), Context(data=open_data("synthetic:3x4x4")))
    assert result.floats is not None
    assert set(folded_norms(program, result.floats)) == {"last"}


# The training.


def test_a_norm_is_folded_with_the_statistics_of_all_batches(network: Program, digits: Data) -> None:
    result, trained = prepared(network, digits, weight_bits=4)
    with torch.no_grad():  # the first layer's weights move, and its norm with them
        trained.get_submodule("stem").weight.mul_(1.5)
        trained.get_submodule("stem").norm.weight.mul_(-2)  # its size alone counts
    restore_statistics(trained.eval(), input_batches(digits, Context(batch_size=100)), "cpu")
    stem: Any = trained.get_submodule("stem")
    assert not any(module.training for module in trained.modules())
    pictures, _ = inputs_of(digits)
    with torch.no_grad():
        rounded = trained.get_submodule("x_quantized")(pictures)
        sums = nn.functional.conv2d(rounded, stem.rounded(), stem.bias, padding=1)
    torch.testing.assert_close(stem.norm.running_mean, sums.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stem.norm.running_var, sums.var((0, 2, 3)), rtol=1e-4, atol=1e-5)
    made: Any = qat.convert(trained, result.program).get_submodule("stem")
    factor = stem.norm.weight.abs() / (sums.var((0, 2, 3)) + stem.norm.eps).sqrt()
    expected = factor.view(-1, 1, 1) * (sums - sums.mean((0, 2, 3)).view(-1, 1, 1)) + stem.norm.bias.view(
        -1, 1, 1
    )
    with torch.no_grad():
        found = nn.functional.conv2d(rounded, made.float_weight(), made.bias, padding=1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("act_bits", [2, 4])
def test_what_rounding_to_few_bits_loses_is_learned_again(
    act_bits: int, network: Program, digits: Data
) -> None:
    rounding = {"observer": "mse", "equalize": "none", "bias_correction": "none"}  # which lose the most
    config = QuantizeConfig(weight_bits=2, act_bits=act_bits, edge_bits=2, **rounding)
    rounded = apply(network, config, Context(data=digits)).program
    trained = apply(network, config, context(digits)).program
    full, before, after = (accuracy(each, digits) for each in (network, rounded, trained))
    assert full > 0.98
    assert before < 0.75
    assert after > 0.95
    assert not trained.training
    for name, layer in trained.named_modules():
        if isinstance(layer, Weighted):
            other: Any = rounded.get_submodule(name)
            assert (type(layer), layer.weight_bits) == (type(other), other.weight_bits)
            layer.check()
            assert not torch.equal(layer.scale, other.scale)
    entry = trained.history[-1]
    assert entry["training"]["teacher"] == "self"
    assert entry["training"]["lr"] == pytest.approx(0.1 * 32 / 128 * 0.3)
    assert entry["coverage"] == rounded.history[-1]["coverage"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_integers_compute_what_was_trained(
    scheme: str, network: Program, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = QuantizeConfig(scheme, weight_bits=4, edge_bits=4)
    with watched(monkeypatch) as trained:
        made = apply(network, config, context(digits, epochs=1)).program
    pictures, _ = inputs_of(digits)
    with torch.no_grad():
        found, expected, kernels = (
            trained[0](pictures),
            exact(made)(pictures),
            prepare(copy.deepcopy(made))(pictures),
        )
    apart = (found - expected).abs() / expected.std()
    assert (apart < 1e-5).float().mean() > 0.95  # elsewhere a rounding went the other way
    assert apart.max() < 0.05
    assert (found.argmax(1) == expected.argmax(1)).all()
    assert ((kernels - expected).abs() < 1e-5 * expected.std()).float().mean() > 0.95
    rounded = apply(network, config, Context(data=digits)).program
    assert not torch.equal(made.state_dict()["fc.weight"], rounded.state_dict()["fc.weight"])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_pruned_weights_stay_zero(scheme: str, network: Program, digits: Data) -> None:
    pruned = copy.deepcopy(network)
    with torch.no_grad():
        for name in ("b.weight", "fc.weight"):
            weight = pruned.get_parameter(name)
            weight.masked_fill_(weight.abs() < weight.abs().quantile(0.6), 0)
    pruned.encodings = compact(pruned, ("b.weight", "fc.weight"))
    made = apply(pruned, QuantizeConfig(scheme, weight_bits=4), context(digits, epochs=1)).program
    assert pruned_names(made.encodings) == {"b.weight", "fc.weight"}
    for name in ("b.weight", "fc.weight"):
        after = made.state_dict()[name]
        assert not after[pruned.get_parameter(name) == 0].any()
        assert after.any()


def test_shared_weights_are_refused_before_anything_is_calibrated(network: Program, digits: Data) -> None:
    shared = copy.deepcopy(network)
    shared.history = ({"method": "share"},)
    given = replace(context(digits), data=None)
    with pytest.raises(UsageError, match="the weights: were shared, which training would undo"):
        apply(shared, QuantizeConfig(), given)


def test_recurrent_layers_of_integers_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, digits: Data
) -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.fc = nn.GRU(8, 8, batch_first=True), nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.fc(self.gru(x.flatten(1, 2))[0][:, -1])
            return result

    monkeypatch.setattr(layer_forms, "LEAST_HIDDEN", 8)
    rows = capture(Rows().eval(), InputSpec((1, 8, 8)), verify=False)
    with pytest.raises(UsageError, match=r"gru: is a recurrent layer of integers.*exclude='gru'"):
        apply(rows, QuantizeConfig(), context(digits))
    trained = apply(rows, QuantizeConfig(exclude=("gru",)), context(digits, epochs=1)).program
    assert not torch.equal(trained.get_parameter("gru.weight_hh_l0"), rows.get_parameter("gru.weight_hh_l0"))


@pytest.mark.parametrize("scheme", ["fp16", "bf16"])
def test_a_scheme_without_integers_is_not_trained(scheme: str, network: Program, digits: Data) -> None:
    with pytest.raises(UsageError, match=f"{scheme}'?: casts weights, which leaves nothing to train with"):
        apply(network, QuantizeConfig(scheme), context(digits))


@pytest.mark.parametrize(
    ("task", "teacher", "used"),
    [
        ("classify", None, "self"),
        ("classify", "none", "none"),
        ("regress", None, "self"),
        ("own", None, None),
    ],
)
def test_the_float_network_teaches_where_outputs_can_be_compared(
    task: str, teacher: str | None, used: str | None, digits: Data
) -> None:
    spec = replace(CLASSIFY, chosen_loss="own") if task == "own" else parse_task(task)
    training = Training(digits, config=TrainConfig(teacher=teacher, lr=0.02), task=spec)
    chosen = integer_training.settings_of(QuantizeConfig(), Context(training=training))
    assert (chosen.teacher, chosen.lr) == (used, 0.02)


@pytest.mark.parametrize(
    ("config", "rate"),
    [
        (QuantizeConfig(), 0.01),
        (QuantizeConfig(weight_bits=3), 0.01),
        (QuantizeConfig(act_bits=2), 0.03),
        (QuantizeConfig("int8-weight", weight_bits=2), 0.03),
    ],
)
def test_two_bits_learn_at_a_larger_rate(config: QuantizeConfig, rate: float, digits: Data) -> None:
    given = Context(training=Training(digits, config=TrainConfig(batch_size=128)))
    assert integer_training.settings_of(config, given).lr == pytest.approx(rate)
