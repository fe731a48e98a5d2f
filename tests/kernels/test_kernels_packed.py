"""Float layers of an int8 network: packed and fused, with the values of the layers themselves."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from modelopt_cli.kernels import prepare
from modelopt_cli.kernels.fp32 import PackedForm
from modelopt_cli.kernels.packed_layers import FEW_PRODUCTS, Packed, PackedConvolution
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.quantize.apply import apply
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.capture import capture

BOUND = 1e-5
"""Of the largest output: what float32 sums in another order may differ by. The int8 layer comes first, so
that none rounds the difference up to a step."""


class _Net(nn.Module):
    """An int8 layer, then float ones: depthwise, with a residual, and a small product."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.body, self.act = nn.Conv2d(8, 8, 3, padding=1), nn.Hardswish()
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = self.act(self.deep(x))
        x = torch.relu(self.body(x) + x)
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class _Data:
    name, labelled, size = "images", False, 16

    def sample(self, n: int, seed: int = 0) -> "_Data":
        return self

    def batches(self, size: int, **more: object) -> list[tuple[Tensor, Tensor]]:
        return [(images(16), torch.zeros(16, dtype=torch.int64))]


def images(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def mixed() -> Program:
    torch.manual_seed(0)
    program = capture(_Net().eval(), InputSpec((3, 12, 12)))
    made = apply(program, QuantizeConfig(include=("stem",)), Context(data=_Data()))  # type: ignore[arg-type]
    return prepare(made.program)


def plain(program: Program) -> Program:
    alone = copy.copy(program)
    alone.kernel = None
    return alone


def form_of(program: Program) -> Program:
    assert program.kernel is not None
    return program.kernel(program)


def close(y: Tensor, expected: Tensor) -> bool:
    return float((y - expected).abs().max()) <= BOUND * float(expected.abs().max())


@torch.inference_mode()
def test_float_layers_are_packed_and_fused_and_compute_the_same() -> None:
    program = mixed()
    kinds = [type(layer).__name__ for layer in form_of(program).modules()]
    assert kinds.count("PackedConvolution") == 2
    assert kinds.count("PackedLinear") == 1
    called = [node.target for node in form_of(program).graph.nodes if node.op.startswith("call")]
    assert "act" not in called
    assert torch.relu not in called
    for batch in (1, 5):
        y, expected = program(images(batch)), plain(program)(images(batch))
        assert close(y, expected)
    assert {name for name, _ in program.named_parameters()} >= {"deep.weight", "fc.weight"}


@torch.inference_mode()
def test_values_depend_on_no_earlier_call_and_copies_give_them_too() -> None:
    program, x = mixed(), images(4, seed=1)
    for batch in (1, 7):
        program(images(batch))
    first = mixed()(x)
    assert torch.equal(program(x), first)
    for again in (copy.copy(program), copy.deepcopy(program), pickle.loads(pickle.dumps(program))):  # noqa: S301
        assert isinstance(again.kernel, PackedForm)
        assert torch.equal(again(x), first)


def test_values_are_the_same_with_gradients_which_are_those_of_the_layers() -> None:
    program, x = mixed(), images(3)
    with torch.inference_mode():
        expected = program(x)
    y = program(x)
    assert torch.equal(y, expected)
    y.sum().backward()
    gradients = {name: p.grad.clone() for name, p in program.named_parameters() if p.grad is not None}
    assert gradients.keys() >= {"deep.weight", "body.bias", "fc.weight"}
    alone = plain(program)
    alone.zero_grad()
    alone(x).sum().backward()
    for name, parameter in alone.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_weight_a_layer_and_a_graph_that_change_are_seen() -> None:
    program, x = mixed(), images(2)
    program(x)
    program.get_submodule("body").weight.mul_(2)  # type: ignore[operator, union-attr]
    assert close(program(x), plain(program)(x))
    program.fc = nn.Linear(8, 5)
    assert close(program(x), plain(program)(x))
    output = next(iter(program.graph.find_nodes(op="output")))
    with program.graph.inserting_before(output):
        output.args = (program.graph.call_function(torch.neg, (output.args[0],)),)
    before = program(x)
    program.recompile()
    assert torch.equal(program(x), -before)


def test_hooks_are_called_also_of_layers_that_are_fused_away() -> None:
    program, x, seen = mixed(), images(2), list[str]()
    for name in ("act", "body"):
        layer = program.get_submodule(name)
        layer.register_forward_hook(lambda module, args, y, name=name: seen.append(name))
    with torch.inference_mode():
        program(x)
    assert seen == ["act", "body"]


def test_another_type_and_autocast_and_training_run_the_layers_themselves() -> None:
    program = mixed()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert form_of(program) is program
    assert form_of(program.train()) is program
    assert form_of(program.eval()) is not program
    program.get_submodule("fc").double()
    assert not any(
        isinstance(layer, Packed) and layer.layer is program.fc for layer in form_of(program).modules()
    )


def test_what_is_all_float_or_all_int8_has_no_form_of_its_own() -> None:
    program = capture(_Net().eval(), InputSpec((3, 12, 12)))
    assert prepare(program).kernel is None
    whole = apply(program, QuantizeConfig(), Context(data=_Data())).program  # type: ignore[arg-type]
    assert prepare(whole).kernel is None
    assert prepare(mixed(), backend="reference").kernel is None


def test_a_wrong_operator_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        PackedConvolution, "operator", lambda self, x: lambda x, *more: self.own(x, *more) + 1
    )
    program, x = mixed(), images(2)
    with torch.inference_mode():
        assert torch.equal(program(x), plain(program)(x))


def test_small_products_are_left_to_torch() -> None:
    few, many = PackedConvolution(nn.Conv2d(8, 8, 1), "none"), PackedConvolution(nn.Conv2d(64, 64, 1), "none")
    with torch.inference_mode():
        for layer, side in ((few, 12), (many, 60)):
            x = torch.randn(1, layer.layer.in_channels, side, side)
            layer(x)
            assert layer._built is not None
            assert (layer._built[1] == layer.own) is (layer.products(x) <= FEW_PRODUCTS)
    assert layer.products(x) > FEW_PRODUCTS
