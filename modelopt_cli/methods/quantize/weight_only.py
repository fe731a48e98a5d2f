"""int8-weight: weights stored as int8 with one scale per output channel, computed in float32.

Needs no data and no graph, so it also serves networks that cannot be traced and bare state dicts.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from modelopt_cli.artifact.codecs.affine import DTYPES
from modelopt_cli.methods.quantize.weights import quantize_weight
from modelopt_cli.methods.select import is_weight_name
from modelopt_cli.program import Encoding


def storable(state: Mapping[str, Tensor]) -> dict[str, str | None]:
    """Every tensor that looks like a layer's weight, with the reason why it cannot be int8, or None.

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
        elif tensor.dtype not in DTYPES:
            reasons[name] = f"{kind} is as small as int8"
        else:
            reasons[name] = None if tensor.numel() else "empty"
    return reasons


def layer_of(parameter: str) -> str:
    """The layer that a parameter belongs to: its name without the last component."""
    return parameter.rpartition(".")[0] or parameter


def encode_weights(
    state: Mapping[str, Tensor], names: Iterable[str], *, exact_everywhere: bool = False
) -> tuple[dict[str, Tensor], dict[str, Encoding]]:
    """Round weights to int8 steps.

    Args:
        state: tensors by name.
        names: which of them.
        exact_everywhere: the weights will be multiplied in int8, not only stored.

    Returns:
        The rounded tensors, in their own dtype, and how each is to be stored.
    """
    rounded: dict[str, Tensor] = {}
    encodings: dict[str, Encoding] = {}
    for name in names:
        weight = state[name]
        values, scale = quantize_weight(weight, exact_everywhere=exact_everywhere)
        spread = scale.view(-1, *[1] * (weight.dim() - 1))
        rounded[name] = (values.to(torch.float32) * spread).to(weight.dtype)
        encodings[name] = Encoding("affine", {"bits": 8, "axis": 0, "group": None}, {"scale": scale})
    return rounded, encodings
