"""Static int8: what becomes of each layer and each value, and that what it computes is right."""

import copy
from statistics import median
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from quantize_networks import (
    Images,
    Small,
    captured,
    context,
    count,
    images,
    quantized,
    small,
    sqnr,
    torchvision_program,
)
from torch import Tensor, fx, nn

from modelopt_cli.artifact import read_program, write_program
from modelopt_cli.errors import DataError, NothingCompressed, UsageError
from modelopt_cli.kernels import prepare
from modelopt_cli.measure.coverage import coverage
from modelopt_cli.measure.layer_comparison import steepest_fall
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.quantize.apply import apply
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.observers import OBSERVERS
from modelopt_cli.methods.quantize.precision_plan import make_plan
from modelopt_cli.methods.quantize.widths import INT8
from modelopt_cli.program import Program
from modelopt_cli.program.attention import split_attention
from modelopt_cli.program.fold import fold_batch_norms, inference_form
from modelopt_cli.program.quantization import dequantize, quantize
from modelopt_cli.program.quantized import Quantized, Weighted
from modelopt_cli.program.quantized_operations import Quantize

pytestmark = pytest.mark.usefixtures("one_thread")


class _Float(fx.Interpreter):
    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        # Activations work in place.
        self.values[n.name] = value.clone() if isinstance(value, Tensor) else value
        return value


class _Local(fx.Interpreter):
    """Runs the int8 graph, compares each value with the float network's, and goes on from the latter.

    Errors do not add up, so that one wrong layer shows however deep the network is.
    """

    def __init__(self, program: Program, exact: _Float, outputs: dict[str, str]) -> None:
        super().__init__(program)
        self.original: Any = exact.module
        self.outputs, self.values = outputs, exact.values
        self.found: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        got = super().run_node(n)
        layer = self.module.get_submodule(str(n.target)) if n.op == "call_module" else None  # type: ignore[union-attr]
        name = n.name
        for suffix in ("_sum", "_pool", "_quantized", "_real"):
            name = name.removesuffix(suffix)
        expected = self.values.get(self.outputs.get(name, name))
        if not isinstance(layer, Quantized) or not isinstance(expected, Tensor):
            return got
        expected = expected * self._factors(n)
        q = getattr(layer, "output", None)
        if q is None and got.dtype == torch.uint8:
            return got  # max pooling
        self.found[n.name] = sqnr(expected, got if q is None else dequantize(got, q))
        return expected if q is None else quantize(expected, q)

    def _factors(self, n: fx.Node) -> Tensor:
        """What a layer norm right before a node multiplies its features by, beyond what it did in float."""
        before = n.all_input_nodes[0]
        norm: Any = self.fetch_attr(str(before.target)) if before.op == "call_module" else None
        if not isinstance(norm, nn.LayerNorm):
            return torch.ones(())
        return norm.weight / self.original.get_submodule(str(before.target)).weight


def local_sqnr(program: Program, int8: Program, x: Tensor) -> dict[str, float]:
    """Each layer's signal to noise against the float network, given the float network's inputs."""
    ready = split_attention(fold_batch_norms(inference_form(program)))
    selected = {s.name for s in coverage(int8).layers if s.compressed}
    plan = make_plan(ready, dict.fromkeys(selected, INT8))
    outputs = {u.head.name: o.name for units in (plan.layers, plan.adds) for o, u in units.items()}
    with torch.inference_mode():
        exact = _Float(ready)
        exact.run(x)
        local = _Local(int8, exact, outputs)
        local.run(x)
    return local.found


# name: (compressed layers, Quantize, Dequantize, end-to-end SQNR in dB where the network is not chaotic)
NETWORKS: dict[str, tuple[int, int, int, float | None]] = {
    "resnet18": (21, 1, 0, 17),
    "squeezenet1_1": (26, 1, 0, 25),
    "mobilenet_v2": (53, 1, 0, None),
    "mobilenet_v3_small": (54, 11, 0, None),
    "efficientnet_b0": (82, 17, 0, None),
    "shufflenet_v2_x0_5": (57, 1, 0, None),
    "googlenet": (58, 1, 0, None),
    "densenet121": (121, 63, 0, None),
    "convnext_tiny": (59, 38, 3, 20),
    "vit_b_16": (10, -1, -1, 20),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_torchvision(name: str) -> None:
    layers, quantizes, dequantizes, decibels = NETWORKS[name]
    program = torchvision_program(name)
    int8 = quantized(program)
    covered = coverage(int8)
    assert (covered.compressed, covered.total) == (layers, layers)
    if quantizes >= 0:
        assert count(int8, "Quantize") == quantizes
        assert count(int8, "Dequantize") == dequantizes
    # The calibration images: on others an untrained network leaves the calibrated ranges.
    x = images(8, *program.input.shape, seed=1)
    prepare(int8)
    found = local_sqnr(program, int8, x)
    assert len(found) >= layers
    worst = min(found, key=found.__getitem__)
    assert found[worst] > 20, (worst, found[worst])
    assert median(found.values()) > 30
    with torch.inference_mode():
        assert decibels is None or sqnr(program(x), int8(x)) > decibels
        if decibels is not None:  # elsewhere a step up or down grows from layer to layer
            onednn, cuda = int8(x), prepare(int8, backend="cuda")(x)
            torch.testing.assert_close(onednn, cuda, rtol=0.1, atol=float(onednn.std()))


@pytest.mark.slow
def test_residuals_of_resnet_are_fused() -> None:
    int8 = quantized(torchvision_program("resnet18"))
    fused = [m for m in int8.modules() if getattr(m, "residual", None) is not None]
    assert len(fused) == 8
    assert {m.activation for m in fused} == {"relu"}
    assert count(int8, "QuantizedAdd") == 0
    assert not [n for n in int8.graph.nodes if n.op == "call_function" and "add" in str(n.target)]


@pytest.mark.slow
def test_concatenations_of_googlenet_stay_int8() -> None:
    int8 = prepare(quantized(torchvision_program("googlenet")))
    cats = [n for n in int8.graph.nodes if n.target is torch.cat]
    assert len(cats) == 9
    with torch.inference_mode():
        run = _Float(int8)
        run.run(images(1, 3, 64, 64))
    assert {run.values[n.name].dtype for n in cats} == {torch.uint8}


@pytest.mark.slow
def test_gates_of_mobilenet_are_rounded_as_they_are_made() -> None:
    int8 = quantized(torchvision_program("mobilenet_v3_small"))
    assert count(int8, "QuantizedMul") == 9


def test_a_file_gives_the_same_logits_and_the_same_bytes(tmp_path: Any) -> None:
    program = small()
    x = images(3, 3, 12, 12, seed=3)
    written = [write_program(quantized(program), tmp_path / f"{i}.mopt") for i in (1, 2)]
    assert written[0].sha256 == written[1].sha256
    for scheme in ("int8", "int8-dynamic", "int8-weight"):
        int8 = quantized(program, scheme)
        again = read_program(write_program(int8, tmp_path / f"{scheme}.mopt").path)
        with torch.inference_mode():
            assert torch.equal(prepare(again)(x), prepare(int8)(x))
        assert coverage(again) == coverage(int8)


def test_the_program_given_is_untouched() -> None:
    program = small()
    code, state = program.code, {k: v.clone() for k, v in program.state_dict().items()}
    quantized(program)
    assert program.code == code
    assert program.history == ()
    assert program.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in program.state_dict().items())


def test_history() -> None:
    program = small()
    done = apply(program, QuantizeConfig(exclude=("fc",)), context(program, seed=3, origin={"source": "abc"}))
    (entry,) = done.program.history
    assert entry["method"] == "quantize"
    assert entry["config"]["scheme"] == "int8"
    assert entry["seed"] == 3
    assert entry["source"] == "abc"
    assert entry["calibration"] == "tensor"
    assert entry["coverage"] == {"compressed": 3, "total": 4}
    assert entry["skipped"] == done.skipped == {"fc": "matched by --exclude"}
    status = {s.name: (s.compressed, s.reason) for s in coverage(done.program).layers}
    assert status["fc"] == (False, "matched by --exclude")


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"include": ("body", "dw")}, ["stem", "fc"]),
        ({"exclude": ("dw",)}, ["dw"]),
        ({"skip_first": True}, ["stem"]),
        ({"skip_last": True}, ["fc"]),
        ({"include": ("fc",)}, ["stem", "body", "dw"]),
    ],
    ids=str,
)
def test_some_layers_only(options: dict[str, Any], left: list[str]) -> None:
    program = small()
    int8 = prepare(quantized(program, **options))
    assert {s.name for s in coverage(int8).layers if not s.compressed} == set(left)
    x = images(4, 3, 12, 12, seed=2)
    with torch.inference_mode():
        assert sqnr(program(x), int8(x)) > 25


@pytest.mark.parametrize("observer", OBSERVERS)
def test_observers(observer: str) -> None:
    program = small()
    x = images(4, 3, 12, 12, seed=1)
    with torch.inference_mode():
        assert sqnr(program(x), prepare(quantized(program, observer=observer))(x)) > 20


def test_nothing_to_compress() -> None:
    net = captured(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), 3, 8, 8)
    for scheme in ("int8", "int8-dynamic", "int8-weight"):
        with pytest.raises(NothingCompressed, match="there is no layer with weights that could be quantized"):
            quantized(net, scheme)
        with pytest.raises(NothingCompressed, match="matched by --exclude"):
            quantized(small(), scheme, exclude=("*",))


def test_static_without_data_names_both_ways() -> None:
    with pytest.raises(UsageError) as caught:
        apply(small(), QuantizeConfig(), Context())
    assert "give data, or use scheme" in str(caught.value)
    assert "int8-dynamic" in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_calibration_on_what_is_not_finite(value: float) -> None:
    bad = images(4, 3, 12, 12)
    bad[2, 0, 3, 3] = value
    with pytest.raises(DataError, match="NaN or infinity"):
        apply(small(), QuantizeConfig(), Context(data=Images(bad)))  # type: ignore[arg-type]


def test_calibration_on_nothing() -> None:
    with pytest.raises(DataError, match="no samples"):
        apply(small(), QuantizeConfig(), Context(data=Images(torch.empty(0, 3, 12, 12)[:0])))  # type: ignore[arg-type]


def test_quantizing_twice() -> None:
    program = small()
    once = quantized(program, include=("body", "dw"))
    twice = prepare(quantized(once))
    assert coverage(twice).fraction == 1.0
    assert [e["method"] for e in twice.history] == ["quantize", "quantize"]
    x = images(4, 3, 12, 12, seed=2)
    with torch.inference_mode():
        assert sqnr(program(x), twice(x)) > 20
    with pytest.raises(NothingCompressed):
        quantized(twice)


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic"])
def test_after_weights_were_stored_as_int8(scheme: str, tmp_path: Any) -> None:
    program = small()
    both = quantized(quantized(program, "int8-weight"), scheme)
    again = read_program(write_program(both, tmp_path / "a.mopt").path)
    x = images(4, 3, 12, 12, seed=2)
    with torch.inference_mode():
        assert torch.equal(prepare(again)(x), prepare(both)(x))
        assert sqnr(program(x), again(x)) > 20


class Odd(nn.Module):
    """Layers and values that need care."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding="same")
        self.mirror = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.twice = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.cut = nn.ConvTranspose2d(8, 8, 1, padding=1)
        self.sized = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.b = nn.Conv2d(8, 4, 3, padding="valid")
        self.c = nn.Conv2d(4, 4, (1, 2), padding="same")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.mirror(F.silu(self.a(x))))
        x = self.up(self.twice(self.twice(x)))
        x = self.sized(x, output_size=[48, 48])[:, :, ::2, ::2]
        x = self.cut(x)
        x = F.pad(F.max_pool2d(self.b(x), 3, 1, ceil_mode=True), (1, 0, 2, 1))
        return torch.sigmoid(self.c(F.avg_pool2d(x, 2, padding=1)))


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
def test_reasons() -> None:
    program = captured(Odd(), 3, 12, 12)
    int8 = prepare(quantized(program))
    reasons = {s.name: s.reason for s in coverage(int8).layers if not s.compressed}
    assert reasons == {
        "cut": "padding beyond its kernel",
        "sized": "called with output_size",
    }
    x = images(4, 3, 12, 12, seed=2)
    with torch.inference_mode():
        assert sqnr(program(x), int8(x)) > 25


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic"])
def test_layers_whose_parameters_are_read_besides_stay_in_float(scheme: Any) -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.tied = (nn.Linear(8, 8) for _ in "abcd")
            self.tied.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            y = self.tied(F.relu(self.a(x)))
            return self.c(self.b(y) + self.b.bias) + y @ self.a.weight

    program = captured(Read(), 3, 8, 8)
    done = apply(program, QuantizeConfig(scheme), context(program, 16))
    weight, bias = (f"its {name} is also read outside of it" for name in ("weight", "bias"))
    assert done.skipped == {"a": weight, "tied": weight, "b": bias}
    assert [layer.name for layer in coverage(done.program).layers if layer.compressed] == ["c"]


def test_split_attention_computes_the_same() -> None:
    program = inference_form(torchvision_program("vit_b_16"))
    split = split_attention(program)
    assert not [m for m in split.modules() if isinstance(m, nn.MultiheadAttention)]
    assert [m for m in program.modules() if isinstance(m, nn.MultiheadAttention)]
    x = images(3, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(split(x), program(x), rtol=1e-4, atol=1e-5)


def test_only_one_quantize_for_a_small_network() -> None:
    int8 = quantized(captured(Small(), 3, 12, 12))
    assert [type(m) for m in int8.modules()].count(Quantize) == 1
    assert [m.activation for m in int8.modules() if isinstance(m, Weighted)] == [
        "relu",
        "relu",
        "relu6",
        "none",
    ]


def test_swin_attention_weights_are_listed_although_they_are_no_layers() -> None:
    import torchvision

    from modelopt_cli.measure.coverage import coverage
    from modelopt_cli.program import InputSpec
    from modelopt_cli.program.capture import capture

    net = torchvision.models.SwinTransformer([4, 4], 24, [1, 1], [2, 4], [4, 4], num_classes=10).eval()
    layers = coverage(capture(net, InputSpec((3, 32, 32)))).layers
    fetched = {layer.name for layer in layers if layer.kind == "fetched weight"}
    assert fetched == {f"features.{i}.0.attn.{part}" for i in (1, 3) for part in ("qkv", "proj")}
    assert not any(layer.compressed for layer in layers)


def test_an_int8_program_says_that_it_is_int8_already() -> None:
    int8 = quantized(small())
    with pytest.raises(NothingCompressed, match=r"stem: int8 already"):
        apply(int8, QuantizeConfig("int8"), context(int8))


class FirstToken(nn.Module):
    """The first of several tokens is read alone, as BERT's pooler does."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sinh(self.body(x))[:, 0])  # type: ignore[no-any-return]


@torch.no_grad()
def test_a_loss_is_that_of_a_layer_which_can_be_left_out() -> None:
    torch.manual_seed(0)
    program = captured(FirstToken(), 4, 8)
    x = torch.randn(16, 4, 8, generator=torch.Generator().manual_seed(0))
    seen = x.clone()
    seen[:, 0] *= 0.1  # then the first token is clipped
    made = apply(program, QuantizeConfig(), Context(data=Images(seen))).program  # type: ignore[arg-type]
    fall = steepest_fall(program, made, x)
    assert fall is not None
    assert fall.layer == "head"
    without = apply(program, QuantizeConfig(exclude=("head",)), Context(data=Images(seen))).program  # type: ignore[arg-type]
    assert sqnr(program(x), without(x)) > sqnr(program(x), made(x)) + 10


class Branches(nn.Module):
    """A convolution with layers behind it that return their input, as timm's blocks have; then a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.norm = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.idle = nn.Sequential(*(nn.Identity() for _ in range(3)), nn.Dropout(), nn.Identity())
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(torch.relu(self.idle(self.norm(self.conv(x))) + x))  # type: ignore[no-any-return]


@torch.no_grad()
def test_a_sum_inside_of_a_convolution_is_no_loss_of_it() -> None:
    torch.manual_seed(0)
    program = captured(Branches(), 3, 8, 8)
    int8 = quantized(program)
    assert int8.get_submodule("conv").residual is not None  # the sum is part of it
    x = images(8, 3, 8, 8, seed=1)
    assert sqnr(program(x), int8(x)) > 30
    fall = steepest_fall(program, int8, x)
    assert fall is None or fall.after > 25


def test_factors_of_features_are_not_taken_for_a_loss() -> None:
    """A layer norm multiplies its features by factors, and the linear layer behind it divides by them."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    scaled = copy.deepcopy(plain)
    factors = torch.rand(16) * 30 + 0.1
    with torch.no_grad():
        scaled[0].weight.mul_(factors)  # type: ignore[union-attr,operator]
        scaled[0].bias.mul_(factors)  # type: ignore[union-attr,operator]
        scaled[1].weight.div_(factors)  # type: ignore[union-attr,operator]
        fall = steepest_fall(captured(plain, 5, 16), captured(scaled, 5, 16), torch.randn(8, 5, 16))
    assert fall is None
