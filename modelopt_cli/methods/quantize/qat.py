"""Quantization-aware training: an int8 Program as one that can be trained, and back.

    network = qat.prepare(program)
    ...  # train it
    better = qat.convert(network, program)

The network that is trained computes what the int8 Program computes (``fake_quantize``), value by value, up to
how float32 sums are rounded. So what is validated during training is what will be written.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from modelopt_cli.artifact.encodings import is_pruned, spread_steps
from modelopt_cli.errors import UsageError
from modelopt_cli.kernels.saturation import is_depthwise
from modelopt_cli.measure.evaluated_model import is_quantized
from modelopt_cli.methods.quantize.fake_quantize import FakeQuantized, Real, fake_quantize
from modelopt_cli.methods.quantize.latent_layers import (
    Latent,
    LatentConv1d,
    LatentConv2d,
    LatentConv3d,
    LatentConvTranspose1d,
    LatentConvTranspose2d,
    LatentEmbedding,
    LatentForm,
    LatentLinear,
)
from modelopt_cli.methods.quantize.roles import SHAPE_OPERATIONS
from modelopt_cli.methods.share.config import was_shared
from modelopt_cli.program import Encoding, Program
from modelopt_cli.program.calls import operation
from modelopt_cli.program.quantization import BITS
from modelopt_cli.program.quantized import (
    DynamicLinear,
    Quantized,
    QuantizedEmbedding,
    QuantizedLinear,
    Weighted,
)
from modelopt_cli.program.quantized_convolutions import (
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedConvTranspose1d,
    QuantizedConvTranspose2d,
)
from modelopt_cli.program.quantized_operations import (
    Dequantize,
    Quantize,
    QuantizedAdd,
    QuantizedAvgPool,
    QuantizedMaxPool,
    QuantizedMul,
)
from modelopt_cli.program.quantized_recurrent import QuantizedRecurrent

_MAX_POOLS: dict[int, Any] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}


def prepare(program: Program) -> Program:
    """A copy of a Program whose weights can be trained, int8 or not.

    Nodes, layers and weights have the names that they have in the Program. Weights start as what their int8
    values stand for; those of a file from elsewhere that break the bound of ``kernels.saturation`` are pulled
    back onto it. What pruning left as zero is marked as pruned there, too.

    Args:
        program: any; it is not changed.

    Returns:
        A Program whose parameters require gradients. It cannot be written to a file.

    Raises:
        UsageError: the weights were shared before they became int8.
    """
    quantized = is_quantized(program)
    if quantized and was_shared(program.history):
        problem = "were shared before they became int8, which training would undo"
        raise UsageError(problem, where="the weights", hint="train first, then share and quantize")
    network = copy.deepcopy(program)
    layers = dict(program.named_modules())
    for name, layer in layers.items():
        form = _trained_form(layer, program.encodings.get(f"{name}.weight"))
        if form is not None:
            network.set_submodule(name, form)
            _forget_steps(network, f"{name}.weight")
    for layer in network.modules():
        if isinstance(layer, QuantizedRecurrent):
            layer.rounding = fake_quantize
    _tie(network, layers)
    if quantized:
        _real_zeros(network, layers)
    return network.train(program.training).requires_grad_(True)


def _tie(network: Program, layers: Mapping[str, nn.Module]) -> None:
    """Let layers learn the same tensors where their int8 forms have the same."""
    first: dict[int, nn.Parameter | Tensor] = {}
    for name, form in network.named_modules():
        layer = layers.get(name)
        if not isinstance(form, Latent) or not isinstance(layer, Weighted):
            continue
        bounded = any(id(tied_layer.weight) == id(layer.weight) for tied_layer in _multiplying(layers))
        form.form = replace(form.form, bounded=form.form.bounded and bounded)
        for own in ("weight", "scale", "bias"):
            held = getattr(layer, own)
            if held is not None:
                setattr(form, own, first.setdefault(id(held), getattr(form, own)))


def _multiplying(layers: Mapping[str, nn.Module]) -> list[Weighted]:
    return [layer for layer in layers.values() if isinstance(layer, Weighted) and layer.multiplies]


def convert(trained: Program, program: Program) -> Program:
    """The Program that :func:`prepare` was given, with the weights that training found.

    Args:
        trained: the Program that ``prepare`` made of it, after training.
        program: it is not changed.

    Returns:
        A Program that computes what ``trained`` computes in evaluation mode, its history, encodings and the
        like still those of ``program``. Its int8 weights never saturate a kernel.
    """
    network = copy.deepcopy(program)
    state = dict(trained.state_dict())
    for name, layer in trained.named_modules():
        if isinstance(layer, Latent):
            int8 = isinstance(program.get_submodule(name), Weighted)
            state[f"{name}.weight"] = layer.steps() if int8 else layer.rounded().detach()
    network.load_state_dict({name: state[name] for name in network.state_dict()})
    network.encodings = {  # integers handed on to the writer stand for the weights before training
        name: replace(encoding, integers=None) for name, encoding in network.encodings.items()
    }
    return network


def _trained_form(layer: nn.Module, encoding: Encoding | None) -> nn.Module | None:
    """The form of a layer in training; None where it is trained as it is."""
    if isinstance(layer, Weighted):
        return _weighted(layer)
    if isinstance(layer, QuantizedRecurrent):  # its linear layers are trained
        return None
    if isinstance(layer, Quantized):
        return _unweighted(layer)
    return _stored(layer, encoding)


def _weighted(layer: Weighted) -> Latent:
    form = LatentForm(
        bounded=not is_depthwise(tuple(layer.turned(layer.weight).shape), getattr(layer, "groups", 1)),
        dynamic=isinstance(layer, DynamicLinear),
        activation=layer.activation,
        output=layer.output,
        weight_bits=layer.weight_bits,
        input_bits=layer.activation_bits or BITS,
    )
    return _LATENT[type(layer)](layer, layer.float_weight(), layer.scale, form)


_LATENT: dict[type[nn.Module], Callable[..., Latent]] = {
    **dict.fromkeys((nn.Conv1d, QuantizedConv1d), LatentConv1d),
    **dict.fromkeys((nn.Conv2d, QuantizedConv2d), LatentConv2d),
    QuantizedConv3d: LatentConv3d,
    QuantizedConvTranspose1d: LatentConvTranspose1d,
    QuantizedConvTranspose2d: LatentConvTranspose2d,
    **dict.fromkeys((nn.Linear, QuantizedLinear, DynamicLinear), LatentLinear),
    QuantizedEmbedding: LatentEmbedding,
}
"""Class of a layer, float or int8, to the class that is trained in its place."""


def _unweighted(layer: Quantized) -> nn.Module:
    if isinstance(layer, QuantizedMaxPool):
        windows = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        pool: nn.Module = _MAX_POOLS[layer.rank](*windows, ceil_mode=layer.ceil_mode)
        return pool
    if isinstance(layer, Dequantize):
        return Real()
    assert isinstance(layer, Quantize | QuantizedAdd | QuantizedMul | QuantizedAvgPool)
    return FakeQuantized(layer.real, layer.output)


def _stored(layer: nn.Module, encoding: Encoding | None) -> nn.Module | None:
    """The form of a float layer whose weight is stored as integers."""
    weight = getattr(layer, "weight", None)
    steps = spread_steps(encoding, tuple(weight.shape)) if isinstance(weight, Tensor) else None
    if steps is None:
        return None
    latent = _LATENT.get(type(layer))
    if latent is None or layer.weight.dtype != torch.float32:
        return None
    form = latent(layer, layer.weight, steps.scale, LatentForm(bounded=False, weight_bits=steps.bits))
    form.zero = steps.zero_point
    return form


def _forget_steps(network: Program, name: str) -> None:
    """Drop the encoding of a latent weight, but for the zeros that it promises."""
    encoding = network.encodings.pop(name, None)
    if encoding is not None and is_pruned(encoding):
        params = {**encoding.params, "values": None}
        network.encodings[name] = replace(encoding, params=params, parts={}, integers=None)


def _real_zeros(network: Program, layers: Mapping[str, nn.Module]) -> None:
    """Let functions that were given zero points as numbers, for uint8 tensors, take real zeros instead."""
    for node in network.graph.nodes:
        if node.op != "call_function" or not _is_uint8(node, layers):
            continue
        if operation(node) == "clamp":
            node.kwargs = {**node.kwargs, "min": 0.0}
        elif operation(node) == "pad":
            node.kwargs = {**node.kwargs, "value": 0.0}
    network.recompile()


def _is_uint8(node: fx.Node, layers: Mapping[str, nn.Module]) -> bool:
    """True if a value of the int8 Program is uint8: functions only pass that on."""
    while node.op in ("call_function", "call_method"):
        if operation(node) in SHAPE_OPERATIONS or not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
    if node.op != "call_module":
        return False
    layer = layers[str(node.target)]
    rounds = isinstance(layer, Quantized) and getattr(layer, "output", None) is not None
    return rounds or isinstance(layer, QuantizedMaxPool)
