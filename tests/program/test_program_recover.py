"""Functional calls with fetched weights come back as layers under their own names."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelopt_cli.errors import CaptureError
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.capture import capture


def traced_through(base: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """A layer of the user's own class with the forward of ``base``, which is therefore no leaf."""
    return type("Own", (base,), {})(*args, **kwargs)  # type: ignore[no-any-return]


def captured(model: nn.Module, shape: tuple[int, ...]) -> Program:
    program = capture(model, InputSpec(shape))
    x = torch.randn(2, *shape)
    with torch.no_grad():
        assert torch.equal(program(x), model.eval()(x))
    return program


@pytest.mark.parametrize(
    ("base", "args", "options", "shape"),
    [
        (nn.Conv1d, (4, 6, 3), {"stride": 2, "padding": 1, "groups": 2}, (4, 9)),
        (nn.Conv2d, (4, 6, (3, 2)), {"dilation": (1, 2), "bias": False}, (4, 9, 9)),
        (nn.Conv2d, (4, 6, 3), {"padding": "same"}, (4, 9, 9)),
        (nn.Conv2d, (4, 6, 3), {"padding": 1, "padding_mode": "reflect"}, (4, 9, 9)),
        (nn.Conv3d, (4, 2, 2), {}, (4, 5, 5, 5)),
        (nn.ConvTranspose1d, (4, 6, 3), {"stride": 2, "output_padding": 1}, (4, 9)),
        (nn.ConvTranspose2d, (4, 6, 3), {"stride": 2, "groups": 2, "dilation": 2}, (4, 5, 5)),
        (nn.ConvTranspose3d, (4, 2, 2), {"bias": False}, (4, 3, 3, 3)),
        (nn.Linear, (4, 6), {"bias": False}, (4,)),
        (nn.Linear, (4, 6), {}, (3, 4)),
        (nn.LayerNorm, ((3, 4),), {"eps": 0.1}, (2, 3, 4)),
        (nn.LayerNorm, (4,), {"bias": False}, (3, 4)),
        (nn.GroupNorm, (2, 4), {"eps": 0.1}, (4, 5, 5)),
        (nn.BatchNorm1d, (4,), {"momentum": None}, (4, 5)),
        (nn.BatchNorm2d, (4,), {"eps": 0.1}, (4, 5, 5)),
        (nn.BatchNorm2d, (4,), {"affine": False}, (4, 5, 5)),
        (nn.BatchNorm3d, (4,), {}, (4, 3, 3, 3)),
    ],
)
def test_layers_come_back(base: Any, args: Any, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    own = traced_through(base, *args, **options)
    program = captured(nn.ModuleDict({"a": nn.Sequential(own)})["a"], shape)
    again = program.get_submodule("0")
    assert type(again) is base
    assert not program.graph.find_nodes(op="get_attr")
    assert list(again.state_dict()) == list(own.state_dict())
    assert all(again.get_parameter(name) is own.get_parameter(name) for name, _ in own.named_parameters())


@pytest.mark.parametrize("largest", [None, 1.0])
def test_an_embedding_comes_back(largest: float | None) -> None:
    class Positions(nn.Embedding):
        """As OPT has it: the first rows are no positions."""

        def forward(self, places: Tensor) -> Tensor:
            return F.embedding(places + 2, self.weight, self.padding_idx, largest)

    model = nn.Sequential(Positions(9, 4, padding_idx=1))
    program = capture(model, InputSpec((5,), dtype="int64"), verify=False)
    places = torch.randint(7, (2, 5))
    with torch.no_grad():
        assert torch.equal(program(places), model(places))
    called = program.graph.find_nodes(op="call_module")
    kinds = [type(program.get_submodule(str(node.target))) for node in called]
    assert kinds == ([nn.Embedding] if largest is None else [])


def test_torchvision_layers_of_its_own_classes() -> None:
    from torchvision.models.convnext import LayerNorm2d
    from torchvision.ops import FrozenBatchNorm2d

    program = captured(nn.Sequential(LayerNorm2d(4), FrozenBatchNorm2d(4)), (4, 5, 5))
    assert type(program.get_submodule("0")) is nn.LayerNorm
    assert {"1.weight", "1.running_var"} < set(program.state_dict())


class Padded(nn.Conv2d):
    """With a layer inside a layer, as EfficientNet-PyTorch has it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.static_padding = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.static_padding(x), self.weight, self.bias, self.stride)


def test_layer_inside_a_recovered_layer_moves_beside_it() -> None:
    model = nn.Sequential(Padded(3, 4, 3, 2))
    program = captured(model, (3, 8, 8))
    assert [str(n.target) for n in program.graph.find_nodes(op="call_module")] == ["0_static_padding", "0"]
    assert set(program.state_dict()) == set(model.state_dict())
    assert next(program.get_submodule("0").children(), None) is None


def test_frozen_weights_kept_as_buffers() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.randn(4, 3, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight)  # type: ignore[arg-type]

    layer = captured(nn.Sequential(Frozen()), (3, 8, 8)).get_submodule("0")
    assert type(layer) is nn.Conv2d
    assert not layer.weight.requires_grad


def net(forward: Any) -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = traced_through(nn.Linear, 4, 4)
            self.lin = nn.Linear(4, 4)
            self.matrix = nn.Parameter(torch.randn(4, 4))
            self.weight = nn.Parameter(torch.randn(4, 4))

    Net.forward = forward  # type: ignore[method-assign]
    return Net()


@pytest.mark.parametrize(
    ("forward", "left"),
    [
        pytest.param(lambda self, x: self.own(self.own(x)), 0, id="called-twice"),
        pytest.param(
            lambda self, x: F.linear(input=x, weight=self.own.weight, bias=self.own.bias), 0, id="keywords"
        ),
        pytest.param(lambda self, x: F.linear(x, self.own.weight), 0, id="without-its-bias"),
        pytest.param(lambda self, x: F.linear(x, self.own.weight, self.lin.bias), 1, id="bias-of-another"),
        pytest.param(lambda self, x: F.linear(x, self.matrix), 1, id="other-name"),
        pytest.param(lambda self, x: F.linear(x, self.weight), 1, id="weight-of-the-root"),
        pytest.param(lambda self, x: F.linear(x, self.own.weight * 2), 1, id="computed-weight"),
        pytest.param(lambda self, x: self.own(x) + self.own.weight.sum(), 1, id="weight-used-elsewhere"),
        pytest.param(lambda self, x: self.lin(x) + F.linear(x, self.lin.weight), 1, id="layer-called-too"),
        pytest.param(lambda self, x: self.own(x) + F.linear(x, self.own.weight), 2, id="calls-that-differ"),
    ],
)
def test_only_what_is_safe_is_recovered(forward: Any, left: int) -> None:
    model = net(forward)
    program = capture(model, InputSpec((4,)), verify=False)
    functions = [n for n in program.graph.nodes if n.target is F.linear]
    assert len(functions) == left
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(program(x), model(x))


def test_computed_hyperparameters_stay_functions() -> None:
    class Norm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x, x.shape[1:], self.weight, self.bias, self.eps)

    program = captured(nn.Sequential(Norm((3, 4))), (3, 4))
    assert [n.op for n in program.graph.nodes if n.target is F.layer_norm] == ["call_function"]


class Dropping(nn.Module):
    """Dropout as functions, below a layer that is recovered as a leaf too."""

    class Conv(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            x = F.conv2d(input, self.weight, self.bias)
            return F.dropout2d(x, 0.25, self.training)

    class Part(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(torch.dropout(x, 0.3, self.training), training=self.training, inplace=True)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.part, self.dropout = self.Conv(2, 3, 1), self.Part(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.part(self.conv(x)).mean((2, 3)))
        return F.dropout(F.alpha_dropout(x, 0.1, self.training), 0.2, self.training)


def test_dropout_functions_act_in_training() -> None:
    """A Program drops as its network does: with the same seed the same elements, in the same order."""
    model = Dropping()
    program = captured(model, (2, 4, 4))
    layers = {n: m for n, m in program.named_modules() if "Dropout" in type(m).__name__}
    assert {name: (type(m).__name__, m.p) for name, m in layers.items()} == {
        "conv_dropout": ("Dropout2d", 0.25),
        "part.dropout": ("Dropout", 0.3),
        "part.dropout_1": ("Dropout", 0.5),
        "dropout_1": ("AlphaDropout", 0.1),
        "dropout_2": ("Dropout", 0.2),
    }
    x = torch.randn(8, 2, 4, 4)
    torch.manual_seed(3)
    expected = model.train()(x)
    torch.manual_seed(3)
    assert torch.equal(program.train()(x), expected)
    assert not torch.equal(program.eval()(x), expected)


def test_dropout_that_is_always_on_is_left_and_refused() -> None:
    class Always(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5)

    with pytest.raises(CaptureError, match="does not compute what the network does"):
        capture(Always(), InputSpec((64,)))
