"""Encodings of tensors that lose channels."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from modelopt_cli.program.program import Encoding


def sliced(encoding: Encoding, shape: Sequence[int], kept: Mapping[int, Tensor]) -> Encoding | None:
    """The encoding of a tensor of which only some positions are left; None if it has to be made again.

    Evenly spaced steps stay what they are: one scale for the tensor, one for each index along an axis
    (of which those left are picked), or one for each group along the last dimension as long as that
    dimension stays whole.

    Args:
        encoding: of the whole tensor.
        shape: of the whole tensor.
        kept: positions that are left, by dimension.
    """
    if not kept:
        return encoding
    if encoding.codec == "raw":
        return encoding
    if encoding.codec != "affine":
        return None
    axis, group = encoding.params.get("axis"), encoding.params.get("group")
    if axis is not None:
        parts = {
            n: _picked(p.reshape(shape[axis]), {0: kept[axis]} if axis in kept else {})
            for n, p in encoding.parts.items()
        }
        return Encoding(encoding.codec, encoding.params, parts)
    if group is None:
        return Encoding(encoding.codec, encoding.params, encoding.parts)
    last = len(shape) - 1
    if last in kept:
        return None
    coarse = (*shape[:-1], -(-shape[-1] // group))
    parts = {n: _picked(p.reshape(coarse), kept) for n, p in encoding.parts.items()}
    return Encoding(encoding.codec, encoding.params, parts)


def _picked(part: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    for dim, positions in kept.items():
        part = part.index_select(dim, positions.to(part.device))
    return part
