"""Costs of each kind of layer and function: a literal table from kind to formula.

A formula takes the layer (for modules), the arguments and the result, and gives multiply-accumulates.
The convention is that of :mod:`modelopt_cli.measure.flops`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from modelopt_cli.program.quantized_convolutions import QuantizedConvolution, QuantizedTransposed
from modelopt_cli.program.quantized_linear import DynamicLinear, QuantizedLinear
from modelopt_cli.program.quantized_recurrent import QuantizedRecurrent

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def _conv_module(module: Any, args: Args, kwargs: Kwargs, out: Any) -> int:
    return int(out.numel() * (module.in_channels // module.groups) * math.prod(module.kernel_size))


def _transposed_module(module: Any, args: Args, kwargs: Kwargs, out: Any) -> int:
    x = args[0] if args else kwargs["input"]
    return int(x.numel() * (module.out_channels // module.groups) * math.prod(module.kernel_size))


def _linear_module(module: Any, args: Args, kwargs: Kwargs, out: Any) -> int:
    return int(out.numel() * module.in_features)


def _bilinear_module(module: Any, args: Args, kwargs: Kwargs, out: Any) -> int:
    return int(out.numel() * module.in1_features * module.in2_features)


def _attention_module(module: Any, args: Args, kwargs: Kwargs, out: Any) -> int:
    """Three input projections, query x key, weights x value, the output projection."""
    query, key, value = (_argument(args, kwargs, i, name) for i, name in enumerate(("query", "key", "value")))
    embed = int(module.embed_dim)
    queries, keys, values = (int(t.numel() // t.shape[-1]) for t in (query, key, value))
    projections = embed * (queries * embed + keys * module.kdim + values * module.vdim + queries * embed)
    sequence = 0 if query.dim() == 2 or not module.batch_first else 1
    attended = int(key.shape[sequence]) + int(module.bias_k is not None) + int(module.add_zero_attn)
    return int(projections + 2 * queries * attended * embed)


def _recurrent_module(module: Any, args: Args, kwargs: Kwargs, out: Any) -> int:
    """Every weight matrix once for each step of each sequence."""
    return int(_steps(out) * sum(p.numel() for p in module.parameters() if p.dim() > 1))


def _int8_recurrent_module(module: Any, args: Args, kwargs: Kwargs, out: Any) -> int:
    return int(_steps(out) * sum(linear.weight.numel() for linear in module.children()))


def _recurrent(args: Args, kwargs: Kwargs, out: Any) -> int:
    return int(_steps(out) * sum(p.numel() for p in _argument(args, kwargs, 2, "params") if p.dim() > 1))


def _steps(out: Any) -> int:
    first = out[0] if isinstance(out, tuple) else out
    return int(first.numel() // first.shape[-1])


def _linear(args: Args, kwargs: Kwargs, out: Any) -> int:
    weight = _argument(args, kwargs, 1, "weight")
    return int(out.numel() * weight.shape[-1])


def _conv(args: Args, kwargs: Kwargs, out: Any) -> int:
    return int(out.numel() * math.prod(_argument(args, kwargs, 1, "weight").shape[1:]))


def _transposed(args: Args, kwargs: Kwargs, out: Any) -> int:
    x = _argument(args, kwargs, 0, "input")
    return int(x.numel() * math.prod(_argument(args, kwargs, 1, "weight").shape[1:]))


def _matmul(args: Args, kwargs: Kwargs, out: Any) -> int:
    return int(out.numel() * _argument(args, kwargs, 0, "input").shape[-1])


def _added_matmul(args: Args, kwargs: Kwargs, out: Any) -> int:
    """``addmm`` and ``baddbmm``: the matrices come second and third."""
    name = "mat1" if "mat1" in kwargs else "batch1"
    return int(out.numel() * _argument(args, kwargs, 1, name).shape[-1])


def _scaled_dot_product(args: Args, kwargs: Kwargs, out: Any) -> int:
    query, key, value = (_argument(args, kwargs, i, name) for i, name in enumerate(("query", "key", "value")))
    return int(query.numel() * key.shape[-2] + math.prod(query.shape[:-1]) * key.shape[-2] * value.shape[-1])


def einsum(args: Args, kwargs: Kwargs, out: Any) -> int | None:
    """Two operands cost the product of all index sizes; None for what that does not cover."""
    operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
    if not isinstance(args[0], str) or "." in args[0] or len(operands) != 2:
        return None
    subscripts = args[0].replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for names, operand in zip(subscripts, operands, strict=True):
        sizes.update(zip(names, operand.shape, strict=True))
    return math.prod(sizes.values())


def _window_attention(args: Args, kwargs: Kwargs, out: Any) -> int:
    """Swin's attention within windows of the padded map (Liu et al., 2021, equation 2)."""
    x = _argument(args, kwargs, 0, "input")
    window = _argument(args, kwargs, 4, "window_size")
    batch, height, width, channels = x.shape
    positions = batch * math.prod(math.ceil(n / w) * w for n, w in zip((height, width), window, strict=True))
    return int(positions * (4 * channels * channels + 2 * math.prod(window) * channels))


ModuleFormula = Callable[[Any, Args, Kwargs, Any], int]
Formula = Callable[[Args, Kwargs, Any], int | None]

MODULES: dict[type[nn.Module], ModuleFormula] = {
    nn.Conv1d: _conv_module,
    nn.Conv2d: _conv_module,
    nn.Conv3d: _conv_module,
    nn.ConvTranspose1d: _transposed_module,
    nn.ConvTranspose2d: _transposed_module,
    nn.ConvTranspose3d: _transposed_module,
    nn.Linear: _linear_module,
    nn.Bilinear: _bilinear_module,
    nn.MultiheadAttention: _attention_module,
    nn.RNNBase: _recurrent_module,
    nn.RNNCellBase: _recurrent_module,
    QuantizedTransposed: _transposed_module,
    QuantizedConvolution: _conv_module,
    QuantizedLinear: _linear_module,
    QuantizedRecurrent: _int8_recurrent_module,
    DynamicLinear: _linear_module,
}

FUNCTIONS: dict[Any, Formula] = {
    F.linear: _linear,
    F.conv1d: _conv,
    F.conv2d: _conv,
    F.conv3d: _conv,
    F.conv_transpose1d: _transposed,
    F.conv_transpose2d: _transposed,
    F.conv_transpose3d: _transposed,
    F.scaled_dot_product_attention: _scaled_dot_product,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    torch.mv: _matmul,
    torch.bmm: _matmul,
    torch.addmm: _added_matmul,
    torch.baddbmm: _added_matmul,
    torch.einsum: einsum,
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), _recurrent),
}

# Functions that are reached by their import path, so that torchvision need not be imported for it.
NAMED: dict[str, Formula] = {
    "torch.functional.einsum": einsum,
    "_operator.matmul": _matmul,
    "torchvision.models.swin_transformer.shifted_window_attention": _window_attention,
}

METHODS: dict[str, Formula] = {"matmul": _matmul, "mm": _matmul, "mv": _matmul, "bmm": _matmul}


def _argument(args: Args, kwargs: Kwargs, index: int, name: str) -> Any:
    return args[index] if len(args) > index else kwargs[name]
