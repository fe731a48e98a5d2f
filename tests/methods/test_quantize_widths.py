"""Widths: which layers and values get how many bits, rounding to few levels, and files of such networks."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from quantize_networks import captured, context, images, on_state, quantized
from test_quantize_qat import everything
from torch import Tensor, nn

from modelopt_cli.artifact import predicted_bytes, read_program, write_program
from modelopt_cli.checkpoint.integer_layers import restore_integer_layers
from modelopt_cli.errors import UsageError
from modelopt_cli.measure.coverage import coverage
from modelopt_cli.methods.quantize.apply import apply
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.conversion import convert, values_to_observe
from modelopt_cli.methods.quantize.histogram import Histogram
from modelopt_cli.methods.quantize.layer_widths import edge_layers
from modelopt_cli.methods.quantize.observers import OBSERVERS
from modelopt_cli.methods.quantize.precision_plan import make_plan
from modelopt_cli.methods.quantize.rounding import quantize_weight
from modelopt_cli.methods.quantize.static import quantize_static
from modelopt_cli.methods.quantize.weight_only import store_layer
from modelopt_cli.methods.quantize.widths import INT8, Widths
from modelopt_cli.program import Program
from modelopt_cli.program.quantization import QParams
from modelopt_cli.program.quantized import Weighted
from modelopt_cli.program.quantized_linear import DynamicLinear

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    """A residual block, joined branches and a pool, between a stem and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.left, self.right, self.join = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 8, 1)
        self.one, self.two = nn.Linear(8, 5), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x).relu()
        x = F.relu(self.b(self.a(x).relu()) + x)
        x = self.join(torch.cat([self.left(x), self.right(x)], 1)).relu()
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.one(x), self.two(x)


def block() -> Program:
    torch.manual_seed(0)
    return captured(Block(), 3, 10, 10)


def test_the_first_and_last_layers_are_those_with_none_before_or_behind() -> None:
    assert edge_layers(block()) == {"stem", "one", "two"}


def test_a_value_has_the_most_bits_that_a_layer_reading_it_asks_for() -> None:
    program = block()
    widths = dict.fromkeys(("stem", "a", "b", "left", "right", "join", "one", "two"), Widths(4, 4))
    widths |= {"stem": INT8, "left": Widths(4, 6), "join": Widths(3, 5), "two": Widths(8, 7)}
    plan = make_plan(program, widths)
    nodes = {node.name: node for node in program.graph.nodes}
    bits = {name: plan.bits_of(node) for name, node in nodes.items()}
    assert bits["x"] == 8
    assert bits["relu"] == 6  # added to what `left` reads
    assert bits["relu_1"] == 4
    assert bits["relu_2"] == 6  # read by left and right
    assert bits["left"] == bits["right"] == bits["cat"] == 5
    assert bits["adaptive_avg_pool2d"] == bits["flatten"] == 7
    qparams = {
        value: QParams(0.05, 1, plan.bits_of(value)) for value in values_to_observe(plan, program.graph)
    }
    int8 = convert(program, plan, qparams)
    layers = {name: layer for name, layer in int8.named_modules() if isinstance(layer, Weighted)}
    assert {name: layer.weight_bits for name, layer in layers.items()} == {
        name: each.weight for name, each in widths.items()
    }
    assert layers["b"].residual.bits == 6  # type: ignore[union-attr]
    assert layers["a"].output.bits == 4  # type: ignore[union-attr]


@pytest.mark.parametrize("widths", [(8, 8), (4, 8), (4, 4), (2, 2), (7, 5)], ids=str)
def test_a_file_holds_the_widths_and_gives_the_same_bits(widths: tuple[int, int], tmp_path: Path) -> None:
    program, (weight_bits, act_bits) = everything(), widths
    made = quantized(program, weight_bits=weight_bits, act_bits=act_bits)
    layers = {name: layer for name, layer in made.named_modules() if isinstance(layer, Weighted)}
    for name, layer in layers.items():
        edge = name in ("stem", "head")
        assert layer.weight_bits == (8 if edge else weight_bits)
        assert layer.activation_bits == (8 if edge else act_bits)
        assert int(layer.weight.max()) < 1 << layer.weight_bits - 1
    labels = {layer.name: layer.scheme for layer in coverage(made).layers}
    narrow = "int8" if widths == (8, 8) else f"W{weight_bits}A{act_bits} in int8"
    assert labels["stem"] == labels["head"] == "int8"
    assert {label for name, label in labels.items() if name not in ("stem", "head")} == {narrow}
    x = images(4, 3, 16, 16, seed=3)
    sizes = {}
    for code in ("plain", "packed", "entropy"):
        path = tmp_path / code
        written = write_program(made, path, code=code)
        assert written.file_bytes == path.stat().st_size == predicted_bytes(made, code=code)
        sizes[code] = written.file_bytes
        with torch.inference_mode():
            assert torch.equal(read_program(path)(x), made(x))
    saved = sum(layer.weight.numel() * (8 - layer.weight_bits) // 8 for layer in layers.values())
    if weight_bits < 8:
        assert abs(sizes["plain"] - sizes["packed"] - saved) < 700  # headers differ, streams end with a byte
        assert sizes["entropy"] < sizes["packed"]
    else:
        assert sizes["plain"] == sizes["packed"]


def test_edges_have_the_bits_that_are_asked_for() -> None:
    made = quantized(everything(), weight_bits=3, act_bits=4, edge_bits=5)
    stem, fc = made.get_submodule("stem"), made.get_submodule("fc")
    assert (stem.weight_bits, stem.activation_bits) == (5, 5)
    assert (fc.weight_bits, fc.activation_bits) == (3, 4)
    same = quantized(everything(), weight_bits=3, act_bits=4, edge_bits=2)
    assert same.get_submodule("head").weight_bits == 3


def test_layers_of_other_widths_are_named() -> None:
    program = everything()
    result = apply(program, QuantizeConfig(weight_bits=4, act_bits=4), context(program))
    assert result.notes[0].startswith("stem, head: W8A8, as the first and last layers; ")
    assert result.notes[1].startswith("W4A4 weights are multiplied as bytes")
    assert not apply(program, QuantizeConfig(), context(program)).notes


def test_a_width_that_no_layer_has_is_said() -> None:
    program = everything()
    result = apply(program, QuantizeConfig(weight_bits=4, include=("stem",)), context(program))
    assert result.notes[-1] == "no layer has W4A8"


@pytest.mark.parametrize("act_bits", [16, 32])
def test_float_activations_are_weights_stored_as_integers(act_bits: int) -> None:
    made = quantized(everything(), act_bits=act_bits)
    stored = quantized(everything(), "int8-weight", act_bits=act_bits)
    assert made.encodings.keys() == stored.encodings.keys()
    assert all(torch.equal(t, stored.state_dict()[name]) for name, t in made.state_dict().items())
    assert made.history[-1]["config"]["act_bits"] == act_bits


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"act_bits": 12}, "must be 2 to 8, 16 or 32, not 12"),
        ({"act_bits": 1}, "act_bits: must be at least 2"),
        ({"weight_bits": 9}, "weight_bits: must be at least 2 and at most 8"),
        ({"weight_bits": 1}, "weight_bits: must be at least 2"),
        ({"scheme": "int8-weight", "act_bits": 8}, "int8-weight leaves activations in float"),
        ({"scheme": "int8-dynamic", "act_bits": 32}, "int8-dynamic rounds activations at every call"),
        ({"edge_bits": 4}, "edge_bits has no meaning where all layers have 8 bits"),
        (
            {"act_bits": 32, "bias_correction": "analytic"},
            "bias_correction has no meaning where activations are not calibrated",
        ),
        (
            {"scheme": "bf16", "equalize": "weights"},
            "equalize has no meaning where activations are not calibrated",
        ),
    ],
    ids=str,
)
def test_widths_that_mean_nothing_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        QuantizeConfig(**options)
    assert problem in str(caught.value)


def test_names_and_coding_follow_the_widths() -> None:
    def about(**options: Any) -> tuple[str, str]:
        config = QuantizeConfig(**options)
        return config.suffix, config.code

    assert about() == ("int8", "plain")
    assert about(weight_bits=4) == ("w4a8", "packed")
    assert about(act_bits=4) == ("w8a4", "plain")
    assert about(scheme="int8-dynamic", weight_bits=4) == ("w4a8-dynamic", "packed")
    assert about(scheme="int8-weight", weight_bits=3) == ("int3-weight", "packed")
    assert about(weight_bits=4, act_bits=32) == ("int4-weight", "packed")
    assert about(act_bits=32) == ("int8-weight", "plain")


def test_a_layer_of_float_activations_stands_next_to_integer_ones() -> None:
    """What a choice of precision layer by layer asks of the plan."""
    program, config = block(), QuantizeConfig()
    x = images(4, 3, 10, 10, seed=3)
    widths = dict.fromkeys(("stem", "a", "b", "left", "right", "one", "two"), INT8) | {
        "join": Widths(4, None)
    }
    plan = make_plan(program, widths)
    qparams = {value: QParams(0.05, 128) for value in values_to_observe(plan, program.graph)}
    made = convert(program, plan, qparams)
    store_layer(made, "join", 4)
    assert type(made.get_submodule("join")) is nn.Conv2d
    assert made.encodings["join.weight"].params["bits"] == 4
    values, scale = quantize_weight(program.join.weight, bits=4)
    assert torch.equal(made.join.weight, values * scale.view(-1, 1, 1, 1))
    assert not torch.equal(made.join.weight, program.join.weight)
    made(x)
    assert isinstance(
        quantize_static(program, config, context(program)).program.get_submodule("join"), Weighted
    )


@pytest.mark.parametrize("bits", range(2, 8))
def test_weights_get_the_scale_of_least_squared_error(bits: int) -> None:
    g = torch.Generator().manual_seed(bits)
    weight = torch.randn(6, 40, generator=g) * torch.rand(6, 1, generator=g).exp()
    weight[0, 0] = 8  # an outlier that most levels would be spent on
    values, scale = quantize_weight(weight, bits=bits)
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    assert values.dtype == torch.int8
    assert low <= int(values.min()) < int(values.max()) <= high
    w = weight.double().numpy()
    got = np.square(values.numpy() * scale.double().numpy()[:, None] - w).sum(1)
    for row in range(6):
        tried = np.abs(w[row]).max() / high * np.linspace(0.02, 1.2, 600)
        best = min(np.square(np.clip(np.rint(w[row] / s), low, high) * s - w[row]).sum() for s in tried)
        assert got[row] <= 1.12 * best
    assert (values[weight == 0] == 0).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_mse_finds_the_best_range_of_few_levels(bits: int) -> None:
    """Against every range of a fine search, on values of which most are smaller than a step."""
    row, g = OBSERVERS["mse"], torch.Generator().manual_seed(0)
    x = torch.randn(20000, generator=g).abs() ** 3
    seen = Histogram(row.choose, row.needs_counts, bits)
    seen.update(x)
    q = seen.qparams()
    assert (q.bits, q.zero_point) == (bits, 0)
    values, top = x.double().numpy(), 2**bits - 1

    def error(scale: float) -> float:
        return float(np.square(np.clip(np.rint(values / scale), 0, top) * scale - values).mean())

    best = min(error(float(x.max()) / top * part) for part in np.linspace(0.01, 1, 300))
    assert error(q.scale) <= 1.01 * best


class Perceptron(nn.Module):
    """Three linear layers, behind an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.first = nn.Embedding(11, 12), nn.Linear(12, 16)
        self.middle, self.last = nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(self.words(x)).relu()).relu())  # type: ignore[no-any-return]


def test_dynamic_layers_of_a_file_without_a_graph_have_their_widths_again() -> None:
    torch.manual_seed(0)
    net, config = Perceptron().eval(), QuantizeConfig("int8-dynamic", weight_bits=4, act_bits=6)
    done = on_state(net.state_dict(), config, dict(net.named_modules()))
    assert done.encodings["words.weight"].params["bits"] == done.encodings["last.weight"].params["bits"] == 8
    assert done.encodings["middle.weight"].params["bits"] == 4
    entry = {"method": "quantize", "config": config.as_dict(), "widths": done.widths}
    rebuilt = copy.deepcopy(net)
    rebuilt.load_state_dict(done.state)
    restore_integer_layers(rebuilt, (entry,), done.encodings)
    middle, last = rebuilt.middle, rebuilt.last
    assert isinstance(middle, DynamicLinear)
    assert isinstance(last, DynamicLinear)
    assert (middle.weight_bits, middle.input_bits) == (4, 6)
    assert (last.weight_bits, last.input_bits) == (8, 8)
    x = torch.randint(0, 11, (7, 3), generator=torch.Generator().manual_seed(1))
    hidden = net.words(x)
    rounded, scale = quantize_weight(net.middle.weight, bits=4)
    assert torch.equal(middle.weight, rounded)
    assert torch.allclose(middle.scale, scale)
    assert rebuilt(x).shape == (7, 3, 5)
    assert hidden.shape == (7, 3, 12)
    for broken in ({"middle": [4, 99]}, {"middle": "x"}, "x", None):
        restore_integer_layers(copy.deepcopy(net), ({**entry, "widths": broken},), done.encodings)


def test_pruned_weights_of_few_bits_keep_their_zeros() -> None:
    program = everything()
    weight = program.gated.weight.detach()
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.8] = 0
    from modelopt_cli.artifact.encodings import compact, is_pruned

    program.encodings = compact(program, ["gated.weight"])
    made = quantized(program, weight_bits=4, act_bits=4)
    assert is_pruned(made.encodings["gated.weight"])
    assert bool((made.gated.weight[weight == 0] == 0).all())


def test_a_trained_network_keeps_its_widths() -> None:
    from modelopt_cli.methods.quantize.learning import qat

    made = quantized(everything(), weight_bits=4, act_bits=4)
    network = qat.prepare(made)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.05
            )
    back = qat.convert(network, made)
    layers = {name: layer for name, layer in back.named_modules() if isinstance(layer, Weighted)}
    for layer in layers.values():
        layer.check()
    assert layers["gated"].weight_bits == 4
    assert not torch.equal(back.gated.weight, made.gated.weight)
    x = images(16, 3, 16, 16, seed=3)
    with torch.no_grad():
        expected, got = network.eval()(x), back(x)
    apart = (expected - got).abs() / expected.std()
    assert (apart < 1e-4).float().mean() > 0.9


def test_the_history_names_widths_only_where_they_are_not_eight() -> None:
    assert not {"weight_bits", "act_bits", "edge_bits"} & QuantizeConfig().as_dict().keys()
    config = replace(QuantizeConfig(), weight_bits=4)
    assert config.as_dict()["weight_bits"] == 4
