"""Quantization-aware training: an int8 Program as one that can be trained, and back.

    network = qat.prepare(program)
    ...  # train it
    better = qat.convert(network, program)

The network that is trained computes what the int8 Program computes (``fake_quantize``), value by value, up to
how float32 sums are rounded. So what is validated during training is what will be written. Its weights and
step sizes learn.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_cli.artifact.encodings import is_pruned
from modelopt_cli.errors import UsageError
from modelopt_cli.measure.evaluated_model import is_quantized
from modelopt_cli.methods.quantize.learning.fake_quantize import fake_quantize, step_limits
from modelopt_cli.methods.quantize.learning.latent_forms import trained_form
from modelopt_cli.methods.quantize.learning.latent_layers import Latent, LatentNorm
from modelopt_cli.methods.quantize.learning.step_groups import is_uint8, step_groups
from modelopt_cli.methods.share.config import was_shared
from modelopt_cli.program import Encoding, Program
from modelopt_cli.program.calls import operation
from modelopt_cli.program.quantized import Weighted
from modelopt_cli.program.quantized_recurrent import QuantizedRecurrent

_APART = 0.499
"""Distance of a latent weight from its integer, in steps, at most."""


def prepare(
    program: Program,
    floats: Mapping[str, Tensor] | None = None,
    norms: Mapping[str, LatentNorm] | None = None,
) -> Program:
    """A copy of a Program whose weights and step sizes can be trained, int8 or not.

    Nodes, layers and weights have the names that they have in the Program. Weights start as what their int8
    values stand for, or as the float weights nearest to those in ``floats`` that are rounded to them, so that
    the start computes what the Program computes; those of a file from elsewhere that break the bound of
    ``kernels.saturation`` are pulled back onto it. What pruning left as zero is marked as pruned there, too.

    Args:
        program: any; it is not changed.
        floats: weights before they were rounded, by parameter name; those of other shapes do not count.
        norms: batch norms that int8 layers get for the time of the training, by layer; see ``latent_norms``.

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
        form = trained_form(layer, program.encodings.get(f"{name}.weight"))
        if form is not None:
            network.set_submodule(name, form)
            _forget_steps(network, f"{name}.weight")
    for layer in network.modules():
        if isinstance(layer, QuantizedRecurrent):
            layer.rounding = fake_quantize
    for name, weight in (floats or {}).items():
        _start_at(network, layers, name, weight)
    _tie(network, layers)
    for name, norm in (norms or {}).items():
        if isinstance(form := _submodule(network, name), Latent) and isinstance(layers[name], Weighted):
            form.norm = norm
    if quantized:
        _share_steps(network, program)
        _real_zeros(network, layers)
    network.train(program.training).requires_grad_(True)
    for fixed in _fixed(network, program):
        fixed.requires_grad_(False)
    return network


def _start_at(network: Program, layers: Mapping[str, nn.Module], name: str, weight: Tensor) -> None:
    """Let a latent weight start at the float weight nearest to the given one that has the same integer."""
    path = name.removesuffix(".weight")
    form = _submodule(network, path)
    if not isinstance(form, Latent) or path == name or form.weight.shape != weight.shape:
        return
    low, high = step_limits(form.form.weight_bits, form.zero)
    whole = form.nearest()
    step = form.scale if form.scale.dim() == whole.dim() else form.scale.view(-1, *[1] * (whole.dim() - 1))
    least = torch.where(whole > low, whole - _APART, -torch.inf)
    most = torch.where(whole < high, whole + _APART, torch.inf)
    steps = (form.turned(weight.detach().float()) / step).clamp(least, most)
    with torch.no_grad():
        form.weight.copy_(form.turned(steps * step))


def _submodule(network: nn.Module, name: str) -> nn.Module | None:
    try:
        return network.get_submodule(name)
    except AttributeError:
        return None


def _share_steps(network: Program, program: Program) -> None:
    """Let values learn the same step size that have the same scale in the int8 Program."""
    for group in step_groups(program):
        first: Any = network.get_submodule(group.writers[0])
        for name in group.writers[1:]:
            network.get_submodule(name).rounding = first.rounding


def _fixed(network: Program, program: Program) -> Iterator[nn.Parameter]:
    """Growths of step sizes that stay: of values that layers read by another scale, of groups, of 16 bits."""
    layers = dict(program.named_modules())
    for group in step_groups(program) if is_quantized(program) else ():
        if not group.agrees(layers):
            rounding: Any = network.get_submodule(group.writers[0]).rounding
            yield rounding.growth
    for name, form in network.named_modules():
        if isinstance(form, Latent) and (form.growth.dim() == 0 or _has_short_scales(program, name)):
            yield form.growth


def _has_short_scales(program: Program, layer: str) -> bool:
    """True if a layer's weight is stored with scales of 16 bits, which could not hold what is learned."""
    encoding = program.encodings.get(f"{layer}.weight")
    return encoding is not None and "scale" in encoding.parts and encoding.parts["scale"].itemsize < 4


def _tie(network: Program, layers: Mapping[str, nn.Module]) -> None:
    """Let layers learn the same tensors where their int8 forms have the same."""
    first: dict[int, nn.Parameter | Tensor] = {}
    growths: dict[int, nn.Parameter] = {}
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
        form.growth = growths.setdefault(id(layer.scale), form.growth)


def _multiplying(layers: Mapping[str, nn.Module]) -> list[Weighted]:
    return [layer for layer in layers.values() if isinstance(layer, Weighted) and layer.multiplies]


def convert(trained: Program, program: Program) -> Program:
    """The Program that :func:`prepare` was given, with the weights and scales that training found.

    Args:
        trained: the Program that ``prepare`` made of it, after training.
        program: it is not changed.

    Returns:
        A Program that computes what ``trained`` computes in evaluation mode, its history, encodings and the
        like still those of ``program``. Its int8 weights never saturate a kernel.
    """
    network = copy.deepcopy(program)
    layers = dict(network.named_modules())
    for group in step_groups(program) if is_quantized(program) else ():
        rounding: Any = trained.get_submodule(group.writers[0]).rounding
        if group.agrees(layers):
            group.put(layers, rounding.qparams)
    state = dict(trained.state_dict())
    network.encodings = {  # integers handed on to the writer stand for the weights before training
        name: replace(encoding, integers=None) for name, encoding in network.encodings.items()
    }
    for name, layer in trained.named_modules():
        if not isinstance(layer, Latent):
            continue
        scale, bias = layer.settled()
        if isinstance(program.get_submodule(name), Weighted):
            state |= {f"{name}.weight": layer.steps(), f"{name}.scale": scale, f"{name}.bias": bias}
        else:
            state[f"{name}.weight"] = layer.rounded().detach()
            if layer.growth.requires_grad:
                _put_scale(network.encodings, f"{name}.weight", scale)
    network.load_state_dict({name: state[name] for name in network.state_dict()})
    return network


def _put_scale(encodings: dict[str, Encoding], name: str, scale: Tensor) -> None:
    """Note the scale of the integers that a float weight is stored as."""
    encoding = encodings[name]
    before = encoding.parts["scale"]
    parts = {**encoding.parts, "scale": scale.to(before.dtype).reshape(before.shape)}
    encodings[name] = replace(encoding, parts=parts)


def _forget_steps(network: Program, name: str) -> None:
    """Drop the encoding of a latent weight, but for the zeros that it promises."""
    encoding = network.encodings.pop(name, None)
    if encoding is not None and is_pruned(encoding):
        params = {**encoding.params, "values": None}
        network.encodings[name] = replace(encoding, params=params, parts={}, integers=None)


def _real_zeros(network: Program, layers: Mapping[str, nn.Module]) -> None:
    """Let functions that were given zero points as numbers, for uint8 tensors, take real zeros instead."""
    for node in network.graph.nodes:
        if node.op != "call_function" or not is_uint8(node, layers):
            continue
        if operation(node) == "clamp":
            node.kwargs = {**node.kwargs, "min": 0.0}
        elif operation(node) == "pad":
            node.kwargs = {**node.kwargs, "value": 0.0}
    network.recompile()
