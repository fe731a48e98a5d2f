"""Integer layers of networks whose file holds their tensors and no graph."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from modelopt_cli.program import Encoding
from modelopt_cli.program.quantized import DynamicLinear


def dynamic_linear(linear: nn.Linear, scale: Tensor) -> DynamicLinear:
    """The dynamic int8 form of a linear layer whose weight was decoded from int8.

    Args:
        linear: each row of its weight ``(O, C)`` consists of exact multiples of its scale.
        scale: ``(O,)``.
    """
    layer = DynamicLinear(linear.in_features, linear.out_features, linear.bias is not None)
    scale = scale.float()
    layer.weight.copy_((linear.weight.detach() / scale.view(-1, 1)).round())
    layer.scale.copy_(scale)
    if layer.bias is not None:
        layer.bias.copy_(linear.bias.detach())
    return layer


REBUILT: dict[str, Callable[[nn.Linear, Tensor], nn.Module]] = {DynamicLinear.scheme: dynamic_linear}
"""By the scheme that a file's history names: what makes an integer layer of a float one and its scale."""


def restore_integer_layers(
    module: nn.Module, history: tuple[dict[str, Any], ...], encodings: Mapping[str, Encoding]
) -> None:
    """Put integer layers back into a rebuilt network whose file says it was quantized so, in place.

    Args:
        module: its weights are those of the file.
        history: the file's.
        encodings: how the file stores its weights.
    """
    nothing: dict[str, Any] = {}
    last = next((e for e in reversed(history) if e.get("method") == "quantize"), nothing)
    rebuilt = REBUILT.get(str(last.get("config", {}).get("scheme")))  # a file may say anything
    if rebuilt is None:
        return
    skipped = last.get("skipped", {})
    for name, encoding in encodings.items():
        layer = name.rpartition(".")[0] or name
        if "scale" not in encoding.parts or name in skipped or layer in skipped:
            continue
        linear = module.get_submodule(layer)
        if isinstance(linear, nn.Linear):
            module.set_submodule(layer, rebuilt(linear, encoding.parts["scale"]))
