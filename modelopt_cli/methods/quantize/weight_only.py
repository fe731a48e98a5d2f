"""Weight-only quantization: weights stored as integers, one scale per output channel, computed in float32.

Needs no data and no graph, so it also serves networks that cannot be traced and bare state dicts.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_cli.artifact.codecs.affine import Affine
from modelopt_cli.artifact.codecs.cast import Cast
from modelopt_cli.artifact.encodings import is_pruned, is_shared, without_zeros
from modelopt_cli.methods.context import Context, MethodResult
from modelopt_cli.methods.layer_pass import calibration_data
from modelopt_cli.methods.layer_selection import is_weight_name, select_layers
from modelopt_cli.methods.quantize.candidates import nothing_compressed
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.layer_widths import edge_layers, layer_widths, weight_steps, widths_note
from modelopt_cli.methods.quantize.rounding import require_nonzero
from modelopt_cli.methods.quantize.schemes import Scheme
from modelopt_cli.methods.quantize.stored_weights import WeightSteps, encode_weight, store_weight
from modelopt_cli.methods.quantize.weight_rounding.roundings import ROUNDINGS
from modelopt_cli.program import Encoding, Program
from modelopt_cli.program.weighted import fetched_weights, weight_label, weight_tensors
from modelopt_cli.settings import option


def quantize_weights(program: Program, config: QuantizeConfig, context: Context) -> MethodResult:
    """Put the weights of a Program onto integer steps and say so in its encodings.

    Raises:
        UsageError: a glob matches no layer, or all of a weight would become zero.
        NothingCompressed: not one weight could be quantized.
    """
    ready = copy.deepcopy(program)
    state = dict(ready.named_parameters())
    reasons = storable(state, config.row)
    for name in fetched_weights(ready):  # whatever they are called
        reasons.setdefault(name, None)
    reasons |= already_quantized(reasons, ready.encodings)
    by_layer = {weight_label(name): name for name in reasons}
    selected, skipped = select_layers(by_layer, config)
    skipped |= {layer: reason for layer in selected if (reason := reasons[by_layer[layer]])}
    chosen = [n for n, reason in reasons.items() if weight_label(n) in selected and reason is None]
    if not chosen:
        raise nothing_compressed(skipped)
    edges = edge_layers(ready)
    widths = layer_widths(map(weight_label, chosen), edges, config)
    steps = {
        name: weight_steps(widths[weight_label(name)], config, pruned=is_pruned(ready.encodings.get(name)))
        for name in chosen
    }
    done = _rounded_by_inputs(ready, steps, config, context)
    for name in [name for name in chosen if name not in done]:
        rounded, encoding = store_weight(state[name], steps[name], config.row.float_type)
        require_nonzero(name, state[name], rounded)
        with torch.no_grad():
            state[name].copy_(rounded)
        ready.encodings[name] = encoding
    notes = widths_note(widths, config)
    return MethodResult(ready.eval(), skipped, notes=notes, floats=program)


def _rounded_by_inputs(
    ready: Program, steps: Mapping[str, WeightSteps], config: QuantizeConfig, context: Context
) -> set[str]:
    """Round what the config's rounding does not round to the nearest, in place; the names of those weights.

    Raises:
        UsageError: there are no data.
    """
    rounding = ROUNDINGS[config.rounding]
    if rounding.of_stored is None:
        return set()
    title = option("rounding", rounding.name)
    data = calibration_data(context, title, config.calibration_samples, option("rounding", "nearest"))
    before = dict(ready.encodings)
    rounding.of_stored(ready.eval(), steps, data, replace(context, device="cpu"))
    return {name for name in steps if ready.encodings.get(name) is not before.get(name)}


def store_layer(program: Program, name: str, bits: int) -> None:
    """Put the weight of a float layer onto integer steps, in place; the layer given is not changed.

    Args:
        program: gets a copy of the layer in its place.
        name: of the layer.
        bits: of the integers.
    """
    layer: Any = copy.deepcopy(program.get_submodule(name))
    rounded, encoding = encode_weight(layer.weight.detach(), WeightSteps(bits))
    require_nonzero(f"{name}.weight", layer.weight, rounded)
    with torch.no_grad():
        layer.weight.copy_(rounded)
    program.set_submodule(name, layer)
    program.encodings[f"{name}.weight"] = encoding


def cast_layer(
    layer: nn.Module, float_type: str, copies: dict[int, Any] | None = None
) -> tuple[nn.Module, dict[str, Encoding]]:
    """A copy of a float layer with its weights cast, and how they are stored, by their own names.

    Args:
        layer: any; it is not changed.
        float_type: the half-precision type.
        copies: of tensors, by the identity of the original, so that tied ones stay tied.
    """
    copied, encodings = copy.deepcopy(layer, copies), {}
    for name, weight in weight_tensors(copied).items():
        rounded, encodings[name] = store_weight(weight.detach(), WeightSteps(), float_type)
        with torch.no_grad():
            weight.copy_(rounded)
    return copied, encodings


def cast_layers(program: Program, float_types: Mapping[str, str]) -> None:
    """Cast the weights of float layers, in place; the layers given are not changed.

    Args:
        program: gets copies of the layers in their places.
        float_types: the half-precision type of each, by its name.
    """
    copies: dict[int, Any] = {}
    for name, float_type in float_types.items():
        layer, encodings = cast_layer(program.get_submodule(name), float_type, copies)
        program.set_submodule(name, layer)
        program.encodings |= {f"{name}.{own}": encoding for own, encoding in encodings.items()}


def storable(state: Mapping[str, Tensor], scheme: Scheme) -> dict[str, str | None]:
    """Every tensor that looks like a layer's weight, with the reason why a scheme cannot take it, or None.

    A weight is a tensor of two or more dimensions that is called so: of convolutions, linears,
    embeddings, recurrent layers and the projections of attention.
    """
    reasons: dict[str, str | None] = {}
    for name, tensor in state.items():
        if tensor.dim() < 2 or not is_weight_name(name):
            continue
        kind = str(tensor.dtype).removeprefix("torch.")
        if not tensor.is_floating_point():
            reasons[name] = f"not floating point but {kind}"
        elif tensor.dtype not in Affine.dtypes:
            reasons[name] = f"{kind} is as small as int8"
        elif scheme.float_type is not None and tensor.dtype not in Cast.dtypes:
            reasons[name] = f"not float32 but {kind}"
        else:
            reasons[name] = None if tensor.numel() else "empty"
    return reasons


def already_quantized(names: Iterable[str], encodings: Mapping[str, Encoding]) -> dict[str, str]:
    """Weights that take few bits already, with that as the reason to leave them."""
    few = {name: without_zeros(e) for name in names if is_shared(e := encodings.get(name))}
    return {name: f"stored as {encoding.codec} values already" for name, encoding in few.items()}
