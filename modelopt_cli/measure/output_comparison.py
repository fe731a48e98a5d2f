"""Comparison of the outputs of two networks: structure, finiteness, signal-to-noise ratio."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from modelopt_cli.program.output_structure import flatten, plain

LIMIT_DB = 200.0
"""Signal-to-noise of equal outputs, in dB: more than float32 can tell apart, and still a number."""


def structure(outputs: Any) -> Any:
    """Containers, shapes and types of a network's outputs, to be compared with ``==`` or printed."""
    if isinstance(outputs, Tensor):
        return f"{str(outputs.dtype).removeprefix('torch.')} {tuple(outputs.shape)}"
    outputs = plain(outputs)
    if isinstance(outputs, Mapping):
        return {str(name): structure(value) for name, value in outputs.items()}
    if isinstance(outputs, list | tuple):
        return [structure(value) for value in outputs]
    return type(outputs).__name__


def tensors(outputs: Any) -> Iterator[Tensor]:
    """Yield all tensors in a network's outputs, in order."""
    yield from flatten(outputs).values()


def is_finite(outputs: Any) -> bool:
    """True if no tensor in the outputs holds NaN or infinity."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors(outputs))


def stays_finite(expected: Any, outputs: Any) -> bool:
    """True if ``outputs`` is finite wherever ``expected`` is; both have one structure."""
    pairs = zip(tensors(expected), tensors(outputs), strict=True)
    return all(bool((torch.isfinite(b) | ~torch.isfinite(a)).all()) for a, b in pairs)


def nan_share(outputs: Any) -> float:
    """Share of the numbers in all floating-point tensors of the outputs that are NaN, 0 to 1."""
    real = [tensor for tensor in tensors(outputs) if _is_real(tensor)]
    missing = sum(int(tensor.isnan().sum()) for tensor in real)
    return missing / sum(tensor.numel() for tensor in real) if missing else 0.0


def stays_nan(expected: Any, outputs: Any) -> bool:
    """True if ``outputs`` is NaN wherever ``expected`` is; both have one structure."""
    pairs = zip(tensors(expected), tensors(outputs), strict=True)
    return all(bool((b.isnan() | ~a.isnan()).all()) for a, b in pairs)


def snr_db(expected: Any, outputs: Any) -> float | None:
    """Signal-to-noise ratio ``10 log10(sum(expected^2) / sum((expected - outputs)^2))`` in dB.

    Over all floating-point tensors of the two, which have one structure, where ``expected`` is finite;
    within ``LIMIT_DB`` on either side. None where there are no such tensors, or no number of them is finite.
    """
    pairs = [pair for pair in zip(tensors(expected), tensors(outputs), strict=True) if _is_real(pair[0])]
    if not pairs:
        return None
    if not any(bool(torch.isfinite(a).any()) for a, _ in pairs):
        return None
    signal = noise = 0.0
    for a, b in pairs:
        seen = torch.isfinite(a)
        reference, output = a[seen].double(), b[seen].double()
        signal += float(reference.square().sum())
        noise += float((reference - output).square().sum())
    if not noise:
        return LIMIT_DB
    ratio = 10 * math.log10(signal / noise) if signal and math.isfinite(noise) else -LIMIT_DB
    return max(-LIMIT_DB, min(LIMIT_DB, ratio)) if not math.isnan(ratio) else -LIMIT_DB


def least_snr_db(expected: Any, outputs: Any) -> float | None:
    """The signal-to-noise ratio in dB of the output that has the least; see :func:`snr_db`.

    A large output would hide what another one loses. Those that are nothing but zeros count only where there
    are no others.
    """
    pairs = list(zip(tensors(expected), tensors(outputs), strict=True))
    heard = [pair for pair in pairs if bool(pair[0].any())] or pairs
    ratios = (snr_db(*pair) for pair in heard)
    return min((ratio for ratio in ratios if ratio is not None), default=None)


def _is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() > 0
