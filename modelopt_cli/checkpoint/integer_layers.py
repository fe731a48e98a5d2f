"""Integer layers of networks whose file holds their tensors and no graph."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import nn

from modelopt_cli.program import Encoding
from modelopt_cli.program.kinds import KINDS, class_of
from modelopt_cli.program.quantized import Weighted


@cache
def restored_kinds() -> dict[str, type[Weighted]]:
    """Classes of the integer layers that are put back where there is no graph, by their scheme."""
    ours = (class_of(kind) for kind, row in KINDS.items() if row.ours)
    return {kind.scheme: kind for kind in ours if issubclass(kind, Weighted) and kind.float_layer is not None}


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
    kind = restored_kinds().get(_scheme(last))
    if kind is None or kind.float_layer is None:
        return
    skipped = last.get("skipped", {})
    for name, encoding in encodings.items():
        layer = name.rpartition(".")[0] or name
        if "scale" not in encoding.parts or name in skipped or layer in skipped:
            continue
        part = module.get_submodule(layer)
        if isinstance(part, kind.float_layer):
            module.set_submodule(layer, kind.of_float(part, encoding.parts["scale"]))


def _scheme(entry: Mapping[str, Any]) -> str:
    """The scheme of quantization that an entry of a history names, which may say anything, or nothing."""
    config = entry.get("config")
    return str(config.get("scheme", "")) if isinstance(config, dict) else ""
