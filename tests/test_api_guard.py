"""What a method made is held against what it was given: networks without a graph, bare tensors, figures."""

import copy
import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import modelopt_cli
from modelopt_cli import api, artifact
from modelopt_cli.api.guard import Original
from modelopt_cli.checkpoint import Opened, resolve
from modelopt_cli.data import PreprocessOverrides, open_data
from modelopt_cli.data.in_memory import as_samples
from modelopt_cli.errors import BrokenResult, InputError
from modelopt_cli.measure import EvalOptions
from modelopt_cli.measure.layer_comparison import first_fault, steepest_fall
from modelopt_cli.measure.output_comparison import LIMIT_DB, snr_db, stays_finite
from modelopt_cli.measure.rounding_fault import fault_of_rounding
from modelopt_cli.methods import method_table
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.method_table import METHODS
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.methods.quantize import conversion
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.share.config import ShareConfig
from modelopt_cli.program import InputSpec
from modelopt_cli.program.capture import capture, random_input

ONE = EvalOptions(threads=1)
SHAPE = PreprocessOverrides(input_size=8, channels=1)
LENET = "builtin:lenet5?width=0.2"
BRANCHING = """
from torch import nn

class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 16), nn.Linear(16, 10)

    def forward(self, x):
        x = self.first(x.flatten(1))
        x = x.relu() if x.sum() > 0 else x.tanh()
        return self.second(x) + 0 * sum(p.sum() for p in self.parameters())
"""


@pytest.fixture
def lenet5(tmp_path):
    torch.manual_seed(0)
    torch.save(resolve(LENET).build().state_dict(), tmp_path / "lenet5.pth")
    return tmp_path / "lenet5.pth"


@pytest.fixture
def untraced(tmp_path):
    """A checkpoint of a network that has no graph, and its architecture."""
    (tmp_path / "branching.py").write_text(BRANCHING)
    torch.manual_seed(0)
    state = {"first.weight": torch.randn(16, 64), "second.weight": torch.randn(10, 16)}
    state |= {"first.bias": torch.randn(16), "second.bias": torch.randn(10)}
    torch.save(state, tmp_path / "net.pth")
    return tmp_path / "net.pth", f"{tmp_path / 'branching.py'}:Branching"


@pytest.fixture
def bare(tmp_path):
    generator = torch.Generator().manual_seed(0)
    state = {f"mystery{i}.weight": torch.randn(8, 16, generator=generator) for i in range(3)}
    torch.save(state, tmp_path / "bare.pth")
    return tmp_path / "bare.pth"


VERBS = {
    "quantize": (api.quantize, {"config": QuantizeConfig(scheme="int8-weight")}),
    "prune": (api.prune, {"config": PruneConfig(structure="unstructured", sparsity=0.5)}),
    "share": (api.share, {"config": ShareConfig(bits=4)}),
}
SPOILT = {
    "another shape": lambda items: [(name, tensor[1:], encoding) for name, tensor, encoding in items],
    "another type": lambda items: [(name, tensor.double(), encoding) for name, tensor, encoding in items],
    "not finite": lambda items: [(name, tensor * math.nan, encoding) for name, tensor, encoding in items],
    "missing": lambda items: items[1:],
}


def spoil(monkeypatch, verb, change):
    """Let what a method makes of bare tensors be ``change``d."""
    row = method_table.METHODS[verb]

    def broken(*args, **kwargs):
        made = row.apply_to_tensors(*args, **kwargs)
        if isinstance(made.tensors, artifact.TensorStream):
            return replace(made, tensors=artifact.TensorStream(lambda: iter(change([*made.tensors.items()]))))
        state = {name: tensor for name, tensor, _ in change([(n, t, None) for n, t in made.tensors.items()])}
        return replace(made, tensors=state, encodings={})

    monkeypatch.setitem(method_table.METHODS, verb, replace(row, apply_to_tensors=broken))


@pytest.mark.parametrize("fault", SPOILT)
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", ["bare", "untraced"])
def test_tensors_without_a_graph_keep_their_shape_and_stay_finite(
    kind, verb, fault, bare, untraced, tmp_path, monkeypatch
):
    call, how = VERBS[verb]
    source, arch = (bare, None) if kind == "bare" else untraced
    spoil(monkeypatch, verb, SPOILT[fault])
    with pytest.raises(BrokenResult) as error:
        call(
            source, tmp_path / "out", arch=arch, preprocessing=SHAPE if arch else None, evaluate=False, **how
        )
    assert error.value.exit_code == 4
    assert error.value.where in ("mystery0.weight", "first.weight")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_network_without_a_graph_is_run_as_it_will_be_rebuilt(untraced, tmp_path, monkeypatch):
    (source, arch), output = untraced, tmp_path / "out"
    how = {
        "config": QuantizeConfig(scheme="int8-dynamic"),
        "arch": arch,
        "preprocessing": SHAPE,
        "evaluate": False,
    }
    made = api.quantize(source, output, options=ONE, **how)
    given, found = (api.load_network(p, arch=arch, input_spec=InputSpec((1, 8, 8))) for p in (source, output))
    x = random_input(given, InputSpec((1, 8, 8)), 8)
    with torch.inference_mode():
        assert made.snr_db == pytest.approx(snr_db(given(x), found(x)))
    assert artifact.read_tensors(output).history[-1]["snr_db"] == round(made.snr_db, 1)

    def slips(module, history, encodings):
        module.second = nn.Linear(16, 9)

    monkeypatch.setattr("modelopt_cli.api.guard.restore_integer_layers", slips)
    with pytest.raises(BrokenResult, match="returns float32"):
        api.quantize(source, tmp_path / "other", options=ONE, **how)


def reference_db(expected, found):
    expected, found = expected.double().numpy(), found.double().numpy()
    return 10 * np.log10((expected**2).sum() / ((expected - found) ** 2).sum())


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic", "int8-weight"])
def test_signal_to_noise_is_recorded_and_that_of_the_file(scheme, lenet5, tmp_path):
    config, output = QuantizeConfig(scheme=scheme), tmp_path / "out"
    how = {"config": config, "data": "digits", "options": ONE, "evaluate": False}
    planned = api.quantize(lenet5, output, dry_run=True, **how)
    made = api.quantize(lenet5, output, **how)
    given, found = api.load(lenet5), api.load(output)
    if scheme == "int8":
        x = next(open_data("digits", input_spec=given.input).sample(8, 0).batches(8))[0]
    else:
        x = random_input(given, given.input, 8)
    with torch.inference_mode():
        expected = reference_db(given(x), found(x))
    assert 25 < expected < 80
    assert planned.snr_db == made.snr_db == pytest.approx(expected, abs=0.01)
    assert found.history[-1]["snr_db"] == round(made.snr_db, 1)
    assert planned.predicted_bytes == made.written.file_bytes


def test_signal_to_noise_against_numpy_and_at_its_ends():
    a, b = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), torch.ones(5, 7)
    assert snr_db(a, b) == pytest.approx(reference_db(a, b))
    assert snr_db({"x": [a, b]}, {"x": [a, a]}) == pytest.approx(
        reference_db(torch.cat([a, b]), torch.cat([a, a]))
    )
    assert snr_db(a, a) == LIMIT_DB
    assert snr_db(torch.zeros(3), torch.ones(3)) == -LIMIT_DB
    assert snr_db(torch.tensor([1.0, -math.inf]), torch.tensor([1.1, 5.0])) == pytest.approx(20, abs=1e-3)
    assert snr_db(a, a * math.nan) == -LIMIT_DB
    assert snr_db({"class": torch.ones(3).long()}, {"class": torch.ones(3).long()}) is None
    assert snr_db("no tensor", "no tensor") is None


class Small(nn.Module):
    """Convolutions with a batch norm, an addition and an activation changed in place."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.second, self.third = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.act, self.fc = nn.ReLU(), nn.Linear(6, 10)

    def forward(self, x):
        x = self.act(self.norm(self.first(x)))
        x = self.act(x + self.second(x))
        return self.fc(self.act(self.third(x)).mean((2, 3)))


@pytest.fixture
def small():
    torch.manual_seed(0)
    net = Small()
    net(torch.randn(64, 1, 8, 8))  # so that the batch norm has seen something
    with torch.no_grad():
        for layer in (net.second, net.third, net.fc):
            layer.bias.zero_()  # what a weight gets wrong is to be seen
    return capture(net.eval(), InputSpec((1, 8, 8)))


@pytest.mark.parametrize("layer", ["first", "second", "third", "fc"])
def test_the_layer_that_loses_the_signal_is_named(layer, small, tmp_path, monkeypatch):
    real = conversion.fill

    def wrong(into, module, **how):
        real(into, module, **how)
        if module.weight.shape == small.get_submodule(layer).weight.shape:
            into.weight.copy_(into.weight.roll(1, 0))  # each output has the weights of another

    monkeypatch.setattr(conversion, "fill", wrong)
    artifact.write_program(small, tmp_path / "small")
    notes = []
    config = QuantizeConfig(bias_correction="none")  # which would take some of it back
    how = {"data": "digits", "config": config, "options": ONE, "evaluate": False, "on_note": notes.append}
    made = api.quantize(tmp_path / "small", tmp_path / "out", **how)
    assert made.snr_db < 20
    (note,) = notes
    assert note.startswith(f"warning: the outputs keep {made.snr_db:.1f} dB")
    assert f"after layer {layer}:" in note


def test_layer_by_layer_a_good_network_loses_little(small):
    made = METHODS["quantize"].apply(
        small, QuantizeConfig(), Context(data=open_data("digits", input_spec=small.input))
    )
    x = next(open_data("digits", input_spec=small.input).batches(8))[0]
    fall = steepest_fall(small, made.program, x)
    assert fall is None or fall.after > 25


def test_what_is_not_finite_from_the_start_is_no_fault(small):
    with torch.no_grad():
        small.fc.bias[3] = -math.inf
    x = torch.randn(2, 1, 8, 8)
    assert first_fault(small, x, copy.deepcopy(small)) is None
    assert first_fault(small, x) == "fc"
    assert stays_finite(small(x), copy.deepcopy(small)(x))


@pytest.mark.parametrize("seen", ["by its shapes", "when it runs"])
def test_a_graph_that_does_not_run_is_the_fault_of_its_file(seen, small, tmp_path):
    graph = copy.deepcopy(small)
    (output,) = graph.graph.find_nodes(op="output")
    graph.register_buffer("beyond", torch.tensor([99]))
    with graph.graph.inserting_before(output):
        if seen == "by its shapes":
            last = graph.graph.call_function(torch.reshape, (output.args[0], (3, 7, 11)))
        else:
            index = graph.graph.get_attr("beyond")
            last = graph.graph.call_function(torch.index_select, (output.args[0], 1, index))
    output.args = (last,)
    graph.recompile()
    artifact.write_program(graph, tmp_path / "bad")
    for scheme in ("int8", "int8-dynamic", "int8-weight"):
        config = QuantizeConfig(scheme=scheme)
        with pytest.raises(InputError, match="cannot run") as error:
            api.quantize(tmp_path / "bad", tmp_path / "out", config=config, data="digits", evaluate=False)
        assert error.value.exit_code == 2
        assert f"{tmp_path / 'bad'}: " in str(error.value)
        assert last.name in str(error.value)
    with pytest.raises(InputError, match="cannot run"):
        api.layers(tmp_path / "bad")


def test_outputs_that_change_structure_are_the_network_s_own_fault() -> None:
    """Of a graph, which takes one way, they would be ours."""

    class Changing(nn.Linear):
        calls = 0

        def forward(self, x: torch.Tensor) -> Any:
            self.calls += 1
            y = super().forward(x)
            return y if self.calls % 2 else {"logits": y}

    network, x = Changing(4, 2), torch.randn(3, 4)
    original = Original(network, network.state_dict(), "cpu", (x,), (network(x),))
    says = r"the network: returns float32 \(3, 2\) in one call and {.logits.: .float32 \(3, 2\).} in"
    with pytest.raises(InputError, match=says):
        original.check(network)
    program = capture(nn.Linear(4, 2), InputSpec((4,)))
    with pytest.raises(BrokenResult, match="the result returns float32"):
        replace(original, network=program, outputs=({"logits": x},)).check(program)


class Missing(nn.Module):
    """Gives NaN in the first ``missing`` of eight outputs."""

    def __init__(self, missing):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 8)
        self.register_buffer("factor", torch.tensor([math.nan] * missing + [1.0] * (8 - missing)))

    def forward(self, x):
        return self.layer(x) * self.factor


def test_outputs_that_are_nan_are_not_compared_in_silence():
    x = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    made = modelopt_cli.quantize(Missing(2), calibration=x)
    with torch.inference_mode():
        expected = reference_db(Missing(2)(x)[:, 2:], made.program(x)[:, 2:])
    assert made.snr_db == pytest.approx(expected, abs=0.01)
    line = "warning: 25 % of the original's outputs are not a number (NaN); signal to noise is of the others"
    assert line in made.notes
    with pytest.raises(modelopt_cli.InputError, match=r"output is not a number \(NaN\)") as refused:
        modelopt_cli.quantize(Missing(8), calibration=x)
    assert refused.value.exit_code == 2
    made = modelopt_cli.quantize(Missing(8), scheme="int8-weight", example_inputs=x)
    assert made.snr_db is None
    assert "warning: signal to noise not measured: the network's output is not a number (NaN)" in made.notes


def test_a_result_that_gives_numbers_for_nan_is_broken():
    x = torch.ones(2, 8)
    with torch.inference_mode():
        original = Original(Missing(2), {}, "cpu", (x,), (Missing(2)(x),))
    with pytest.raises(BrokenResult, match="gives numbers where the original gives NaN"):
        original.check(Missing(1))
    assert original.check(Missing(2)).snr_db == LIMIT_DB


def test_values_that_integer_layers_cannot_sum_are_a_fault_of_the_data():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    x = torch.rand(8, 8) * 1e38
    with torch.inference_mode():
        assert network(x).isfinite().all()
    line = r"^layer 2: the values reach 1e\+38, and their products are beyond float32; scale the data$"
    with pytest.raises(modelopt_cli.InputError, match=line) as refused:
        modelopt_cli.quantize(network, calibration=x)
    assert refused.value.exit_code == 2


class Logarithm(nn.Module):
    """The logarithm of a difference that is far smaller than what it is the difference of."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 1, 1, bias=False), nn.Linear(36, 4)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([[[[1.0]], [[-1.0]]]]))

    def forward(self, x):
        small = self.first(x)
        return torch.log(small), self.last(small.flatten(1))


def nearly_equal() -> torch.Tensor:
    values = torch.rand(16, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    return torch.cat([values + 1e-3, values], 1)


def test_a_function_that_takes_no_rounded_values_is_no_bug():
    """In 8 bits the difference is 0 or below; the layer that is named can be left out."""
    x = nearly_equal()
    quantize = partial(modelopt_cli.quantize, Logarithm().eval(), calibration=[x], evaluate=False)
    with pytest.raises(InputError, match="log gives NaN or infinity of what this layer computes") as refused:
        quantize()
    assert (refused.value.exit_code, refused.value.where) == (2, "layer first")
    assert refused.value.hint == "leave it out with exclude='first'"
    result = quantize(exclude=["first"])
    assert torch.isfinite(result.program(x)[0]).all()


@pytest.mark.parametrize("fault", ["far off", "NaN"])
def test_a_layer_that_computes_something_else_is_a_bug(fault):
    x = nearly_equal()
    original = capture(Logarithm().eval(), InputSpec((2, 6, 6)))
    made = copy.deepcopy(original)
    with torch.no_grad():
        made.first.weight.mul_(-1000 if fault == "far off" else math.nan)
    assert fault_of_rounding(original, made, x) is None
    data = open_data(as_samples([x], "data", None), input_spec=original.input, labels=False)
    checked = Original.of(Opened({}, True, "", program=original), data=data)
    with pytest.raises(BrokenResult, match="gives NaN or infinity"):
        checked.check(made)


def test_infinite_noise_is_the_limit():
    assert snr_db(torch.ones(3), torch.tensor([1.0, math.inf, 1.0])) == -LIMIT_DB
