"""Run lengths: the blocks that are skipped before each kept one, in a fixed number of bits each."""

import numpy as np

from modelopt_cli.artifact.codecs.base import expect
from modelopt_cli.artifact.codecs.bits import Integers, packed_size

MAX_RUN_BITS = 24


def gaps(index: Integers) -> Integers:
    """Numbers of blocks that are skipped before each kept one."""
    return np.diff(index, prepend=-1) - 1


def run_lengths(index: Integers, bits: int) -> Integers:
    """Skipped blocks before each kept one; the largest number says: so many, and none kept yet."""
    escape = (1 << bits) - 1
    skipped = gaps(index)
    escapes = skipped // escape  # before each kept block
    ends = np.cumsum(escapes + 1) - 1  # entries that end with a kept block
    entries = np.full(len(index) + int(escapes.sum()), escape, np.int64)
    entries[ends] = skipped % escape
    return entries


def kept_places(entries: Integers, bits: int) -> Integers:
    """Places of the kept blocks, in increasing order; undoes :func:`run_lengths`.

    Raises:
        ArtifactError: the last entry has no kept block.
    """
    ends = entries != (1 << bits) - 1
    expect(len(entries) == 0 or bool(ends[-1]), "the last run of zeros ends nowhere")
    # An entry moves on by the blocks that it skips, and by one more where a kept block ends it.
    return np.asarray((np.cumsum(entries + ends) - 1)[ends])


def best_run_bits(index: Integers) -> tuple[int, int]:
    """The width of run lengths that takes the fewest bytes, and how many entries there are then.

    Args:
        index: the kept positions in increasing order.
    """
    # A run that is too long for its bits takes entries of all ones before its own, so narrow entries are many
    # and wide ones large. The lengths' histogram is enough to count both.
    lengths, counts = _histogram(gaps(index))
    entries = {
        bits: len(index) + int((lengths // ((1 << bits) - 1) * counts).sum())
        for bits in range(1, MAX_RUN_BITS + 1)
    }
    return min(entries.items(), key=lambda pair: packed_size(pair[1], pair[0]))


def _histogram(numbers: Integers) -> tuple[Integers, Integers]:
    """The distinct numbers and how often each occurs; small ones, the bulk, without sorting."""
    bulk = 1 << 12
    counts = np.bincount(np.minimum(numbers, bulk), minlength=bulk + 1)[:bulk]
    rare, rare_counts = np.unique(numbers[numbers >= bulk], return_counts=True)
    common = np.flatnonzero(counts)
    return np.concatenate((common, rare)), np.concatenate((counts[common], rare_counts))
