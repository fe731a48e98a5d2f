"""Training int8 networks: the values against integer arithmetic, gradients, the bound, zeros, learning."""

import copy
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from quantize_networks import captured, images, quantized, small, torchvision_program
from quick_cases import quick
from torch import Tensor, fx, nn

from modelopt_cli.artifact import read_program, write_program
from modelopt_cli.artifact.encodings import compact, is_pruned, pruned_names
from modelopt_cli.data import Data, open_data
from modelopt_cli.errors import UsageError
from modelopt_cli.kernels import never_saturates, prepare
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.distill.apply import apply as distill
from modelopt_cli.methods.distill.config import DistillConfig
from modelopt_cli.methods.distill.distill_context import DistillContext
from modelopt_cli.methods.distill.teacher import TeacherMember
from modelopt_cli.methods.quantize.apply import apply as quantize
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.learning import qat
from modelopt_cli.methods.quantize.learning.fake_quantize import fake_quantize, nearest_steps
from modelopt_cli.methods.quantize.learning.latent_layers import Latent, LatentForm, LatentLinear
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.quantization import QParams, dequantize
from modelopt_cli.program.quantized import Weighted
from modelopt_cli.program.quantized_convolutions import QuantizedConv2d
from modelopt_cli.program.quantized_operations import QuantizedMaxPool
from modelopt_cli.training import TrainConfig, Training, fit
from modelopt_cli.training.run_folder import Run

SCHEMES = ("int8", "int8-dynamic", "int8-weight")


pytestmark = pytest.mark.usefixtures("one_thread")


# What is computed.


class Everything(nn.Module):
    """Every int8 layer, and every function that passes uint8 on."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3)
        self.depth = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.squeeze, self.gated = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 8, 3, groups=2)
        self.fc, self.head = nn.Linear(8, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x), 3, 2, padding=1)
        x = torch.relu(x)
        x = torch.cat([self.left(x), self.right(F.pad(x, (2, 0, 0, 2)))], 1)
        x = F.silu(self.depth(x)) + x
        x = x * torch.sigmoid(self.squeeze(F.adaptive_avg_pool2d(x, 1)))
        x = F.avg_pool2d(F.hardswish(self.gated(x)), 2).mean((2, 3))
        result: Tensor = self.head(F.gelu(self.fc(x)))
        return result


def everything() -> Program:
    torch.manual_seed(0)
    return captured(Everything(), 3, 16, 16)


NETWORKS: dict[str, Callable[[], Program]] = {
    "small": small,
    "everything": everything,
    **{
        name: lambda name=name: torchvision_program(name)  # type: ignore[misc]
        for name in ("resnet18", "mobilenet_v3_small", "googlenet", "vit_b_16")
    },
}


class Integers(fx.Interpreter):
    """Runs an int8 Program in integer arithmetic and keeps the real form of every value."""

    def __init__(self, program: Program) -> None:
        super().__init__(prepare(copy.deepcopy(program), "cpu", "reference"))
        self.scales: dict[fx.Node, QParams] = {}
        self.real: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        # Activations work in place.
        self.real[n.name] = value.clone() if isinstance(value, Tensor) else value
        if isinstance(value, Tensor) and value.dtype == torch.uint8:
            layer = self.module.get_submodule(str(n.target)) if n.op == "call_module" else None  # type: ignore[union-attr]
            passes = layer is None or isinstance(layer, QuantizedMaxPool)
            self.scales[n] = self.scales[n.all_input_nodes[0]] if passes else layer.output  # type: ignore[union-attr, assignment]
            self.real[n.name] = dequantize(value, self.scales[n])
        return value

    @property
    def steps(self) -> dict[str, float]:
        return {node.name: q.scale for node, q in self.scales.items()}


class Comparison(fx.Interpreter):
    """Runs the trainable form, compares each value with the exact one, and goes on from the latter."""

    def __init__(self, program: Program, exact: Integers) -> None:
        super().__init__(program)
        self.exact, self.steps = exact, exact.steps
        self.apart: list[Tensor] = []

    def run_node(self, n: fx.Node) -> Any:
        got, expected = super().run_node(n), self.exact.real[n.name]
        if not isinstance(expected, Tensor) or not expected.is_floating_point():
            return got
        assert got.dtype == torch.float32
        assert got.shape == expected.shape
        if n.name in self.steps:
            self.apart.append(((got - expected).abs() / self.steps[n.name]).flatten())
        else:
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        return expected.clone()


FEWER = [("small", 4), ("everything", 4), ("everything", 2)]


@pytest.mark.parametrize(
    ("name", "bits"),
    quick(
        [*((name, 8) for name in NETWORKS), *FEWER],
        [("small", 8), ("everything", 8), ("vit_b_16", 8), *FEWER],
    ),
    ids=lambda value: str(value),
)
def test_every_value_is_that_of_integer_arithmetic(name: str, bits: int) -> None:
    int8 = quantized(NETWORKS[name](), weight_bits=bits, act_bits=bits, edge_bits=bits)
    x, exact = images(4, *int8.input.shape, seed=3), Integers(int8)
    with torch.no_grad():
        exact.run(x)
        network = qat.prepare(int8).eval()
        compared = Comparison(network, exact)
        compared.run(x)
    assert len(compared.apart) == len(exact.steps) > 3
    assert [n.name for n in network.graph.nodes] == [n.name for n in int8.graph.nodes]
    apart = torch.cat(compared.apart)
    assert apart.max() < 1.001  # a step up or down, next to a tie
    assert (apart > 0.001).float().mean() < 2e-5


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["small", "everything"])
def test_logits_are_those_of_integer_arithmetic(name: str, scheme: str) -> None:
    int8 = quantized(NETWORKS[name](), scheme)
    x = images(64, *int8.input.shape, seed=3)
    with torch.no_grad():
        found = qat.prepare(int8).eval()(x)
        expected = prepare(copy.deepcopy(int8), "cpu", "reference")(x)
    apart = (found - expected).abs() / expected.std()
    assert (apart < 1e-5).float().mean() > 0.95  # elsewhere a rounding went the other way
    assert apart.max() < 0.05


@pytest.mark.parametrize("scheme", SCHEMES)
def test_there_and_back_changes_nothing(scheme: str) -> None:
    int8 = quantized(everything(), scheme)
    int8.labels = tuple("abcde")
    before = copy.deepcopy(int8.state_dict())
    made = qat.convert(qat.prepare(int8), int8)
    assert (made.history, made.labels, made.input) == (int8.history, int8.labels, int8.input)
    assert made.encodings.keys() == int8.encodings.keys()
    for name, tensor in made.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name]), name
        assert torch.equal(int8.state_dict()[name], before[name]), name


def test_making_it_draws_no_random_numbers() -> None:
    int8 = quantized(small())
    state = torch.get_rng_state()
    assert all(p.requires_grad for p in qat.prepare(int8).parameters())
    assert torch.equal(torch.get_rng_state(), state)


# Gradients.


def test_activations_have_gradients_inside_their_range_alone() -> None:
    q = QParams(0.5, 10)  # -5 to 122.5
    x = torch.tensor([-5.3, -5.2, -5.0, 0.1, 0.25, 122.5, 122.7, 122.8, 1e9], requires_grad=True)
    y = fake_quantize(x, q)
    assert y.tolist() == [-5.0, -5.0, -5.0, 0.0, 0.0, 122.5, 122.5, 122.5, 122.5]
    (y * torch.arange(1.0, 10.0)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 0.0, 0.0, 4.0, 5.0, 0.0, 0.0, 0.0, 0.0]


def test_latent_weights_have_the_gradients_of_rounded_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    like, scale = nn.Linear(6, 4), torch.rand(4, generator=generator) / 100 + 0.01
    latent = torch.randint(-60, 61, (4, 6), generator=generator) * scale[:, None] * 1.003
    layer = LatentLinear(like, latent, scale, LatentForm(bounded=True))
    x = torch.randn(3, 6, generator=generator)
    layer(x).pow(3).sum().backward()
    plain = ((latent / scale[:, None]).round() * scale[:, None]).requires_grad_()
    F.linear(x, plain, like.bias).pow(3).sum().backward()
    assert plain.grad is not None
    assert plain.grad.all()
    torch.testing.assert_close(layer.weight.grad, plain.grad)
    assert layer.bias.grad is not None


def test_latent_weights_beyond_int8_only_come_back() -> None:
    layer = LatentLinear(
        nn.Linear(4, 1, bias=False),
        torch.tensor([[200.0, 3.0, 90.0, 90.0]]),
        torch.ones(1),
        LatentForm(bounded=True),
    )
    assert layer.steps().tolist() == [[126, 2, 64, 64]]
    for sign, expected in ((1.0, [1.0, 1.0, 1.0, 1.0]), (-1.0, [0.0, 0.0, 0.0, 0.0])):
        layer.zero_grad()
        (sign * layer(torch.ones(1, 4))).sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.flatten().tolist() == expected


def test_gradients_reach_every_latent_weight() -> None:
    network = qat.prepare(quantized(everything())).train()
    network(images(8, 3, 16, 16, seed=1)).pow(2).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_what_float_layers_change_in_place_is_their_own() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.cut, self.fc = nn.Hardtanh(0.1, 0.2, inplace=True), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x))
            y = torch.sigmoid(self.second(x))
            result: Tensor = self.fc((y * self.cut(x)).mean((2, 3)))
            return result

    torch.manual_seed(0)
    int8 = quantized(captured(InPlace(), 3, 8, 8))
    assert "Dequantize" in [type(layer).__name__ for layer in int8.modules()]
    x = images(16, 3, 8, 8, seed=1)
    found = qat.prepare(int8)(x)
    found.sum().backward()
    torch.testing.assert_close(found.detach(), exact(int8)(x), rtol=1e-5, atol=1e-6)


# What must hold afterwards.


@pytest.mark.parametrize("scheme", SCHEMES[:2])
@pytest.mark.parametrize("spread", [1.0, 100.0, 1e6, 1e30])
def test_no_weights_make_a_kernel_saturate(scheme: str, spread: float) -> None:
    int8 = quantized(everything(), scheme)
    network = qat.prepare(int8).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, Latent):
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator).abs() * spread)
    made = qat.convert(network, int8)
    layers = [layer for layer in made.modules() if isinstance(layer, Weighted)]
    assert layers
    for layer in layers:
        assert never_saturates(layer.weight, layer.groups if isinstance(layer, QuantizedConv2d) else 1)
        assert layer.weight.abs().max() > 60
    if spread == 1e6:  # depthwise ones may use all of int8
        depth = made.get_submodule("depth")
        assert not isinstance(depth, Weighted) or bool((depth.weight == 127).any())


def test_foreign_weights_are_pulled_back() -> None:
    scale = torch.ones(1)
    assert nearest_steps(torch.tensor([[-128.0, 127.0]]), scale, True).tolist() == [[-127.0, 127.0]]
    assert nearest_steps(torch.tensor([[127.0, 127.0]]), scale, True).tolist() == [[64.0, 64.0]]
    assert nearest_steps(torch.tensor([[127.0, 127.0, 1.0]]), scale, True).tolist() == [[64.0, 64.0, 1.0]]
    assert nearest_steps(torch.tensor([[127.0, 127.0]]), scale, False).tolist() == [[127.0, 127.0]]


def test_shared_and_other_stored_weights_are_refused() -> None:
    int8 = quantized(small())
    int8.history = ({"method": "share"}, *int8.history)
    with pytest.raises(UsageError, match="shared before they became int8"):
        qat.prepare(int8)

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turn, self.fc = nn.ConvTranspose2d(1, 4, 3), nn.Linear(400, 10)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.fc(self.turn(x).flatten(1))
            return result

    stored = quantized(captured(Tokens(), 1, 8, 8), "int8-weight")
    context = DistillContext(
        training=Training(digits_of(32)), teachers=(TeacherMember(stored, InputSpec((1, 8, 8))),)
    )
    with pytest.raises(UsageError, match=r"turn\.weight: is stored as affine values"):
        distill(stored, DistillConfig(), context)


# Whole trainings.


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.mid, self.fc = nn.Conv2d(12, 16, 3, stride=2), nn.Linear(16 * 9, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.mid(torch.relu(self.norm(self.conv(x)))))
        result: Tensor = self.fc(x.flatten(1))
        return result


def digits_of(samples: int) -> Data:
    return open_data("digits?split=train").sample(samples)


@pytest.fixture(scope="module")
def digits() -> Data:
    return digits_of(640)


@pytest.fixture(scope="module")
def teacher(digits: Data) -> Program:
    torch.manual_seed(0)
    network = captured(Net(), 1, 8, 8)
    fit(network, Training(digits, config=TrainConfig(epochs=8, batch_size=32, lr=0.05)), seed=0)
    return network


def int8_of(teacher: Program, digits: Data, scheme: str = "int8") -> Program:
    return quantize(teacher, QuantizeConfig(scheme), Context(data=digits)).program


def damaged(program: Program, noise: float = 50.0) -> Program:
    """With noise on its int8 weights, in steps, but on no zero."""
    made, generator = qat.prepare(program), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in made.modules():
            if isinstance(layer, Latent):
                steps = layer.scale.view(-1, *[1] * (layer.weight.dim() - 1))
                moved = torch.randn(layer.weight.shape, generator=generator) * noise * steps
                layer.weight += moved * (layer.weight != 0)
    return qat.convert(made, program)


def exact(program: Program) -> Program:
    return prepare(copy.deepcopy(program).eval(), "cpu", "reference")


def accuracy(program: Program, data: Data) -> float:
    pictures, labels = next(iter(data.batches(640)))
    with torch.no_grad():
        return float((exact(program)(pictures).argmax(1) == labels).float().mean())


def learning(teacher: Program, digits: Data, **more: Any) -> DistillContext:
    config = TrainConfig(epochs=2, batch_size=32)
    training = Training(digits, config=replace(config, **more.pop("config", {})), **more)
    return DistillContext(training=training, teachers=(TeacherMember(teacher, InputSpec((1, 8, 8))),))


@pytest.mark.parametrize(
    "how", [{}, {"ema": 0.9}, {"optimizer": "adamw", "lr": 2e-3, "amp": True}], ids=["sgd", "ema", "adamw"]
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_damaged_network_recovers(
    scheme: str, how: dict[str, Any], teacher: Program, digits: Data, tmp_path: Path
) -> None:
    student = damaged(int8_of(teacher, digits, scheme), 50.0 if scheme != "int8-dynamic" else 120.0)
    student.labels = tuple("0123456789")
    before = copy.deepcopy(student.state_dict())
    better = distill(student, DistillConfig(), learning(teacher, digits, config=how)).program
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert accuracy(better, digits) > accuracy(student, digits) + 0.05
    assert not better.training
    assert better.labels == student.labels
    assert better.history[:-1] == student.history
    entry = better.history[-1]
    assert entry["method"] == "distill"
    assert entry["coverage"] == student.history[-1]["coverage"]
    assert better.encodings.keys() == student.encodings.keys()
    for name, layer in better.named_modules():
        assert name == "" or type(layer) is type(student.get_submodule(name))
        assert not isinstance(layer, Weighted) or never_saturates(layer.weight)
    write_program(better, tmp_path / "net.safetensors")
    found = read_program(tmp_path / "net.safetensors").state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in better.state_dict().items())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_was_validated_is_what_is_written(scheme: str, teacher: Program, digits: Data) -> None:
    student = int8_of(teacher, digits, scheme)
    network = qat.prepare(student)
    fit(network, Training(digits, config=TrainConfig(epochs=1, batch_size=32, lr=0.02)), seed=0)
    made = qat.convert(network, student)
    assert not torch.equal(made.state_dict()["fc.weight"], student.state_dict()["fc.weight"])
    pictures, _ = next(iter(digits.batches(640)))
    with torch.no_grad():
        found, expected = network(pictures), exact(made)(pictures)
    apart = (found - expected).abs() / expected.std()
    assert (apart < 1e-5).float().mean() > 0.95
    assert apart.max() < 0.05
    assert (found.argmax(1) == expected.argmax(1)).all()


@pytest.mark.parametrize("finetune", [0, 1])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_pruned_zeros_stay(scheme: str, finetune: int, teacher: Program, digits: Data) -> None:
    pruned = copy.deepcopy(teacher)
    with torch.no_grad():
        for name in ("mid.weight", "fc.weight"):
            weight = pruned.get_parameter(name)
            weight.masked_fill_(weight.abs() < weight.abs().quantile(0.6), 0)
    pruned.encodings = compact(pruned, ("mid.weight", "fc.weight"))
    student = int8_of(pruned, digits, scheme)
    promised = pruned_names(student.encodings)
    assert promised == {"mid.weight", "fc.weight"}
    config = DistillConfig(finetune_epochs=finetune)
    better = distill(student, config, learning(teacher, digits, config={"lr": 0.02})).program
    assert pruned_names(better.encodings) == promised
    for name in promised:
        before, after = student.state_dict()[name], better.state_dict()[name]
        assert not after[before == 0].any()
        assert not torch.equal(before, after)
        assert is_pruned(better.encodings[name])
    assert accuracy(better, digits) >= accuracy(student, digits)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fine_tuning_on_labels_goes_on_from_there(scheme: str, teacher: Program, digits: Data) -> None:
    student = int8_of(teacher, digits, scheme)
    context = learning(teacher, digits, config={"epochs": 1, "lr": 0.02})
    after, further = (
        distill(student, config, context).program.state_dict()
        # Fine-tuning starts in the middle of every step, and a small rate would change biases alone.
        for config in (DistillConfig(), DistillConfig(finetune_epochs=1, finetune_lr=0.05))
    )
    for name in ("fc.weight", "fc.bias"):
        assert not torch.equal(after[name], further[name])
        assert not torch.equal(after[name], student.state_dict()[name])


def test_losses_on_features_see_real_values(teacher: Program, digits: Data) -> None:
    student = damaged(int8_of(teacher, digits))
    config = DistillConfig("ce+kd+hint:1@conv,mid")
    better = distill(student, config, learning(teacher, digits)).program
    assert better.history[-1]["compared"] == {"hint:1@conv,mid": ["conv", "mid"]}
    assert accuracy(better, digits) > accuracy(student, digits) + 0.05


def test_without_a_rate_int8_students_learn_more_slowly(teacher: Program, digits: Data) -> None:
    def rate(student: Program, **how: Any) -> float:
        context = learning(teacher, digits, config={"epochs": 1, "batch_size": 128, **how})
        history = distill(student, DistillConfig(finetune_epochs=1), context).program.history
        return float(history[-1]["training"]["lr"] or 0)

    student = int8_of(teacher, digits)
    assert rate(student) == pytest.approx(0.01)
    assert rate(student, optimizer="adamw") == pytest.approx(0.0001)
    assert rate(student, lr=0.03) == 0.03
    assert rate(teacher) == 0  # not given; the usual one


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "int8-weight"])
def test_resumed_gives_the_same_bytes(
    scheme: str, teacher: Program, digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelopt_cli.training import loop

    monkeypatch.setattr(loop, "_REPORT_EVERY", 0.0)
    student = damaged(int8_of(teacher, digits, scheme))

    def once(folder: str, stop: tuple[str, int] | None, resume: bool) -> str:
        def progress(stage: str, done: int, total: int | None) -> None:
            if stop is not None and stage == stop[0] and done >= stop[1]:
                raise KeyboardInterrupt

        with Run(tmp_path / folder, identity={}, resume=resume) as run:
            context = learning(teacher, digits, run=run, progress=progress, config={"ema": 0.9})
            made = distill(student, DistillConfig(finetune_epochs=1), context).program
            path = tmp_path / f"{folder}.safetensors"
            write_program(made, path)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    whole = once("whole", None, False)
    for folder, stop in (("early", ("distill", 23)), ("late", ("finetune", 3))):
        with pytest.raises(KeyboardInterrupt):
            once(folder, stop, False)
        assert once(folder, None, True) == whole
