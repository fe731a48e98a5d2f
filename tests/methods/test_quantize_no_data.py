"""The schemes that need no data: int8-dynamic and int8-weight, with and without a graph."""

import copy
from typing import Any

import pytest
import torch
from quantize_networks import captured, count, images, on_state, quantized, small, sqnr, torchvision_program
from torch import Tensor, nn
from torchvision import models

from modelopt_cli.checkpoint.integer_layers import restore_integer_layers
from modelopt_cli.errors import NothingCompressed, UsageError
from modelopt_cli.kernels import prepare
from modelopt_cli.measure.coverage import coverage
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.quantize.apply import apply
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.program.quantized_linear import DynamicLinear


def test_dynamic_linears_of_a_transformer() -> None:
    program = torchvision_program("vit_b_16")
    dynamic = quantized(program, "int8-dynamic")
    # Two layers of in_proj, out_proj and two linears each, and the head; the patches' convolution stays.
    assert count(dynamic, "DynamicLinear") == 9
    covered = coverage(dynamic)
    assert (covered.compressed, covered.total) == (9, 10)
    x = images(3, 3, 32, 32)
    with torch.inference_mode():
        expected = prepare(dynamic, backend="reference")(x)
        torch.testing.assert_close(
            prepare(dynamic)(x), expected, rtol=1e-2, atol=2e-2 * float(expected.std())
        )
        assert sqnr(program(x), expected) > 25


def test_stored_weights_are_multiples_of_their_scale() -> None:
    program = small()
    with torch.no_grad():
        program.get_submodule("body").weight[:, ::2] = 0  # type: ignore[index,operator]
    stored = quantized(program, "int8-weight")
    assert coverage(stored).fraction == 1.0
    for name, encoding in stored.encodings.items():
        was, now = program.get_parameter(name), stored.get_parameter(name)
        steps = now.flatten(1) / encoding.parts["scale"][:, None]
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
        assert steps.abs().max() <= 127.001
        assert ((was - now).abs().flatten(1) <= encoding.parts["scale"][:, None] * 0.501).all()
        assert not now[was == 0].any()
    x = images(3, 3, 12, 12)
    with torch.inference_mode():
        assert sqnr(program(x), stored(x)) > 35


def test_bare_state() -> None:
    state = {"a.weight": torch.randn(4, 6), "a.bias": torch.randn(4), "n.weight": torch.randn(4),
             "b.weight": torch.ones(2, 3, dtype=torch.int64)}  # fmt: skip
    before = {k: v.clone() for k, v in state.items()}
    done = on_state(state, QuantizeConfig("int8-weight"))
    assert set(done.encodings) == {"a.weight"}
    assert (done.coverage.compressed, done.coverage.total) == (1, 2)
    assert done.skipped == {"b": "not floating point but int64"}
    assert all(torch.equal(v, state[k]) for k, v in before.items())
    for scheme in ("int8", "int8-dynamic"):
        with pytest.raises(UsageError, match="int8-weight"):
            on_state(state, QuantizeConfig(scheme))
    with pytest.raises(NothingCompressed):
        on_state({"bias": torch.ones(3)}, QuantizeConfig("int8-weight"))


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu().mean((2, 3))
        return self.fc(x) if bool(x.sum() > -1e9) else x


@pytest.mark.parametrize("options", [{}, {"exclude": ("conv",)}], ids=str)
def test_dynamic_without_a_graph(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = Untraceable().eval()
    config = QuantizeConfig("int8-dynamic", **options)
    done = on_state(net.state_dict(), config, dict(net.named_modules()))
    assert set(done.encodings) == {"fc.weight"}
    rebuilt = copy.deepcopy(net)
    rebuilt.load_state_dict(done.state)
    restore_integer_layers(rebuilt, ({"method": "quantize", "config": config.as_dict()},), done.encodings)
    assert isinstance(rebuilt.fc, DynamicLinear)
    torch.testing.assert_close(rebuilt.fc.float_weight(), done.state["fc.weight"])
    x = images(4, 3, 9, 9)
    with torch.inference_mode():
        assert sqnr(net(x), rebuilt(x)) > 30
    entry = {"method": "quantize", "config": config.as_dict()}
    later = {"method": "quantize", "config": QuantizeConfig("int8-weight").as_dict()}
    for history in ((), ({"config": ["scheme"]}, {"config": {"scheme": 8}}), (entry, later)):
        plain = copy.deepcopy(net)
        restore_integer_layers(plain, history, done.encodings)
        assert type(plain.fc) is nn.Linear


# Those that test_quantize_static does not count the layers of.
FAMILIES = [
    *("efficientnet_v2_s", "maxvit_t", "mnasnet0_5", "regnet_y_400mf"),
    *("resnext50_32x4d", "squeezenet1_0", "swin_t", "swin_v2_t"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_converts_and_runs(name: str) -> None:
    assert name in models.list_models(models)
    program = torchvision_program(name)
    int8 = prepare(quantized(program, observer="minmax"))
    x = images(2, *program.input.shape, seed=2)
    with torch.inference_mode():
        y = int8(x)
    assert y.isfinite().all()
    assert y.shape == program(x).shape
    assert coverage(int8).compressed > 0


def test_a_captured_linear_alone() -> None:
    program = captured(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), 3, 2, 2)
    for scheme in ("int8", "int8-dynamic", "int8-weight"):
        assert coverage(quantized(program, scheme)).fraction == 1.0


def test_a_bare_attention_with_separate_projections_is_stored_whole() -> None:
    names = [f"attention.{part}_proj_weight" for part in "qkv"]
    state = {name: torch.randn(8, 8) for name in names}
    result = on_state(state, QuantizeConfig("int8-weight"))
    assert sorted(result.encodings) == sorted(names)
    assert (result.coverage.compressed, result.coverage.total) == (3, 3)


class Matrices(nn.Module):
    """Multiplies with a matrix that no layer has, next to one that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.position = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(1, 8))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(x @ self.own + self.position)
        return result


def test_matrices_that_no_layer_has_are_stored_as_int8_too() -> None:
    program = captured(Matrices(), 6)
    stored = apply(program, QuantizeConfig("int8-weight"), Context()).program
    assert set(stored.encodings) == {"own", "fc.weight"}
    assert coverage(stored).fraction == 1.0
    x = torch.randn(64, 6)
    with torch.inference_mode():
        assert sqnr(program(x), stored(x)) > 35


def test_recurrent_weights_are_stored_as_int8_and_other_names_are_listed() -> None:
    module = nn.LSTM(8, 16)
    state = {f"l.{name}": tensor.detach() for name, tensor in module.named_parameters()}
    done = on_state({**state, "position": torch.ones(2, 8)}, QuantizeConfig("int8-weight"))
    assert set(done.encodings) == {"l.weight_ih_l0", "l.weight_hh_l0"}
    assert done.skipped == {"position": "not called a weight"}
    for name in done.encodings:
        step = state[name].abs().amax(1, keepdim=True) / 127
        assert bool(((done.state[name] - state[name]).abs() <= step * 0.501).all())


def test_a_type_as_small_as_int8_is_left_and_listed() -> None:
    state = {"a.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "b.weight": torch.randn(4, 4)}
    done = on_state(state, QuantizeConfig("int8-weight"))
    assert done.skipped == {"a": "float8_e4m3fn is as small as int8"}
