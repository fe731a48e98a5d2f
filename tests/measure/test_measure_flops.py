"""Multiply-accumulates against two independent counters and against hand counts."""

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import modelopt_cli  # noqa: F401  makes torchvision importable
from modelopt_cli.errors import ArchitectureError
from modelopt_cli.measure.flops import count_macs
from modelopt_cli.program import InputSpec
from modelopt_cli.program.quantization import QParams
from modelopt_cli.program.quantized_convolutions import (
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConvTranspose2d,
)
from modelopt_cli.program.quantized_linear import DynamicLinear, QuantizedLinear
from modelopt_cli.program.quantized_operations import Quantize

NETWORKS = [
    *(("resnet18", 64), ("mobilenet_v2", 64), ("efficientnet_b0", 64), ("shufflenet_v2_x0_5", 64)),
    *(("swin_t", 64), ("vit_b_16", 48)),
    *(
        pytest.param(name, side, marks=pytest.mark.slow)
        for name, side in (
            *(("resnet50", 64), ("densenet121", 64), ("googlenet", 64)),
            *(("swin_v2_t", 64), ("convnext_tiny", 64), ("maxvit_t", 224)),
        )
    ),
]


def network(name: str, side: int, device: str = "meta") -> nn.Module:
    """Shapes are all that counting needs, so the weights have none of the memory."""
    import torchvision

    extra = {"googlenet": {"init_weights": False}, "vit_b_16": {"image_size": side}}.get(name, {})
    with warnings.catch_warnings(), torch.device(device):
        warnings.simplefilter("ignore")
        model: nn.Module = torchvision.models.get_model(name, weights=None, **extra).eval()
    return model


def torch_count(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Torch's own count, with attention written out into the products that it knows."""
    device = next(model.parameters()).device
    # With gradients, MultiheadAttention takes no fused path either.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, *shape, device=device))
    return counter.get_total_flops() // 2


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side"), NETWORKS, ids=lambda value: str(value))
def test_graph_and_module_counts_equal_torchs_counter(name: str, side: int) -> None:
    model, shape = network(name, side), (3, side, side)
    expected = torch_count(model, shape)
    graph = count_macs(fx.symbolic_trace(model), InputSpec(shape))
    assert graph.total == expected
    assert sum(graph.per_layer.values()) == expected
    assert count_macs(model, InputSpec(shape)).total == expected


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121"])
def test_ptflops_agrees_up_to_what_it_adds(name: str) -> None:
    """ptflops also counts norms, activations and pools (left out here), biases, and sums of tensors."""
    from ptflops import get_model_complexity_info

    model, shape = network(name, 64, "cpu"), (3, 64, 64)
    left_out = [nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d]
    theirs, _ = get_model_complexity_info(
        model,
        shape,
        backend="pytorch",
        as_strings=False,
        print_per_layer_stat=False,
        verbose=False,
        ignore_modules=left_out,
    )
    ours = count_macs(fx.symbolic_trace(model), InputSpec(shape)).total
    assert ours <= theirs <= 1.01 * ours


Q = QParams(0.1, 128)

TURNED = QuantizedConvTranspose2d(4, 6, (3, 3), (2, 2), (0, 0), (1, 1), 1, True, Q, None, "none", (0, 0))

LAYERS = [
    pytest.param(nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 5, 5), 6 * 25 * 2 * 9, id="grouped-conv"),
    pytest.param(nn.Conv1d(4, 6, 3), (4, 9), 6 * 7 * 4 * 3, id="conv1d"),
    pytest.param(nn.ConvTranspose2d(4, 6, 3, stride=2), (4, 5, 5), 4 * 25 * 6 * 9, id="transposed"),
    pytest.param(nn.Linear(7, 5), (3, 7), 3 * 7 * 5, id="linear-on-tokens"),
    pytest.param(nn.BatchNorm2d(4), (4, 5, 5), 0, id="norm"),
    pytest.param(nn.Sequential(nn.ReLU(), nn.AvgPool2d(2)), (4, 6, 6), 0, id="elementwise-and-pool"),
    pytest.param(DynamicLinear(7, 5, True), (7,), 35, id="dynamic-int8-linear"),
    pytest.param(
        nn.Sequential(Quantize(Q), QuantizedConv2d(4, 6, (3, 3), (1, 1), (1, 1), (1, 1), 2, False, Q, None)),
        (4, 5, 5),
        6 * 25 * 2 * 9,
        id="int8-conv",
    ),
    pytest.param(
        nn.Sequential(Quantize(Q), QuantizedConv1d(4, 6, (3,), (1,), (0,), (1,), 1, False, Q, None)),
        (4, 9),
        6 * 7 * 4 * 3,
        id="int8-conv1d",
    ),
    pytest.param(
        nn.Sequential(Quantize(Q), TURNED),
        (4, 5, 5),
        4 * 25 * 6 * 9,
        id="int8-transposed",
    ),
    pytest.param(
        nn.Sequential(Quantize(Q), QuantizedLinear(7, 5, True, Q, None)), (7,), 35, id="int8-linear"
    ),
]


@pytest.mark.parametrize(("layer", "shape", "expected"), LAYERS)
@pytest.mark.parametrize("graph", [True, False], ids=["graph", "module"])
def test_layers_by_hand(layer: nn.Module, shape: tuple[int, ...], expected: int, graph: bool) -> None:
    model = nn.Sequential(layer)
    if graph:
        tracer = Tracer()
        traced = tracer.trace(model)
        model = fx.GraphModule(tracer.root, traced)  # type: ignore[assignment]
    assert count_macs(model, InputSpec(shape)).total == expected


class Tracer(fx.Tracer):
    """Keeps our layers whole, as the Program's own tracer does."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m.__module__.startswith("modelopt_cli.") or super().is_leaf_module(m, module_qualified_name)


class Lambda(nn.Module):
    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


WEIGHT = torch.zeros(8, 4, 3, 3)
FUNCTIONS = [
    pytest.param(lambda x: torch.matmul(x, x.transpose(1, 2)), 4 * 6 * 4, id="matmul"),
    pytest.param(lambda x: x @ x.transpose(1, 2), 4 * 6 * 4, id="matmul-operator"),
    pytest.param(lambda x: x.matmul(x.transpose(1, 2)), 4 * 6 * 4, id="matmul-method"),
    pytest.param(lambda x: torch.bmm(x, x.transpose(1, 2)), 4 * 6 * 4, id="bmm"),
    pytest.param(
        lambda x: torch.baddbmm(torch.zeros(1), x, x.transpose(1, 2)), 4 * 6 * 4, id="added-product"
    ),
    pytest.param(lambda x: torch.einsum("b i d, b j d -> b i j", x, x), 4 * 6 * 4, id="einsum"),
    pytest.param(lambda x: torch.einsum("...id,...jd->...ij", x, x), 4 * 6 * 4, id="einsum-ellipsis"),
    pytest.param(lambda x: torch.einsum("bij->bji", x), 0, id="einsum-transpose"),
    pytest.param(lambda x: F.linear(x, torch.zeros(5, 6)), 4 * 6 * 5, id="linear"),
    pytest.param(lambda x: F.conv2d(x[:, :, None], WEIGHT, padding=1), 8 * 6 * 4 * 9, id="conv2d"),
    pytest.param(
        lambda x: F.scaled_dot_product_attention(x, x, x), 2 * 4 * 4 * 6, id="scaled-dot-product-attention"
    ),
    pytest.param(lambda x: torch.softmax(x * 2 + x, 1), 0, id="elementwise"),
]


@pytest.mark.parametrize(("body", "expected"), FUNCTIONS)
def test_functions_by_hand(body: Callable[[Tensor], Tensor], expected: int) -> None:
    assert count_macs(fx.symbolic_trace(Lambda(body)), InputSpec((4, 6))).total == expected


class Attention(nn.Module):
    def __init__(self, **settings: object) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **settings)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        attended: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return attended


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True}], ids=["plain", "extra-key"])
def test_multihead_attention(batch_first: bool, extra: dict[str, bool]) -> None:
    model = Attention(batch_first=batch_first, **extra).eval()
    shape = (5, 8)
    traced = fx.symbolic_trace(model)
    # Batch size 1 stands where the sequence would if the batch is not first.
    tokens, batch = (5, 1) if batch_first else (1, 5)
    keys = tokens + len(extra)
    assert count_macs(traced, InputSpec(shape)).total == batch * (4 * tokens * 64 + 2 * tokens * keys * 8)
    assert count_macs(traced, InputSpec(shape)).total == torch_count(model, shape)


def test_a_layer_that_runs_twice_counts_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.layer(self.layer(x)))

    assert count_macs(fx.symbolic_trace(Twice()), InputSpec((4,))).per_layer == {"layer": 32}


def test_counting_changes_nothing() -> None:
    model = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast = torch.backends.mha.get_fastpath_enabled()
    count_macs(model, InputSpec((3, 8, 8)))
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled() == fast


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "module"])
def test_a_shape_that_does_not_fit_is_one_line(graph: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    with pytest.raises(ArchitectureError, match=r"does not run on samples of shape \(5,\)") as caught:
        count_macs(fx.symbolic_trace(model) if graph else model, InputSpec((5,)))
    assert "\n" not in str(caught.value)
