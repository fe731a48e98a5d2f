"""int8-weight: weights stored as int8 with one scale per output channel, computed in float32.

Needs no data and no graph, so it also serves networks that cannot be traced and bare state dicts.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from modelopt_cli.artifact.codecs.affine import DTYPES
from modelopt_cli.artifact.sparsity import without_zeros
from modelopt_cli.errors import UsageError
from modelopt_cli.methods.layer_selection import is_weight_name
from modelopt_cli.methods.quantize.weights import CHUNK, quantize_weight
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


def coarse(names: Iterable[str], encodings: Mapping[str, Encoding]) -> dict[str, str]:
    """Those weights that take few bits already, with that as the reason to leave them."""
    codecs = {name: without_zeros(encodings.get(name)).codec for name in names}
    return {name: f"stored as {codec} values already" for name, codec in codecs.items() if codec != "raw"}


def layer_of(parameter: str) -> str:
    """The layer that a parameter belongs to: its name without the last component."""
    return parameter.rpartition(".")[0] or parameter


def encode_weight(
    weight: Tensor, *, exact_everywhere: bool = False, shared: bool = False
) -> tuple[Tensor, Encoding]:
    """Round a weight to int8 steps, one scale for each index along its first dimension.

    Args:
        weight: float, of two or more dimensions; it is not changed.
        exact_everywhere: it will be multiplied in int8, not only stored.
        shared: equal weights of a channel stay equal.

    Returns:
        The rounded weight, in its own dtype, and how it is to be stored.
    """
    rounded = torch.empty_like(weight, memory_format=torch.contiguous_format)
    scales = []
    rows = max(CHUNK // max(weight[:1].numel(), 1), 1)
    for start in range(0, len(weight), rows):  # so that a large embedding is never copied whole
        some = weight[start : start + rows]
        values, scale = quantize_weight(some, exact_everywhere=exact_everywhere, shared=shared)
        spread = scale.view(-1, *[1] * (weight.dim() - 1))
        rounded[start : start + rows] = (values.to(torch.float32) * spread).to(weight.dtype)
        scales.append(scale)
    return rounded, Encoding("affine", {"bits": 8, "axis": 0, "group": None}, {"scale": torch.cat(scales)})


def require_left(name: str, before: Tensor, after: Tensor) -> None:
    """Refuse to round all of a weight to zero.

    Raises:
        UsageError: its values are too small for a scale in float32.
    """
    if not bool(after.any()) and bool(before.any()):
        what = f"has values up to {float(before.abs().max()):.2g}, which int8 and a float32 scale cannot hold"
        raise UsageError(what, where=name, hint=f"leave it out with --exclude {layer_of(name)}")


def encode_weights(
    state: Mapping[str, Tensor], names: Iterable[str], *, exact_everywhere: bool = False
) -> tuple[dict[str, Tensor], dict[str, Encoding]]:
    """:func:`encode_weight` for several, by name."""
    made = {name: encode_weight(state[name], exact_everywhere=exact_everywhere) for name in names}
    rounded = {name: weight for name, (weight, _) in made.items()}
    for name, weight in rounded.items():
        require_left(name, state[name], weight)
    return rounded, {name: encoding for name, (_, encoding) in made.items()}
