"""Static int8 of each kind of layer: a small network of it next to float32, in memory and from its file."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from quantize_networks import Images, count, sqnr
from quick_cases import quick
from safetensors import safe_open
from test_quantize_qat import Comparison, Integers
from torch import Tensor, nn
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)

from modelopt_cli.artifact import read_program, write_program
from modelopt_cli.kernels import BACKENDS, never_saturates, prepare
from modelopt_cli.measure.coverage import coverage
from modelopt_cli.measure.flops import count_macs
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.quantize import layer_forms
from modelopt_cli.methods.quantize.apply import apply
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.layer_forms import LAYER_FORMS
from modelopt_cli.methods.quantize.learning import qat
from modelopt_cli.methods.quantize.schemes import SCHEMES
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.capture import capture
from modelopt_cli.program.quantized_embedding import QuantizedEmbedding
from modelopt_cli.program.quantized_linear import DynamicLinear

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _small_states_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_forms, "LEAST_HIDDEN", 1)


class Rows(nn.Module):
    """A keyword spotter: residual, batch norm, depthwise, dilation, causal padding, pools, joined rows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv1d(5, 16, 5, 2, 2, bias=False), nn.BatchNorm1d(16)
        self.deep, self.point = nn.Conv1d(16, 16, 7, padding=3, groups=16), nn.Conv1d(16, 16, 1)
        self.causal, self.pool = nn.Conv1d(16, 12, 3, dilation=2), nn.MaxPool1d(3, 2, 1)
        self.left, self.right = nn.ConstantPad1d((1, 0), 0.0), nn.ZeroPad1d((0, 1))
        self.last, self.head = nn.Conv1d(24, 20, 3), nn.Linear(20, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.norm(self.stem(x))))
        x = torch.relu(self.point(F.hardswish(self.deep(x))) + x)
        x = self.causal(F.pad(x, (4, 0)))
        x = F.silu(self.last(self.right(self.left(torch.cat([x, F.avg_pool1d(x, 3, 1, 1)], 1)))))
        result: Tensor = self.head(F.adaptive_avg_pool1d(F.max_pool1d(x, 2), 1).squeeze(-1))
        return result


class Volumes(nn.Module):
    """A video network: 3-D and factorized convolutions, residual, pools."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv3d(3, 8, 3, (1, 2, 2), 1, bias=False), nn.BatchNorm3d(8)
        self.flat, self.deep = nn.Conv3d(8, 12, (1, 3, 3), padding=(0, 1, 1)), nn.Conv3d(12, 8, (3, 1, 1))
        self.each, self.head = nn.Conv3d(8, 8, 3, padding=1, groups=8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool3d(torch.relu(self.norm(self.stem(x))), (1, 2, 2))
        x = torch.relu(self.deep(F.pad(torch.relu(self.flat(x)), (0, 0, 0, 0, 1, 1))) + x)
        x = F.avg_pool3d(F.hardswish(self.each(x)), 2)
        result: Tensor = self.head(F.adaptive_avg_pool3d(x, 1).flatten(1))
        return result


class Shape(nn.Module):
    """A small U-Net: skips, transposed convolutions of several kinds, batch norm behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 16, 3, 2, 1)
        self.up, self.norm = nn.ConvTranspose2d(16, 12, 2, 2, bias=False), nn.BatchNorm2d(12)
        self.join, self.wide = nn.Conv2d(24, 8, 3, padding=1), nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=2)
        self.smooth = nn.ConvTranspose2d(8, 8, 3, 1, 1, groups=8)
        self.rows = nn.ConvTranspose1d(8, 4, 3, 2, 1, output_padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = torch.relu(self.down(x))
        x = torch.relu(self.deep(skip))
        x = torch.relu(self.norm(self.up(x)))
        x = F.silu(self.join(torch.cat([x, skip], 1)))
        x = torch.relu(self.smooth(torch.relu(self.wide(x))))
        result: Tensor = self.rows(F.avg_pool2d(x, 4).flatten(2))
        return result


class Again(nn.Module):
    """A block with batch norm and residual that is called three times, at two sizes; rows called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.row, self.up = nn.Conv1d(8, 8, 3, padding=1), nn.ConvTranspose2d(8, 8, 2, 2)
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def block(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.body(x)) + x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(F.max_pool2d(self.block(self.block(self.stem(x))), 2))
        x = self.up(self.up(x)).flatten(2)
        x = torch.relu(self.row(F.silu(self.row(x)))).mean(2)
        result: Tensor = self.head(F.gelu(self.fc(torch.relu(self.fc(x)))))
        return result


class Attentive(nn.Module):
    """Attention to itself with a mask and to something else, and products with a bias put together."""

    def __init__(self) -> None:
        super().__init__()
        self.itself = nn.MultiheadAttention(16, 4, batch_first=True)
        self.other = nn.MultiheadAttention(16, 2, kdim=8, vdim=8)
        self.qkv, self.query = nn.Linear(16, 48, bias=False), nn.Parameter(torch.randn(16))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)
        self.register_buffer("later", torch.ones(6, 6, dtype=torch.bool).triu(1))
        self.register_buffer("zeros", torch.zeros(32))

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.itself(x, x, x, attn_mask=self.later, need_weights=False)
        x = self.norm(x + y)
        rows, half = x.transpose(0, 1), x[..., :8].transpose(0, 1)
        x = x + self.other(rows, half, half)[0].transpose(0, 1)
        bias = torch.cat([self.query, self.zeros])
        q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        result: Tensor = self.head(self.norm(x))
        return result


class Tokens(nn.Module):
    """A small language model: its last layer has the weight of its embedding, which it reads twice."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 16, padding_idx=0), nn.Embedding(9, 16)
        self.mix, self.head = nn.Conv1d(16, 16, 3, padding=1), nn.Linear(16, 50)
        self.head.weight = self.words.weight
        self.register_buffer("order", torch.arange(9))

    def forward(self, x: Tensor) -> Tensor:
        y = self.words(x) + self.places(self.order)
        y = torch.relu(self.mix(y.transpose(1, 2))).transpose(1, 2) + self.words(x.flip(1))
        result: Tensor = self.head(y)
        return result


class Steps(nn.Module):
    """Recurrent layers of every kind, in both directions, from given states, and cells step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(10, 12, 2, batch_first=True, bidirectional=True)
        self.lstm = nn.LSTM(24, 16, bias=False)
        self.cell, self.last = nn.LSTMCell(16, 16), nn.GRUCell(16, 12)
        self.head = nn.Linear(12 + 24, 5)

    def forward(self, x: Tensor) -> Tensor:
        y, ends = self.gru(x)
        rows, (h, c) = self.lstm(y.transpose(0, 1))
        h, c = h[0], c[0]
        g = x.new_zeros(x.shape[0], 12)
        for row in rows[:3].unbind(0):
            h, c = self.cell(row, (h, c))
            g = self.last(h, g)
        result: Tensor = self.head(torch.cat([g, ends[0], ends[3]], 1))
        return result


def windows(version: int) -> nn.Module:
    second = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2} if version == 2 else {}
    net = SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=10, **second)
    for name, parameter in net.named_parameters():
        if name.endswith("bias_table"):
            nn.init.normal_(parameter)
    return net


@dataclass(frozen=True)
class Case:
    """A network of one kind of layer.

    Attributes:
        make: the network.
        shape: of one sample.
        kinds: int8 layers that it must become, and how many of each.
        decibels: signal-to-noise that the outputs must have.
        tokens: how many there are, where samples are token ids.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    kinds: dict[str, int]
    decibels: float = 30.0
    tokens: int | None = None

    @property
    def input(self) -> InputSpec:
        return InputSpec(self.shape, dtype="float32" if self.tokens is None else "int64")


NETWORKS = {
    "rows": Case(
        Rows,
        (5, 48),
        {
            **{"QuantizedConv1d": 5, "QuantizedLinear": 1, "QuantizedMaxPool1d": 2, "QuantizedAvgPool1d": 2},
            **{"Quantize": 1, "Dequantize": 0},
        },
    ),
    "again": Case(
        Again,
        (3, 12, 12),
        {
            **{
                "QuantizedConv2d": 4,
                "QuantizedConv1d": 2,
                "QuantizedConvTranspose2d": 2,
                "QuantizedLinear": 3,
            },
            **{"Quantize": 1, "Dequantize": 0, "BatchNorm2d": 0},
        },
    ),
    "attention": Case(Attentive, (6, 16), {"QuantizedLinear": 8, "MultiheadAttention": 0}),
    "volumes": Case(
        Volumes,
        (3, 6, 16, 16),
        {
            **{"QuantizedConv3d": 4, "QuantizedMaxPool3d": 1, "QuantizedAvgPool3d": 2, "QuantizedLinear": 1},
            **{"Quantize": 1, "Dequantize": 0},
        },
    ),
    "steps": Case(
        Steps,
        (7, 10),
        {
            **{"QuantizedGRU": 1, "QuantizedLSTM": 1, "QuantizedLSTMCell": 3, "QuantizedGRUCell": 3},
            "QuantizedLinear": 1,
        },
    ),
    "tokens": Case(
        Tokens,
        (9,),
        {"QuantizedEmbedding": 3, "QuantizedConv1d": 1, "QuantizedLinear": 1},
        tokens=50,
    ),
    "windows": Case(lambda: windows(1), (3, 32, 32), {"QuantizedConv2d": 1, "QuantizedLinear": 18}),
    "windows of the second version": Case(
        lambda: windows(2),
        (3, 32, 32),
        {"QuantizedConv2d": 1, "QuantizedLinear": 26},
        decibels=20.0,  # scores are cosines times ten
    ),
    "shape": Case(
        Shape,
        (3, 16, 16),
        {
            **{"QuantizedConv2d": 3, "QuantizedConvTranspose2d": 3, "QuantizedConvTranspose1d": 1},
            **{"Quantize": 1, "Dequantize": 0},
        },
    ),
}


def samples(case: Case, n: int = 16, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if case.tokens is not None:
        return torch.randint(0, case.tokens, (n, *case.shape), generator=generator)
    return torch.randn(n, *case.shape, generator=generator)


def float_program(case: Case) -> Program:
    torch.manual_seed(0)
    model = case.make()
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.momentum = None
    with torch.no_grad():
        model.train()(samples(case, 32, 7))
    return capture(model.eval(), case.input, verify=False)


def int8_program(case: Case, program: Program, scheme: str = "int8") -> Program:
    context = Context(data=Images(samples(case)))  # type: ignore[arg-type]
    return apply(program, QuantizeConfig(scheme), context).program


@pytest.mark.parametrize("name", NETWORKS)
class TestEveryKind:
    def test_is_near_float32_on_every_backend_and_from_its_file(self, name: str, tmp_path: Path) -> None:
        case = NETWORKS[name]
        program = float_program(case)
        int8 = int8_program(case, program)
        covered = coverage(int8)
        assert covered.compressed == covered.total > 0
        assert {kind: count(int8, kind) for kind in case.kinds} == case.kinds
        x = samples(case)
        write_program(int8, tmp_path / "net.safetensors")
        again = prepare(read_program(tmp_path / "net.safetensors"))
        with torch.inference_mode():
            expected, found = program(x), prepare(int8)(x)
            assert sqnr(expected, found) > case.decibels
            assert torch.equal(again(x), found)
            for backend in BACKENDS:
                other = prepare(copy.deepcopy(int8), backend=backend)(x)
                assert sqnr(expected, other) > case.decibels
                assert sqnr(found, other) > case.decibels + 5  # a step up or down next to a tie

    def test_is_trained_as_it_computes(self, name: str) -> None:
        case = NETWORKS[name]
        int8 = int8_program(case, float_program(case))
        network, exact, x = qat.prepare(int8).eval(), Integers(int8), samples(case, 4)
        with torch.no_grad():
            exact.run(x)
            compared = Comparison(network, exact)
            compared.run(x)
        apart = torch.cat(compared.apart)
        assert apart.max() < 1.001
        assert (apart > 0.001).float().mean() < 1e-3
        made, before = qat.convert(network, int8).state_dict(), int8.state_dict()
        assert all(torch.equal(made[key], before[key]) for key in before)
        network.train()(x).pow(2).sum().backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in network.parameters())


def test_a_layer_that_is_called_again_has_one_weight_and_a_scale_for_each_call(tmp_path: Path) -> None:
    case = NETWORKS["again"]
    program = float_program(case)
    int8 = int8_program(case, program)
    covered = coverage(int8)
    assert [layer.name for layer in covered.layers] == ["stem", "body", "up", "row", "fc", "head"]
    calls = [int8.get_submodule(name) for name in ("body", "body__2", "body__3")]
    assert len({call.weight.data_ptr() for call in calls}) == 1  # type: ignore[union-attr, operator]
    assert len({call.input for call in calls}) == 3
    write_program(int8, tmp_path / "net.safetensors")
    again = read_program(tmp_path / "net.safetensors")
    for made in (again, copy.deepcopy(again), copy.deepcopy(again)._apply(torch.clone)):
        assert made.body.weight is made.body__2.weight is made.body__3.weight  # type: ignore[union-attr]
    assert coverage(again) == covered
    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        stored = [name for name in file.keys() if name.startswith("body")]  # noqa: SIM118
    assert sorted(stored) == ["body.bias", "body.scale", "body.weight"]
    before = sum(p.numel() for p in program.parameters() if p.dim() > 1)
    assert sum(layer.bytes for layer in covered.layers) == 4 * before
    dynamic = int8_program(case, program, "int8-dynamic")
    assert count(dynamic, "DynamicLinear") == 3
    assert len([m for m in dynamic.modules() if isinstance(m, DynamicLinear)]) == 2


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic"])
def test_an_embedding_has_a_scale_for_each_row(scheme: str, tmp_path: Path) -> None:
    case = NETWORKS["tokens"]
    program = float_program(case)
    int8 = prepare(int8_program(case, program, scheme))
    rows, layer = program.get_parameter("words.weight").detach(), int8.get_submodule("words")
    assert isinstance(layer, QuantizedEmbedding)
    ids = torch.arange(50)
    found = layer(ids)
    assert torch.equal(found, layer.weight.float() * layer.scale[:, None])
    assert torch.equal(found[0], torch.zeros(16))
    bound = rows.abs().amax(1, keepdim=True) / (127 if scheme == "int8-dynamic" else 64)
    assert bool(((found - rows).abs() <= bound).all())
    places = int8.get_submodule("places").weight
    assert int(places.abs().amax(1).min()) == 127  # nothing multiplies them, so that no bound holds them
    with torch.inference_mode():
        assert sqnr(program(samples(case)), int8(samples(case))) > case.decibels


def test_an_embedding_and_the_layer_that_has_its_weight_store_it_once(tmp_path: Path) -> None:
    case = NETWORKS["tokens"]
    int8 = int8_program(case, float_program(case))
    written = write_program(int8, tmp_path / "net.safetensors")
    for made in (int8, read_program(written.path)):
        assert made.words.weight is made.head.weight  # type: ignore[union-attr]
        assert made.words.scale is made.head.scale  # type: ignore[union-attr]
        assert never_saturates(made.head.weight)  # type: ignore[arg-type, union-attr]
    with safe_open(written.path, "pt") as file:
        assert len({"words.weight", "head.weight"} & set(file.keys())) == 1


def test_an_embedding_that_changes_its_rows_stays_float() -> None:
    net = nn.Sequential(nn.Embedding(50, 8, max_norm=1.0), nn.Linear(8, 4))
    case = Case(lambda: net, (9,), {}, tokens=50)
    covered = coverage(int8_program(case, float_program(case)))
    assert [(layer.name, layer.reason) for layer in covered.layers if not layer.compressed] == [
        ("0", "changes its rows when they are read (max_norm)")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", quick(["int8", "int8-dynamic"], ["int8-dynamic"]))
def test_a_recurrent_layer_is_one_layer_whose_products_are_int8(scheme: str, tmp_path: Path) -> None:
    case = NETWORKS["steps"]
    program = float_program(case)
    int8 = int8_program(case, program, scheme)
    layers = coverage(int8).layers
    assert {layer.name: layer.kind for layer in layers} == {
        **{"gru": "GRU", "lstm": "LSTM", "cell": "LSTMCell", "last": "GRUCell", "head": "Linear"}
    }
    assert all(layer.compressed for layer in layers)
    weights = sum(p.numel() for p in program.parameters() if p.dim() > 1)
    assert sum(layer.bytes for layer in layers) == 4 * weights
    gru = int8.get_submodule("gru")
    assert (gru.input is None) == (scheme == "int8-dynamic")
    assert [name for name, _ in gru.named_children()][:4] == [
        "ih_l0",
        "hh_l0",
        "ih_l0_reverse",
        "hh_l0_reverse",
    ]
    assert never_saturates(gru.hh_l0.weight)  # type: ignore[arg-type, union-attr]
    assert count_macs(int8, int8.input).total == count_macs(program, program.input).total
    written = write_program(int8, tmp_path / "net.safetensors")
    again = prepare(read_program(written.path))
    with torch.inference_mode():
        assert sqnr(program(samples(case)), again(samples(case))) > case.decibels
        assert torch.equal(again(samples(case)), prepare(int8)(samples(case)))


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
def test_few_hidden_units_and_projected_states_stay_float(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.few, self.projected = nn.GRU(6, 8), nn.LSTM(8, 768, proj_size=4)
            self.many, self.head = nn.GRU(4, 768), nn.Linear(768, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.many(self.projected(self.few(x.transpose(0, 1))[0])[0])[0]
            return self.head(y[-1])  # type: ignore[no-any-return]

    case = Case(Net, (5, 6), {})
    covered = coverage(int8_program(case, float_program(case)))
    assert {layer.name: layer.reason for layer in covered.layers if not layer.compressed} == {
        "few": "8 hidden units, fewer than 768: its steps would take longer in int8",
        "projected": "no int8 kernel for projected states",
    }


def test_the_scheme_lists_the_kinds_that_have_a_form() -> None:
    assert SCHEMES["int8"].layers == tuple(kind.__name__ for kind in LAYER_FORMS)
