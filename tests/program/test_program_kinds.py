import inspect
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from modelopt_cli import program
from modelopt_cli.errors import ArtifactError
from modelopt_cli.program import allowlist
from modelopt_cli.program.layer_kinds import KINDS, build, config_of, fields_of, kind_of, share

IMAGE, ROWS = (2, 4, 12, 12), (2, 4, 12)
CUBE = (2, 4, 6, 6, 6)

# One or more unusual instances of every kind, and the shape of an input for them.
EXAMPLES: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, bias=False), ROWS),
    (nn.Conv2d(4, 6, (3, 5), padding="same", padding_mode="reflect"), IMAGE),
    (nn.Conv2d(4, 8, 3, (2, 1), (0, 2), groups=4), IMAGE),
    (nn.Conv3d(4, 2, (1, 2, 3), padding="valid"), CUBE),
    (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), ROWS),
    (nn.ConvTranspose2d(4, 6, 3, 2, 1, (1, 0), groups=2, dilation=2, bias=False), IMAGE),
    (nn.ConvTranspose3d(4, 2, 2), CUBE),
    (nn.Linear(12, 3, bias=False), IMAGE),
    (nn.BatchNorm1d(4, eps=1e-3, momentum=None), ROWS),
    (nn.BatchNorm2d(4, affine=False), IMAGE),
    (nn.BatchNorm2d(4, track_running_stats=False), IMAGE),
    (nn.BatchNorm3d(4), CUBE),
    (nn.InstanceNorm1d(4), ROWS),
    (nn.InstanceNorm2d(4, affine=True, track_running_stats=True), IMAGE),
    (nn.InstanceNorm3d(4, eps=0.1), CUBE),
    (nn.LayerNorm((12, 12), bias=False), IMAGE),
    (nn.LayerNorm(12, elementwise_affine=False), IMAGE),
    (nn.RMSNorm(12), IMAGE),
    (nn.RMSNorm([12], eps=0.5, elementwise_affine=False), IMAGE),
    (nn.GroupNorm(2, 4, eps=0.1, affine=False), IMAGE),
    (nn.LocalResponseNorm(3, 0.1, 0.5, 2.0), IMAGE),
    *[
        (getattr(nn, name)(inplace=True), IMAGE)
        for name in ["ReLU", "ReLU6", "SiLU", "Mish", "SELU", "Hardswish", "Hardsigmoid"]
    ],
    *[
        (getattr(nn, name)(), IMAGE)
        for name in ["Sigmoid", "Tanh", "Tanhshrink", "Softsign", "LogSigmoid", "Softmax2d", "Identity"]
    ],
    (nn.ELU(0.3), IMAGE),
    (nn.CELU(0.3), IMAGE),
    (nn.GELU("tanh"), IMAGE),
    (nn.GLU(1), IMAGE),
    (nn.Hardtanh(-0.5, float("inf")), IMAGE),
    (nn.LeakyReLU(0.3), IMAGE),
    (nn.PReLU(4, 0.1), IMAGE),
    (nn.RReLU(0.1, 0.2), IMAGE),
    (nn.Softplus(2.0, 1.0), IMAGE),
    (nn.Threshold(0.1, 7.0), IMAGE),
    (nn.Hardshrink(0.3), IMAGE),
    (nn.Softshrink(0.3), IMAGE),
    (nn.Softmax(1), IMAGE),
    (nn.Softmin(-1), IMAGE),
    (nn.LogSoftmax(1), IMAGE),
    (nn.MaxPool1d(2, ceil_mode=True), ROWS),
    (nn.MaxPool2d((3, 2), padding=(1, 0), dilation=2), IMAGE),
    (nn.MaxPool3d(2, stride=1), CUBE),
    (nn.AvgPool1d(3, 2, 1, count_include_pad=False), ROWS),
    (nn.AvgPool2d(3, (2, 1), 1, True, False, 5), IMAGE),
    (nn.AvgPool3d(2), CUBE),
    (nn.LPPool1d(2.0, 3), ROWS),
    (nn.LPPool2d(4.0, (2, 3), ceil_mode=True), IMAGE),
    (nn.LPPool3d(2, 2, 1), CUBE),
    (nn.AdaptiveAvgPool1d(5), ROWS),
    (nn.AdaptiveAvgPool2d((None, 3)), IMAGE),
    (nn.AdaptiveAvgPool3d((1, 2, 3)), CUBE),
    (nn.AdaptiveMaxPool1d(5), ROWS),
    (nn.AdaptiveMaxPool2d(2), IMAGE),
    (nn.AdaptiveMaxPool3d(2), CUBE),
    (nn.ReflectionPad1d(2), ROWS),
    (nn.ReflectionPad2d((1, 2, 3, 0)), IMAGE),
    (nn.ReflectionPad3d(1), CUBE),
    (nn.ReplicationPad1d((2, 0)), ROWS),
    (nn.ReplicationPad2d(1), IMAGE),
    (nn.ReplicationPad3d(1), CUBE),
    (nn.ZeroPad1d(1), ROWS),
    (nn.ZeroPad2d((1, 0, -1, 2)), IMAGE),
    (nn.ZeroPad3d(1), CUBE),
    (nn.CircularPad1d(1), ROWS),
    (nn.CircularPad2d(1), IMAGE),
    (nn.CircularPad3d(1), CUBE),
    (nn.ConstantPad1d(1, 2.5), ROWS),
    (nn.ConstantPad2d(1, float("-inf")), IMAGE),
    (nn.ConstantPad3d(1, 2), CUBE),
    *[
        (getattr(nn, n)(0.3, True), IMAGE)
        for n in ["Dropout", "Dropout2d", "AlphaDropout", "FeatureAlphaDropout"]
    ],
    (nn.Dropout1d(0.1), ROWS),
    (nn.Dropout3d(0.1), CUBE),
    (nn.Flatten(2, 3), IMAGE),
    (nn.Unflatten(1, (2, 2)), IMAGE),
    (nn.Fold((6, 6), 2, stride=2), (1, 8, 9)),
    (nn.Unfold((2, 3), dilation=2, padding=1, stride=2), IMAGE),
    (nn.Upsample(scale_factor=(1.5, 2.0), mode="bilinear", align_corners=True), IMAGE),
    (nn.Upsample((7, 5), mode="nearest-exact"), IMAGE),
    (nn.UpsamplingNearest2d(scale_factor=2), IMAGE),
    (nn.UpsamplingBilinear2d(size=20), IMAGE),
    (nn.PixelShuffle(2), IMAGE),
    (nn.PixelUnshuffle(3), IMAGE),
    (nn.ChannelShuffle(2), IMAGE),
]


def example_id(case: Any) -> str:
    return str(case).replace("\n", "") if isinstance(case, nn.Module) else ""


def through_json(module: nn.Module) -> nn.Module:
    config = json.loads(json.dumps(config_of(module)))
    return build(kind_of(module) or "", config)


@pytest.mark.parametrize(("module", "shape"), EXAMPLES, ids=example_id)
def test_rebuilt_layer_computes_the_same_bits(module: nn.Module, shape: tuple[int, ...]) -> None:
    module.eval()
    again = through_json(module)
    assert type(again) is type(module)
    assert config_of(again) == config_of(module)
    assert not again.training
    again.load_state_dict(module.state_dict(), strict=True, assign=True)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module(x.clone())
        assert torch.equal(again(x.clone()), expected)
        assert torch.equal(share(module)(x.clone()), expected)


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False, "batch_first": True}, {"add_bias_kv": True, "kdim": 6, "vdim": 5, "dropout": 0.1}],
)
def test_attention(options: dict[str, Any]) -> None:
    module = nn.MultiheadAttention(8, 2, **options).eval()
    again = through_json(module)
    again.load_state_dict(module.state_dict(), assign=True)
    q, k, v = (torch.randn(3, 3, width) for width in (8, options.get("kdim", 8), options.get("vdim", 8)))
    with torch.no_grad():
        assert torch.equal(again(q, k, v)[0], module(q, k, v)[0])


F_POOLED = {
    d: getattr(torch.nn.functional, f"max_pool{d}d")(torch.randn(1, 2, *[4] * d), 2, return_indices=True)
    for d in (1, 2, 3)
}


def test_layers_with_other_inputs() -> None:
    for module, inputs in [
        (nn.Embedding(10, 3, padding_idx=2, max_norm=1.0), (torch.arange(10),)),
        (nn.Bilinear(3, 4, 5, bias=False), (torch.randn(2, 3), torch.randn(2, 4))),
        (nn.EmbeddingBag(10, 3, mode="max", padding_idx=1), (torch.arange(10).view(2, 5),)),
        *((getattr(nn, f"MaxUnpool{d}d")(2), F_POOLED[d]) for d in (1, 2, 3)),
        *((getattr(nn, name)(3, 4), (torch.randn(5, 3),)) for name in ("RNNCell", "GRUCell")),
    ]:
        again = through_json(module)
        again.load_state_dict(module.state_dict(), assign=True)
        assert torch.equal(again(*inputs), module(*inputs))


@pytest.mark.parametrize(
    "module",
    [
        nn.LSTM(3, 4, 2, bias=False, batch_first=True, dropout=0.1, bidirectional=True),
        nn.GRU(3, 4),
        nn.RNN(3, 4, nonlinearity="relu"),
        nn.LSTMCell(3, 4),
        nn.RNNCell(3, 4, bias=False, nonlinearity="relu"),
    ],
    ids=example_id,
)
def test_recurrent_layers(module: nn.Module) -> None:
    module.eval()
    again = through_json(module)
    assert config_of(again) == config_of(module)
    again.load_state_dict(module.state_dict(), assign=True)
    x = torch.randn(5, 3)
    with torch.no_grad():
        assert torch.equal(again(x)[0], module(x)[0])
        assert torch.equal(share(module)(x)[0], module(x)[0])


def test_stochastic_depth_comes_back_for_training() -> None:
    from torchvision.ops import StochasticDepth

    again = through_json(StochasticDepth(1.0, "row"))
    x = torch.ones(2, 3)
    assert torch.equal(again(x), x)
    assert torch.equal(again.train()(x), torch.zeros(2, 3))


def test_every_kind_has_an_example() -> None:
    tested = {type(module).__name__ for module, _ in EXAMPLES}
    others = "MultiheadAttention Embedding Bilinear EmbeddingBag MaxUnpool1d MaxUnpool2d MaxUnpool3d"
    recurrent = "LSTM GRU RNN LSTMCell GRUCell RNNCell"
    assert set(TORCH_KINDS) - tested == {*others.split(), *recurrent.split()}


TORCH_KINDS = [kind for kind, row in KINDS.items() if row.module == "torch.nn"]


@pytest.mark.parametrize("kind", TORCH_KINDS)
def test_no_constructor_argument_is_forgotten(kind: str) -> None:
    accepted = set(inspect.signature(getattr(nn, kind).__init__).parameters)
    if issubclass(getattr(nn, kind), nn.RNNBase):  # they hand theirs on
        accepted |= set(inspect.signature(nn.RNNBase.__init__).parameters) - {"mode"}
        accepted -= set() if kind == "LSTM" else {"proj_size"}
        accepted |= {"nonlinearity"} if kind == "RNN" else set()
    ours = {"self", "device", "dtype", "args", "kwargs", "_weight", "_freeze", "min_value", "max_value"}
    fields = {field.name for field in fields_of(kind)}
    only_without_weights = {"inplace", "bias"}  # affine=False leaves nothing for bias to say
    assert accepted - ours - fields <= only_without_weights - fields
    assert fields <= accepted


def test_quantized_kinds_exist() -> None:
    homes = [p.stem for p in Path(program.__file__).parent.glob("quantized*.py")]
    layers = {
        name
        for home in homes
        for name, value in vars(import_module(f"modelopt_cli.program.{home}")).items()
        if inspect.isclass(value) and issubclass(value, nn.Module) and vars(value).get("fields")
    }
    assert layers == {kind for kind, row in KINDS.items() if row.ours}


def test_subclass_is_no_leaf() -> None:
    class Conv2d(nn.Conv2d):
        pass

    Conv2d.__module__ = "torch.nn.modules.conv"
    assert kind_of(Conv2d(1, 1, 1)) is None
    assert kind_of(nn.Sequential()) is None
    with pytest.raises(TypeError):
        config_of(nn.Sequential())


GOOD = {"in_features": 2, "out_features": 3, "bias": True}


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("Sequential", {}),
        ("Module", {}),
        ("os.system", {"command": "true"}),
        ("", {}),
        ("Linear", {}),
        ("Linear", {**GOOD, "device": "cuda"}),
        ("Linear", {**GOOD, "in_features": -1}),
        ("Linear", {**GOOD, "in_features": True}),
        ("Linear", {**GOOD, "in_features": "2"}),
        ("Linear", {**GOOD, "in_features": 2.0}),
        ("Linear", {**GOOD, "in_features": [2]}),
        ("Linear", {**GOOD, "in_features": None}),
        ("Linear", {**GOOD, "in_features": 2**62}),
        ("Linear", {"in_features": 2**39, "out_features": 2**39, "bias": True}),
        ("Linear", {**GOOD, "bias": 1}),
        ("Dropout", {"p": float("nan"), "inplace": False}),
        ("Dropout", {"p": 2.0, "inplace": False}),
        ("Dropout", {"p": "0.5", "inplace": False}),
        ("GELU", {"approximate": "none|tanh"}),
        ("GELU", {"approximate": ["none"]}),
        ("AdaptiveAvgPool2d", {"output_size": [1] * 100}),
        ("AdaptiveAvgPool2d", {"output_size": [[1]]}),
        ("AdaptiveAvgPool2d", {"output_size": []}),
        ("AdaptiveAvgPool2d", {"output_size": {}}),
        ("QuantizedLinear", {}),
        ("QuantizedLinear", {"in_features": "x" * 9, "out_features": [[[[[[1]]]]]]}),
        ("Quantize", {"output": [float("nan"), 3]}),
        ("Quantize", {"output": [1.0, 300]}),
        ("Quantize", {"output": 7}),
    ],
)
def test_impossible_hyperparameters(kind: str, config: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError) as caught:
        build(kind, config)
    assert "\n" not in str(caught.value)


def test_huge_layer_allocates_nothing() -> None:
    module = build("Linear", {"in_features": 2**30, "out_features": 2**30, "bias": True})
    assert all(p.is_meta for p in module.parameters())


class TestFunctions:
    def test_names_lead_back(self) -> None:
        for name, function in allowlist.FUNCTIONS.items():
            canonical = allowlist.function_name(function)
            assert canonical is not None
            assert allowlist.function_called(canonical) is function is allowlist.function_called(name)

    def test_torchvision_functions_are_found_by_name_only(self) -> None:
        from torchvision.models.swin_transformer import shifted_window_attention

        assert allowlist.function_name(shifted_window_attention) == "torchvision.shifted_window_attention"
        assert allowlist.function_called("torchvision.shifted_window_attention") is shifted_window_attention
        assert allowlist.function_called("shifted_window_attention") is None
        assert allowlist.function_called("torchvision.extract_archive") is None

    def test_namesake_of_a_torchvision_function(self) -> None:
        def stochastic_depth() -> None: ...

        stochastic_depth.__module__ = "torchvision.ops.stochastic_depth"
        assert allowlist.function_name(stochastic_depth) is None

    @pytest.mark.parametrize(
        "name", ["eval", "builtins.eval", "operator.setitem", "operator.attrgetter", "torch.load"]
    )
    def test_others_are_not(self, name: str) -> None:
        assert allowlist.function_called(name) is None

    def test_methods_exist_and_none_reads_or_writes_files(self) -> None:
        assert all(hasattr(torch.Tensor, method) for method in allowlist.METHODS)
        assert not allowlist.METHODS & {
            "data_ptr",
            "storage",
            "apply_",
            "map_",
            "share_memory_",
            "item",
            "numpy",
            "set_",
        }
        assert not any(method.startswith("_") for method in allowlist.METHODS)
