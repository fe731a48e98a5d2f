"""Sound at another rate: band-limited interpolation with a windowed sinc, as a polyphase filter.

J. O. Smith, Digital Audio Resampling, https://ccrma.stanford.edu/~jos/resample/; the filters are those of
torchaudio's ``resample``, with more zero crossings.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from modelopt_cli.errors import DataError

_CROSSINGS = 24
_ROLLOFF = 0.99
"""The highest frequency that is kept, as a part of the highest that the lower of the two rates can hold."""
_LARGEST = 2**25
"""Coefficients of the filters."""


def resample(sound: Tensor, have: int, want: int) -> Tensor:
    """Samples of a sound at another rate.

    Args:
        sound: ``(T,)``, float32.
        have: its rate, per second.
        want: the rate to bring it to.

    Returns:
        ``(ceil(T * want / have),)``.

    Raises:
        DataError: the two rates have no small ratio.
    """
    common = math.gcd(have, want)
    step, count = have // common, want // common
    if step == count:
        return sound
    filters, reach = _filters(step, count)
    padded = F.pad(sound[None, None], (reach, reach + step))
    phases = F.conv1d(padded, filters, stride=step)  # (1, count, steps)
    return phases[0].T.flatten()[: -(-len(sound) * count // step)]


@lru_cache(maxsize=4)
def _filters(step: int, count: int) -> tuple[Tensor, int]:
    """A filter for each of ``count`` new samples in ``step`` old ones, ``(count, 1, taps)``; its reach."""
    band = min(step, count) * _ROLLOFF
    reach = math.ceil(_CROSSINGS * step / band)
    if count * (2 * reach + step) > _LARGEST:
        raise DataError(f"rates of {step} to {count} have no small ratio", hint="resample the files before")
    old = torch.arange(-reach, reach + step, dtype=torch.float64) / step
    new = torch.arange(count, dtype=torch.float64)[:, None] / count
    time = ((old - new) * band).clamp(-_CROSSINGS, _CROSSINGS)
    window = torch.cos(time * math.pi / _CROSSINGS / 2) ** 2
    return (torch.sinc(time) * window * (band / step)).float()[:, None], reach
