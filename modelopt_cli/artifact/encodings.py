"""Encodings: which parameters are pruned, which are shared, and the smallest way to store what is pruned.

The rules, for every method: a parameter is pruned if the codec of its encoding says so (``sparse``, or
``codebook`` with its setting ``pruned``), and its zeros stay zeros. One whose values are those of a codebook,
or steps of a scale, is shared, and equal values stay equal. After a method has changed tensors,
:func:`compact` says how they are to be stored now.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from modelopt_cli.artifact.codecs import CODECS, PLAIN
from modelopt_cli.artifact.codecs.base import Steps
from modelopt_cli.artifact.codecs.positions import DENSE
from modelopt_cli.artifact.codecs.smallest import smallest_form
from modelopt_cli.artifact.codecs.sparse import SPARSE, settings_of
from modelopt_cli.errors import ModeloptError, UsageError
from modelopt_cli.program.program import Encoding, Program


def is_pruned(encoding: Encoding | None) -> bool:
    """True if a parameter stored so is pruned: its zeros are to stay."""
    return encoding is not None and CODECS[encoding.codec].is_pruned(encoding.params)


def is_plain(encoding: Encoding | None) -> bool:
    """True if a parameter is stored as its values are, whatever they are."""
    return encoding is None or CODECS[encoding.codec].plain


def values_label(encoding: Encoding | None) -> str:
    """The set that a parameter's values are on, in reports: ``affine8``, ``shared 16`` or nothing."""
    return "" if encoding is None else CODECS[encoding.codec].values_label(encoding.params)


def codebook_shape(encoding: Encoding) -> tuple[int, int, int]:
    """Codebooks, centroids in each and numbers in a centroid that can hold a parameter of few values."""
    return CODECS[encoding.codec].codebook_shape(encoding.params)


def channel_steps(encoding: Encoding | None) -> tuple[Tensor, int] | None:
    """Scale ``(O,)`` and bits of a parameter whose values are steps of it, one for each output; else None."""
    base = without_zeros(encoding)
    return CODECS[base.codec].channel_steps(base)


def compute_type(encoding: Encoding | None) -> torch.dtype | None:
    """The half-precision type that products of a weight stored so are to be computed in; None for its own."""
    return None if encoding is None else CODECS[encoding.codec].compute_type(encoding)


def spread_steps(encoding: Encoding | None, shape: tuple[int, ...]) -> Steps | None:
    """Scale, zero point and bits of a parameter of this shape whose values are steps; else None."""
    base = without_zeros(encoding)
    return CODECS[base.codec].spread_steps(base, shape)


def is_shared(encoding: Encoding | None) -> bool:
    """True if a parameter stored so has few values on purpose: those of a codebook, or steps of a scale."""
    return CODECS[without_zeros(encoding).codec].few_values


def require_not_shared(
    encodings: Mapping[str, Encoding],
    change: str = "training",
    hint: str = "train first, then quantize or share",
) -> None:
    """Refuse parameters whose few values a method would change.

    Raises:
        UsageError: a parameter is shared.
    """
    for name, encoding in encodings.items():
        if is_shared(encoding):
            codec = without_zeros(encoding).codec
            raise UsageError(
                f"is stored as {codec} values, which {change} would change", where=name, hint=hint
            )


def pruned_names(encodings: Mapping[str, Encoding]) -> set[str]:
    """The parameters that are pruned."""
    return {name for name, encoding in encodings.items() if is_pruned(encoding)}


def without_zeros(encoding: Encoding | None) -> Encoding:
    """Encoding of the same values where zeros count like any other: raw, or by another codec."""
    return PLAIN if encoding is None else CODECS[encoding.codec].without_zeros(encoding)


def sparse_encoding(
    tensor: Tensor, encoding: Encoding | None = None, pattern: str | None = None
) -> Encoding | None:
    """The smallest sparse encoding of a tensor, if that is smaller than storing all its values.

    Args:
        tensor: of a type that ``sparse`` stores; any other has no sparse encoding.
        encoding: how its values are stored so far: None, ``raw``, ``affine`` without zero point, or
            ``sparse``, whose pattern is then tried again.
        pattern: ``"N:M"`` or ``"block:B"``, where one is known; some are looked for anyway.

    Returns:
        An encoding of exactly this tensor: other zeros need another one.
    """
    base = without_zeros(encoding)
    if not SPARSE.takes(tensor.dtype, base):
        return None
    shape, dtype = tuple(tensor.shape), tensor.dtype
    size, settings = smallest_form(tensor, base, pattern or _pattern_of(encoding))
    if size >= CODECS[base.codec].predicted_bytes(shape, dtype, base.params, tuple(base.parts)):
        return None
    return Encoding(SPARSE.name, settings, dict(base.parts))


def pruned_encoding(tensor: Tensor, encoding: Encoding | None = None, pattern: str | None = None) -> Encoding:
    """Mark a tensor as pruned, by :func:`sparse_encoding` or, where that saves nothing, densely."""
    base = without_zeros(encoding)
    if (marked := CODECS[base.codec].with_zeros(base)) is not None:
        return marked
    smallest = sparse_encoding(tensor, encoding, pattern)
    if smallest is not None:
        return smallest
    if not SPARSE.takes(tensor.dtype, base):
        raise ModeloptError(f"{base.codec} values of type {tensor.dtype} cannot be marked as pruned")
    settings = {"form": DENSE, "count": tensor.numel(), "values": settings_of(base)}
    return Encoding(SPARSE.name, settings, dict(base.parts))


def compact(program: Program, names: Iterable[str] = (), pattern: str | None = None) -> dict[str, Encoding]:
    """Encodings of every parameter of a Program as it is now; assign them to ``program.encodings``.

    Args:
        program: its tensors as they are; it is not changed. Encodings of tensors it no longer has go.
        names: parameters that have just been pruned, next to those marked as pruned before.
        pattern: of those in ``names``, see :func:`sparse_encoding`.
    """
    return compact_state(program.state_dict(), program.encodings, names, pattern)


def compact_state(
    state: Mapping[str, Tensor],
    encodings: Mapping[str, Encoding],
    names: Iterable[str] = (),
    pattern: str | None = None,
) -> dict[str, Encoding]:
    """:func:`compact` for tensors without a graph."""
    fresh = set(names)
    current = {name: encoding for name, encoding in encodings.items() if name in state}
    for name in sorted(fresh | pruned_names(current)):
        current[name] = _pruned(name, state[name], encodings.get(name), pattern if name in fresh else None)
    return current


def carry_over(
    before: Mapping[str, Tensor],
    earlier: Mapping[str, Encoding],
    after: Mapping[str, Tensor],
    encodings: Mapping[str, Encoding],
    renamed: Mapping[str, str] | None = None,
) -> dict[str, Encoding]:
    """Keep what pruning promised through a method that gave pruned parameters other values or types.

    Args:
        before: the tensors that the method was given, by name.
        earlier: how those were stored.
        after: the tensors it made; a pruned one has its shape still, or is gone.
        encodings: how the method wants those stored.
        renamed: names before to names after, where they differ.

    Returns:
        The encodings to store ``after`` with.

    Raises:
        ModeloptError: a zero is not zero any more (a bug of the method).
    """
    kept = {(renamed or {}).get(old, old): old for old in sorted(pruned_names(earlier))}
    kept = {name: old for name, old in kept.items() if name in after}
    carried = compact_state(after, {name: e for name, e in encodings.items() if name not in kept})
    for name, old in kept.items():
        if bool((after[name][before[old] == 0] != 0).any()):
            raise ModeloptError("a weight that was pruned is not zero any more", where=name)
        new = encodings.get(name, PLAIN)
        marked = _pruned(name, after[name], without_zeros(new), _pattern_of(earlier[old]))
        carried[name] = replace(marked, integers=new.integers)
    return carried


def _pruned(name: str, tensor: Tensor, encoding: Encoding | None, pattern: str | None) -> Encoding:
    try:
        return pruned_encoding(tensor.detach().cpu(), encoding, pattern)
    except ModeloptError as error:
        raise ModeloptError(error.message, where=name) from None


def _pattern_of(encoding: Encoding | None) -> str | None:
    """The pattern that the zeros of a parameter are stored in."""
    return None if encoding is None else CODECS[encoding.codec].pattern(encoding.params)
