"""Which parameters are pruned, which are shared, and the smallest way to store what is pruned.

The rules, for every method: a parameter whose encoding has the codec ``sparse``, or the codec ``codebook``
and its setting ``pruned``, is pruned, and its zeros stay zeros. One whose values are those of a table, or
steps of a scale, is shared, and equal values stay equal. After a method has changed tensors,
:func:`compact` says how they are to be stored now.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor

from modelopt_cli.artifact.codecs import CODECS
from modelopt_cli.artifact.codecs.smallest import settings_of, smallest_form
from modelopt_cli.artifact.codecs.sparse import DTYPES
from modelopt_cli.errors import ModeloptError, UsageError
from modelopt_cli.program.program import Encoding, Program

_PLAIN = Encoding("raw")


def is_pruned(encoding: Encoding | None) -> bool:
    """Whether a parameter stored so is pruned: its zeros are to stay."""
    return encoding is not None and (encoding.codec == "sparse" or bool(encoding.params.get("pruned")))


def is_shared(encoding: Encoding | None) -> bool:
    """Whether a parameter stored so has few values on purpose: those of a table, or steps of a scale."""
    return without_zeros(encoding).codec != "raw"


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
    """How the same values are stored where zeros count like any other: raw, or by another codec."""
    if encoding is None:
        return _PLAIN
    if encoding.codec == "codebook":
        return Encoding("codebook", {**encoding.params, "pruned": False}, dict(encoding.parts))
    if not is_pruned(encoding):
        return encoding
    affine = encoding.params["values"]
    return _PLAIN if affine is None else Encoding("affine", dict(affine), dict(encoding.parts))


def sparse_encoding(
    tensor: Tensor, encoding: Encoding | None = None, pattern: str | None = None
) -> Encoding | None:
    """The smallest sparse encoding of a tensor, if that is smaller than storing all its values.

    Args:
        tensor: of a type in ``sparse.DTYPES``; any other has no sparse encoding.
        encoding: how its values are stored so far: None, ``raw``, ``affine`` without zero point, or
            ``sparse``, whose pattern is then tried again.
        pattern: ``"N:M"`` or ``"block:B"``, where one is known; some are looked for anyway.

    Returns:
        An encoding of exactly this tensor: other zeros need another one.
    """
    base = without_zeros(encoding)
    if not _can_be_sparse(tensor, base):
        return None
    shape, dtype = tuple(tensor.shape), tensor.dtype
    size, settings = smallest_form(tensor, base, pattern or _pattern_of(encoding))
    if size >= CODECS[base.codec].predicted_bytes(shape, dtype, base.params, tuple(base.parts)):
        return None
    return Encoding("sparse", settings, dict(base.parts))


def pruned_encoding(tensor: Tensor, encoding: Encoding | None = None, pattern: str | None = None) -> Encoding:
    """As :func:`sparse_encoding`, but marks the tensor as pruned even where that saves nothing."""
    base = without_zeros(encoding)
    if base.codec == "codebook":  # which has an entry for the zeros
        return Encoding("codebook", {**base.params, "pruned": True}, dict(base.parts))
    found = sparse_encoding(tensor, encoding, pattern)
    if found is not None:
        return found
    if not _can_be_sparse(tensor, base):
        raise ModeloptError(f"{base.codec} values of type {tensor.dtype} cannot be marked as pruned")
    settings = {"form": "dense", "count": tensor.numel(), "values": settings_of(base)}
    return Encoding("sparse", settings, dict(base.parts))


def compact(program: Program, names: Iterable[str] = (), pattern: str | None = None) -> dict[str, Encoding]:
    """How every parameter of a Program is to be stored now; assign it to ``program.encodings``.

    Args:
        program: its tensors as they are; it is not changed. Encodings of tensors it no longer has go.
        names: parameters that have just been pruned, beside those marked as pruned before.
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
    found = {name: encoding for name, encoding in encodings.items() if name in state}
    for name in sorted(fresh | pruned_names(found)):
        hint = pattern if name in fresh else None
        try:
            found[name] = pruned_encoding(state[name].detach().cpu(), encodings.get(name), hint)
        except ModeloptError as error:
            raise ModeloptError(error.message, where=name) from None
    return found


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
    found, kept = dict(encodings), set()
    for old in sorted(pruned_names(earlier)):
        name = (renamed or {}).get(old, old)
        if name not in after:
            continue
        if bool((after[name][before[old] == 0] != 0).any()):
            raise ModeloptError("a weight that was pruned is not zero any more", where=name)
        kept.add(name)
        base = without_zeros(encodings.get(name))
        if earlier[old].codec == "sparse" and base.codec != "codebook":
            # The old form over the new values: compact tries its pattern again.
            form = {**earlier[old].params, "values": settings_of(base)}
            found[name] = Encoding("sparse", form, dict(base.parts))
    return compact_state(after, found, kept)


def _can_be_sparse(tensor: Tensor, base: Encoding) -> bool:
    return tensor.dtype in DTYPES and base.codec in ("raw", "affine") and "zero_point" not in base.parts


def _pattern_of(encoding: Encoding | None) -> str | None:
    """The pattern a sparse encoding is written in."""
    params = encoding.params if encoding is not None and encoding.codec == "sparse" else {}
    if params.get("form") == "n:m":
        return f"{params['n']}:{params['m']}"
    return f"block:{params['block']}" if params.get("block", 1) > 1 else None
