"""Folding against the unfolded network, computed in float64 so that only the algebra is compared."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from program_networks import build, fill, side
from torch import Tensor, nn

from modelopt_cli.program import Encoding, InputSpec, Program
from modelopt_cli.program.capture import capture
from modelopt_cli.program.fold import fold_batch_norms, inference_form
from modelopt_cli.program.serialization import from_data, state_of, to_data


def kinds(program: Program) -> list[str]:
    calls = program.graph.find_nodes(op="call_module")
    return [type(program.get_submodule(str(n.target))).__name__ for n in sorted(calls)]


def captured(model: nn.Module, shape: tuple[int, ...]) -> Program:
    fill(model)
    return capture(model.double(), InputSpec(shape))


def check(program: Program, folded: Program) -> None:
    x = torch.randn(3, *program.input.shape, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), program(x), rtol=1e-12, atol=1e-12)
    again = from_data(to_data(folded), state_of(folded))
    with torch.no_grad():
        assert torch.equal(again(x), folded(x))


def net(forward: Any, **layers: nn.Module) -> nn.Module:
    module = type("Net", (nn.Module,), {"forward": forward})()
    for name, layer in layers.items():
        setattr(module, name, layer)
    return module  # type: ignore[no-any-return]


MAP, TEXT = (4, 8, 8), (4, 8)


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        pytest.param(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), MAP, id="conv2d"),
        pytest.param(nn.Conv2d(4, 6, 3, bias=False, groups=2), nn.BatchNorm2d(6), MAP, id="grouped"),
        pytest.param(
            nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"),
            nn.BatchNorm2d(6),
            (4, 8, 8),
            id="circular",
        ),
        pytest.param(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, eps=0.1, affine=False), MAP, id="not-affine"),
        pytest.param(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, bias=False), MAP, id="norm-without-bias"),
        pytest.param(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), TEXT, id="conv1d"),
        pytest.param(nn.Conv3d(4, 6, 2), nn.BatchNorm3d(6), (4, 4, 4, 4), id="conv3d"),
        pytest.param(nn.ConvTranspose2d(4, 6, 3, 2), nn.BatchNorm2d(6), MAP, id="transposed"),
        pytest.param(
            nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False),
            nn.BatchNorm2d(6),
            (4, 8, 8),
            id="transposed-grouped",
        ),
        pytest.param(
            nn.ConvTranspose1d(4, 4, 3, groups=4), nn.BatchNorm1d(4), TEXT, id="transposed-depthwise"
        ),
        pytest.param(nn.Linear(5, 6), nn.BatchNorm1d(6), (5,), id="linear"),
        pytest.param(nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6), (5,), id="linear-without-bias"),
    ],
)
def test_batch_norm_is_folded(layer: nn.Module, norm: nn.Module, shape: tuple[int, ...]) -> None:
    program = captured(nn.Sequential(layer, norm, nn.ReLU()), shape)
    before = copy.deepcopy(program.state_dict())
    folded = fold_batch_norms(program)
    assert kinds(folded) == [type(layer).__name__, "ReLU"]
    check(program, folded)
    assert kinds(program) == [type(layer).__name__, type(norm).__name__, "ReLU"]
    assert all(torch.equal(program.state_dict()[name], tensor) for name, tensor in before.items())


def test_two_batch_norms_in_a_row() -> None:
    program = captured(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)), (3, 4, 4))
    folded = fold_batch_norms(program)
    assert kinds(folded) == ["Conv2d"]
    check(program, folded)


def test_folded_weights_are_rounded_once() -> None:
    """The float32 result is the nearest to the exact product, not that of float32 arithmetic."""
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64))
    fill(model)
    folded = fold_batch_norms(capture(model, InputSpec((3, 8, 8)))).get_submodule("0")
    conv, norm = copy.deepcopy(model).double().children()
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    assert folded.weight.dtype == torch.float32
    assert torch.equal(folded.weight, (conv.weight * scale.view(-1, 1, 1, 1)).float())
    assert torch.equal(folded.bias, ((conv.bias - norm.running_mean) * scale + norm.bias).float())


@pytest.mark.parametrize(
    ("forward", "layers", "shape"),
    [
        pytest.param(
            lambda self, x: (lambda y: self.n(y) + y)(self.c(x)),
            {"c": nn.Conv2d(3, 4, 1), "n": nn.BatchNorm2d(4)},
            (3, 4, 4),
            id="output-used-twice",
        ),
        pytest.param(
            lambda self, x: self.n(self.c(self.c(x))),
            {"c": nn.Conv2d(3, 3, 1), "n": nn.BatchNorm2d(3)},
            (3, 4, 4),
            id="layer-called-twice",
        ),
        pytest.param(
            lambda self, x: self.c(self.n(x)),
            {"c": nn.Conv2d(3, 4, 1), "n": nn.BatchNorm2d(3)},
            (3, 4, 4),
            id="norm-first",
        ),
        pytest.param(
            lambda self, x: self.n(self.c(x)) * self.c.weight.sum(),
            {"c": nn.Conv2d(3, 4, 1), "n": nn.BatchNorm2d(4)},
            (3, 4, 4),
            id="weight-fetched",
        ),
        pytest.param(
            lambda self, x: self.n(self.c(x)),
            {"c": nn.Conv2d(3, 4, 1), "n": nn.BatchNorm2d(4, track_running_stats=False)},
            (3, 4, 4),
            id="no-statistics",
        ),
        pytest.param(
            lambda self, x: self.n(self.c(x)),
            {"c": nn.Linear(5, 6), "n": nn.BatchNorm1d(6)},
            (6, 5),
            id="linear-over-a-sequence",
        ),
    ],
)
def test_batch_norm_stays(forward: Any, layers: dict[str, nn.Module], shape: tuple[int, ...]) -> None:
    program = captured(net(forward, **layers), shape)
    folded = fold_batch_norms(program)
    assert kinds(folded) == kinds(program)
    check(program, folded)


def test_a_block_that_is_called_again_is_folded_once() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        for _ in range(3):
            x = F.relu(self.n(self.c(x)))
        return self.n(x)

    model = net(forward, c=nn.Conv2d(3, 3, 1), n=nn.BatchNorm2d(3))
    program = captured(model, (3, 4, 4))
    folded = fold_batch_norms(program)
    assert kinds(folded) == ["Conv2d"] * 3 + ["BatchNorm2d"]
    check(program, folded)


@pytest.mark.parametrize(
    "other", [lambda self, x: self.m(x), lambda self, x: F.relu(x)], ids=["norm", "none"]
)
def test_a_layer_is_not_folded_where_its_calls_differ(other: Any) -> None:
    layers = {"c": nn.Conv2d(3, 3, 1), "n": nn.BatchNorm2d(3), "m": nn.BatchNorm2d(3)}
    program = captured(
        net(lambda self, x: other(self, self.c(F.relu(self.n(self.c(x))))), **layers), (3, 4, 4)
    )
    folded = fold_batch_norms(program)
    assert kinds(folded) == kinds(program)
    check(program, folded)


def test_tied_weights_are_not_folded() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    model[2].weight = model[0].weight
    program = captured(model, (3, 4, 4))
    assert kinds(fold_batch_norms(program)) == ["Conv2d", "BatchNorm2d", "Conv2d"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v3_small", "googlenet"])
def test_real_networks(name: str) -> None:
    program = capture(build(name).double(), InputSpec((3, side(name), side(name))), verify=False)
    folded = fold_batch_norms(inference_form(program))
    left = kinds(folded).count("BatchNorm2d")
    # Every dense layer and transition of a DenseNet normalises a concatenation; the last norm, too.
    assert left == (62 if name == "densenet121" else 0)
    assert "Dropout" not in kinds(folded)
    check(program, folded)


class TestPadding:
    @pytest.mark.parametrize(
        ("pad", "layer", "expected"),
        [
            pytest.param(nn.ZeroPad2d((2, 2, 1, 1)), nn.Conv2d(3, 4, 3), (1, 2), id="module"),
            pytest.param(nn.ZeroPad2d(1), nn.Conv2d(3, 4, 3, padding=(1, 0)), (2, 1), id="adds-up"),
            pytest.param(nn.ConstantPad2d(2, 0.0), nn.Conv2d(3, 4, 3, stride=2), (2, 2), id="constant"),
            pytest.param(net(lambda self, x: F.pad(x, (3, 3))), nn.Conv2d(3, 4, 3), (0, 3), id="width"),
            pytest.param(
                net(lambda self, x: F.pad(x, [1] * 4, value=0.0)), nn.Conv2d(3, 4, 3), (1, 1), id="function"
            ),
        ],
    )
    def test_moves_into_the_convolution(
        self, pad: nn.Module, layer: nn.Module, expected: tuple[int, ...]
    ) -> None:
        program = captured(nn.Sequential(pad, layer), (3, 8, 8))
        folded = fold_batch_norms(program)
        assert len(folded.graph.nodes) == 3
        assert folded.get_submodule("1").padding == expected
        check(program, folded)

    @pytest.mark.parametrize(
        ("pad", "layer"),
        [
            pytest.param(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 4, 3), id="one-sided"),
            pytest.param(nn.ConstantPad2d(1, 0.5), nn.Conv2d(3, 4, 3), id="not-zero"),
            pytest.param(nn.ReflectionPad2d(1), nn.Conv2d(3, 4, 3), id="reflection"),
            pytest.param(nn.ZeroPad2d(-1), nn.Conv2d(3, 4, 3), id="cropping"),
            pytest.param(nn.ZeroPad2d(1), nn.Conv2d(3, 4, 3, padding="same"), id="same"),
            pytest.param(nn.ZeroPad2d(1), nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), id="mode"),
            pytest.param(net(lambda self, x: F.pad(x, [1] * 6)), nn.Conv2d(5, 4, 3), id="channels-too"),
            pytest.param(
                net(lambda self, x: F.pad(x, [1] * 4, mode="circular")), nn.Conv2d(3, 4, 3), id="circular"
            ),
            pytest.param(nn.ZeroPad2d(1), nn.MaxPool2d(2), id="pooling"),
        ],
    )
    def test_stays(self, pad: nn.Module, layer: nn.Module) -> None:
        program = captured(nn.Sequential(pad, layer), (3, 8, 8))
        folded = fold_batch_norms(program)
        assert len(folded.graph.nodes) == 4
        check(program, folded)

    def test_used_twice_stays(self) -> None:
        def forward(self: Any, x: Tensor) -> Tensor:
            y = self.p(x)
            return self.c(y) + y.mean()  # type: ignore[no-any-return]

        program = captured(net(forward, p=nn.ZeroPad2d(1), c=nn.Conv2d(3, 4, 3)), (3, 8, 8))
        assert "ZeroPad2d" in kinds(fold_batch_norms(program))


class TestInferenceForm:
    def test_idle_layers_go(self) -> None:
        from torchvision.ops import StochasticDepth

        def forward(self: Any, x: Tensor) -> Tensor:
            y = F.dropout(self.conv(self.identity(x)), 0.5, self.training)
            y = F.dropout2d(y, training=self.training)
            return self.depth(self.drop(y)) + 1  # type: ignore[no-any-return]

        layers = {"conv": nn.Conv2d(3, 4, 1), "identity": nn.Identity(), "drop": nn.Dropout()}
        program = captured(net(forward, depth=StochasticDepth(0.5, "row"), **layers), (3, 4, 4))
        stripped = inference_form(program)
        assert [n.op for n in stripped.graph.nodes] == [
            "placeholder",
            "call_module",
            "call_function",
            "output",
        ]
        check(program, stripped)
        assert len(program.graph.nodes) == 9

    def test_everything_else_about_the_program_is_kept(self) -> None:
        program = captured(
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)), (3, 4, 4)
        )
        program.history, program.labels = ({"method": "prune"},), ("a", "b")
        program.encodings = {
            "0.weight": Encoding("sparse"),
            "1.bias": Encoding("raw"),
            "2.weight": Encoding("sparse"),
        }
        folded = fold_batch_norms(program)
        assert (folded.history, folded.labels, folded.input) == (program.history, ("a", "b"), program.input)
        assert set(folded.encodings) == {"2.weight"}
        assert set(inference_form(program).encodings) == {"0.weight", "1.bias", "2.weight"}

    def test_shares_tensors_but_not_modules(self) -> None:
        program = captured(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout()), (3, 4, 4))
        stripped = inference_form(program)
        assert stripped.get_submodule("0") is not program.get_submodule("0")
        assert stripped.get_submodule("0").weight is program.get_submodule("0").weight

    def test_mode_is_kept(self) -> None:
        program = captured(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout()), (3, 4, 4))
        assert not inference_form(program).training
        assert inference_form(program.train()).training
