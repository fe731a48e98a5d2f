"""Shapes by rule are torch's own."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modelopt_cli.program.quantization import QParams
from modelopt_cli.program.quantized_convolutions import QuantizedConv1d, QuantizedConv2d, QuantizedConv3d
from modelopt_cli.program.quantized_operations import Dequantize, Quantize
from modelopt_cli.program.quickshapes import quick_result

Q = QParams(0.1, 3)
IMAGE, TEXT = torch.rand(2, 4, 9, 7), torch.rand(2, 5, 6)
LAYERS = {
    "conv": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2), IMAGE),
    "conv1d": (nn.Conv1d(5, 3, 3, stride=2, padding=2), TEXT),
    "conv3d": (nn.Conv3d(4, 2, 3, padding=1), torch.rand(1, 4, 3, 5, 4)),
    "max pool": (nn.MaxPool2d(3, 2, 1), IMAGE),
    "dilated max pool": (nn.MaxPool2d((2, 3), (1, 2), dilation=(2, 1)), IMAGE),
    "global pool": (nn.AdaptiveAvgPool2d(1), IMAGE),
    "linear": (nn.Linear(6, 3), TEXT),
    "batch norm": (nn.BatchNorm2d(4), IMAGE),
    "batch norm of rows": (nn.BatchNorm1d(5), TEXT),
    "relu": (nn.ReLU(), TEXT),
    "quantize": (Quantize(Q), IMAGE),
    "dequantize": (Dequantize(Q), IMAGE.to(torch.uint8)),
    "int8 conv": (
        QuantizedConv2d(4, 6, (3, 3), (2, 2), (1, 1), (1, 1), 2, True, Q, Q), IMAGE.to(torch.uint8)
    ),
    "int8 conv of rows": (
        QuantizedConv1d(5, 6, (3,), (2,), (1,), (2,), 1, True, Q, Q), TEXT.to(torch.uint8)
    ),
    "int8 conv of volumes": (
        QuantizedConv3d(4, 2, (3, 3, 3), (1, 2, 1), (1, 1, 1), (1, 1, 1), 1, True, Q, Q),
        torch.zeros(1, 4, 3, 5, 4, dtype=torch.uint8),
    ),
    "int8 conv, float out": (
        QuantizedConv2d(4, 6, (1, 3), (1, 2), (0, 1), (1, 1), 1, True, Q, None), IMAGE.to(torch.uint8)
    ),
}  # fmt: skip


@pytest.mark.parametrize(("layer", "sample"), LAYERS.values(), ids=LAYERS)
def test_layer(layer, sample):
    expected = layer.eval()(sample)
    found = quick_result(layer, "", (sample.to("meta"),), {})
    assert found is not None
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


@pytest.mark.parametrize(
    ("call", "args"),
    [(F.relu, (TEXT,)), (operator.add, (TEXT, TEXT)), (operator.mul, (2, TEXT)), (torch.sub, (TEXT, 1.5))],
)
def test_function(call, args):
    described = tuple(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args)
    found = quick_result(call, call.__name__, described, {})
    assert found is not None
    assert found.shape == call(*args).shape


@pytest.mark.parametrize(
    ("call", "args"),
    [
        (nn.Conv2d(3, 6, 1), (IMAGE,)),
        (nn.Conv2d(4, 6, 10), (IMAGE,)),
        (nn.Linear(5, 1), (TEXT,)),
        (nn.BatchNorm2d(5), (IMAGE,)),
        (nn.MaxPool2d(2, padding=2), (IMAGE,)),
        (nn.ReLU(), (TEXT, TEXT)),
        (QuantizedConv2d(4, 6, (1, 1), (1, 1), (0, 0), (1, 1), 1, True, Q, Q), (IMAGE,)),
        (Dequantize(Q), (IMAGE,)),
        (Quantize(Q), (IMAGE.to(torch.uint8),)),
        (operator.add, (TEXT, TEXT[0])),
        (operator.add, (TEXT, "x")),
        (F.relu, (TEXT, True)),
    ],
)
def test_what_does_not_fit_is_left_to_torch(call, args):
    described = tuple(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args)
    assert quick_result(call, getattr(call, "__name__", ""), described, {}) is None
