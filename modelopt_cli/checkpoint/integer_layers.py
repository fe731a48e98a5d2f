"""Integer layers of networks whose file holds their tensors and no graph."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import nn

from modelopt_cli.artifact.encodings import channel_steps
from modelopt_cli.program import Encoding
from modelopt_cli.program.layer_kinds import KINDS, class_of
from modelopt_cli.program.quantization import BITS
from modelopt_cli.program.quantized import Weighted


@cache
def restored_kinds() -> dict[str, dict[type[nn.Module], type[Weighted]]]:
    """Integer layers that are put back where there is no graph, by scheme and the float layer's class."""
    kinds_of_scheme: dict[str, dict[type[nn.Module], type[Weighted]]] = {}
    for kind in (class_of(name) for name, row in KINDS.items() if row.ours):
        if issubclass(kind, Weighted) and kind.float_layer is not None:
            for scheme in kind.restored:
                kinds_of_scheme.setdefault(scheme, {})[kind.float_layer] = kind
    return kinds_of_scheme


def restore_integer_layers(
    module: nn.Module, history: tuple[dict[str, Any], ...], encodings: Mapping[str, Encoding]
) -> None:
    """Put integer layers back into a rebuilt network whose file says it was quantized so, in place.

    Args:
        module: its weights are those of the file.
        history: the file's; the last scheme in it counts.
        encodings: how the file stores its weights.
    """
    nothing: dict[str, Any] = {}
    last = next((entry for entry in reversed(history) if _scheme(entry)), nothing)
    kinds = restored_kinds().get(_scheme(last), {})
    skipped = last.get("skipped", {})
    for name, encoding in encodings.items():
        layer = name.rpartition(".")[0] or name
        steps = channel_steps(encoding)
        if steps is None or name in skipped or layer in skipped:
            continue
        part = module.get_submodule(layer)
        kind = next((kind for float_layer, kind in kinds.items() if isinstance(part, float_layer)), None)
        if kind is not None:
            scale, bits = steps
            module.set_submodule(layer, kind.of_float(part, scale, bits, _activation_bits(last, layer)))


def _activation_bits(entry: Mapping[str, Any], layer: str) -> int:
    """Bits of a layer's activations, by an entry of a history, which may say anything."""
    widths, config = entry.get("widths"), entry.get("config")
    own = widths.get(layer) if isinstance(widths, dict) else None
    bits = own[-1] if isinstance(own, list) and own else config.get("act_bits") if config else None
    return bits if type(bits) is int and 2 <= bits <= BITS else BITS


def _scheme(entry: Mapping[str, Any]) -> str:
    """The scheme of quantization that an entry of a history names, which may say anything, or nothing."""
    config = entry.get("config")
    return str(config.get("scheme", "")) if isinstance(config, dict) else ""
