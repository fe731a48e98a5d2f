"""One layer as it computes when it is rounded and all others are not: real values in, real values out."""

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from modelopt_cli.kernels import half_layers
from modelopt_cli.methods.quantize.conversion import fill, fill_recurrent
from modelopt_cli.methods.quantize.layer_forms import LAYER_FORMS, Precision
from modelopt_cli.methods.quantize.static import Calibrated
from modelopt_cli.methods.quantize.weight_only import cast_layer
from modelopt_cli.methods.quantize.widths import BYTE, INT8, Widths
from modelopt_cli.program.calls import source
from modelopt_cli.program.quantization import QParams, quantize
from modelopt_cli.program.quantized import Quantized, Weighted
from modelopt_cli.program.quantized_recurrent import QuantizedRecurrent


class RoundedCall:
    """A call of a layer whose weight and input are rounded, and whose output is not.

    The output is rounded where the next layer reads it, and counts there.

    Attributes:
        layer: the int8 layer.
        input: scale and zero point of its input; None where that stays float.
    """

    def __init__(self, layer: Quantized, q: QParams | None) -> None:
        self.layer, self.input = layer, q

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.input is None:
            return self.layer(*args, **kwargs)
        x, *more = (*args, *kwargs.values())
        assert not any(each is not None for each in more)
        return self.layer(quantize(x, self.input))


def calls_of(ready: Calibrated) -> dict[str, list[fx.Node]]:
    """The calls of each layer that can be rounded, in the order of the graph."""
    calls: dict[str, list[fx.Node]] = {}
    for node in ready.program.graph.find_nodes(op="call_module"):
        if node.target in ready.selected:
            calls.setdefault(str(node.target), []).append(node)
    return dict(sorted(calls.items(), key=lambda item: ready.selected.index(item[0])))


def input_bits(ready: Calibrated, name: str, calls: Collection[fx.Node]) -> int:
    """Bits of a layer's inputs as they were calibrated, the most of its calls."""
    values = [ready.plan.representative(source(node)) for node in calls]
    own = ready.plan.widths[name].activation or BYTE  # of the states, say, of a layer that reads float32
    return max((ready.qparams[value].bits for value in values if value in ready.qparams), default=own)


def rounded_calls(
    ready: Calibrated, name: str, calls: Collection[fx.Node], widths: Widths = INT8
) -> dict[fx.Node, RoundedCall]:
    """All calls of a layer with its weight rounded, which is done once, and their inputs.

    Args:
        ready: the float network with its scales.
        name: of the layer.
        calls: of the layer.
        widths: bits of its weight; those of its input are as calibrated.
    """
    module: Any = ready.program.get_submodule(name)
    form = LAYER_FORMS[type(module)]
    if not form.multiplies:
        stored = _stored(ready, name, module, calls, widths)
        return {node: RoundedCall(stored, None) for node in calls}
    rounded: dict[fx.Node, RoundedCall] = {}
    first: Weighted | None = None
    for node in calls:
        q = ready.qparams[ready.plan.representative(source(node))]
        layer = form.make(module, Precision(q, weight_bits=widths.weight))
        assert isinstance(layer, Weighted)
        if first is None:
            first = layer
            fill(layer, module, shared=f"{name}.weight" in ready.shared)
        else:
            layer.share_tensors(first)
        rounded[node] = RoundedCall(layer, q)
    return rounded


def cast_calls(
    ready: Calibrated, name: str, calls: Collection[fx.Node], float_type: str
) -> dict[fx.Node, Any]:
    """All calls of a layer with its weights cast, computed as a file that stores them so is on this machine.

    Args:
        ready: the float network.
        name: of the layer.
        calls: of the layer.
        float_type: the half-precision type.
    """
    layer, encodings = cast_layer(ready.program.get_submodule(name), float_type)
    half_layers.attach(layer, encodings.get("weight"), torch.device("cpu"))
    return dict.fromkeys(calls, layer)


def _stored(
    ready: Calibrated, name: str, module: nn.Module, calls: Collection[fx.Node], widths: Widths
) -> Quantized:
    """The int8 form of a layer that reads float32, the same for all its calls."""
    plan = ready.plan
    known = [ready.qparams[plan.representative(source(node))] for node in calls if node in plan.calibrated]
    make: Callable[..., Quantized] = LAYER_FORMS[type(module)].make
    layer = make(module, replace(widths, activation=plan.widths[name].activation), *known)
    if isinstance(layer, QuantizedRecurrent):
        fill_recurrent(layer, module, {own for own in ready.shared if own.rpartition(".")[0] == name})
    else:
        assert isinstance(layer, Weighted)
        fill(layer, module, shared=f"{name}.weight" in ready.shared, bounded=False)
    return layer
