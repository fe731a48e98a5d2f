"""Reasons for a layer's loss that lie before it, in other layers and batch norms."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn

from modelopt_cli.methods.quantize.sensitivity.rounding_reasons import OUTLIER, Reason
from modelopt_cli.methods.quantize.static import Calibrated
from modelopt_cli.program import Program
from modelopt_cli.program.calls import source


def makers_of(node: fx.Node, ready: Calibrated) -> tuple[str, ...]:
    """The layers with weights that a call's input comes from, nearest first; none for the network's input."""
    found, seen = list[str](), set[fx.Node]()
    start = source(node)
    waiting = [start] if isinstance(start, fx.Node) else []
    while waiting:
        current = waiting.pop(0)
        if current in seen:
            continue
        seen.add(current)
        if current.op == "call_module" and _has_weight(ready.program.get_submodule(str(current.target))):
            found.append(str(current.target))
            continue
        waiting += [each for each in current.all_input_nodes if _is_tensor(ready.plan.values.get(each))]
    return tuple(dict.fromkeys(found))


def _has_weight(module: nn.Module) -> bool:
    return any(tensor.dim() > 1 for tensor in module.parameters())


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor | tuple | list)


def with_cause(reason: Reason, makers: Sequence[str], original: Program, folded: Program) -> Reason:
    """The reason, with what a batch norm folded into the layer before has to do with it, if anything."""
    if reason.channel is None or not reason.of_input or len(makers) != 1:
        return reason
    times = _factor_of_batch_norm(makers[0], reason.channel, original, folded)
    if times is None:
        return reason
    text = f"{reason.text}; the batch norm behind {makers[0]} multiplies it {times:,.0f} times as much"
    return replace(reason, text=text)


def _factor_of_batch_norm(name: str, channel: int, original: Program, folded: Program) -> float | None:
    """Times that folding has multiplied one channel's weights more than the median's, if that stands out."""
    try:
        before, after = (p.get_submodule(name).get_parameter("weight").detach() for p in (original, folded))
    except AttributeError:  # attention that was taken apart
        return None
    if before.shape != after.shape or channel >= len(after):
        return None
    sizes = [weight.double().flatten(1).norm(dim=1) for weight in (before, after)]
    factors = sizes[1] / sizes[0].clamp(min=1e-30)
    times = float(factors[channel] / factors.median().clamp(min=1e-30))
    return times if times > OUTLIER else None
