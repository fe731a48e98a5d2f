"""Interleaved range asymmetric numeral systems: many lanes share one stream of 16-bit words.

rANS is from Duda, "Asymmetric numeral systems" (arXiv:1311.2540), its interleaving from Giesen, "Interleaved
entropy coders" (arXiv:1402.3392). A lane's state is an integer of 32 bits. A symbol that has ``frequency`` of
``2**SCALE_BITS`` slots, from ``start`` on, turns it into another. All lanes take a symbol at a time, so that
each step is a handful of array operations.

A lane's first state would cost four bytes. Half of them carry data: a writer begins each lane with a word it
takes back from the stream of the phase that follows, and a reader puts that word back when the lane has come
to its end. Of the other half, the leading zeros are not stored.
"""

import numpy as np
import numpy.typing as npt

from modelopt_cli.artifact.codecs.base import expect

SCALE_BITS = 15
LOW = 1 << 16
"""States are from ``LOW`` to below ``LOW << 16``."""

Integers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint16]
_MASK = (1 << SCALE_BITS) - 1
_LENGTH_BITS, _LONGEST = np.arange(4), np.arange(15)


class Writer:
    """Makes a stream from its end to its beginning."""

    def __init__(self, symbols: int, lanes: int) -> None:
        self._words = np.zeros(symbols + 3 * lanes + 4, np.uint16)
        self._at = len(self._words)
        self._states = np.zeros(0, np.int64)

    def begin(self, lanes: int) -> None:
        """Start a phase, at its end; phases come in reverse order.

        The lanes begin with the words that follow; where they are too few, the other lanes begin with zeros.
        """
        self._states = np.full(lanes, LOW, np.int64)
        taken = self._words[self._at : self._at + lanes]
        self._states[: len(taken)] |= taken
        self._at += len(taken)

    def steps(self, frequencies: Words, starts: Words) -> None:
        """Write symbols from the last step to the first, ``(steps, lanes)``, perhaps fewer than all lanes.

        Args:
            frequencies: of the symbols, out of ``2**SCALE_BITS``.
            starts: their first slots.
        """
        x = self._states[: frequencies.shape[1]]
        wide = frequencies[::-1].astype(np.int64)
        limits, complements = wide << (32 - SCALE_BITS), (1 << SCALE_BITS) - wide
        for frequency, limit, complement, start in zip(wide, limits, complements, starts[::-1], strict=True):
            (full,) = (x >= limit).nonzero()
            if len(full):
                some = x.take(full)
                self._push(some)
                x[full] = some >> 16
            # x // frequency * 2**SCALE_BITS + x % frequency + start
            complement *= x // frequency
            x += complement
            x += start

    def end(self) -> None:
        """Write the states, which a reader begins with."""
        self._push(self._states)
        self._push(_pack(self._states >> 16))

    def _push(self, words: Integers) -> None:
        """Write the lower 16 bits of integers."""
        self._at -= len(words)
        self._words[self._at : self._at + len(words)] = words & 0xFFFF

    def stream(self) -> npt.NDArray[np.uint8]:
        """All words, little-endian."""
        return self._words[self._at :].astype("<u2").view(np.uint8)


class StreamReader:
    """Reads a stream that :class:`Writer` made."""

    def __init__(self, stream: npt.NDArray[np.uint8]) -> None:
        expect(len(stream) % 2 == 0, "the stream ends within a word")
        self._words = stream.view("<u2").astype(np.int64)
        self._at = 0
        self._states = np.zeros(0, np.int64)

    def begin(self, lanes: int) -> None:
        """Read the states of a phase."""
        lengths = self._lengths(lanes)
        size = 4 * lanes + int(lengths.sum())
        bits = _bits(self._take(-(-size // 16)))
        expect(not bits[size:].any(), "the bits behind the states are not zero")
        mantissas = np.zeros((lanes, len(_LONGEST)), np.int64)
        mantissas[lengths[:, None] > _LONGEST] = bits[4 * lanes : size]
        high = (1 << lengths) + (mantissas << _LONGEST).sum(1)
        self._states = high << 16 | self._take(lanes)

    def _lengths(self, lanes: int) -> Integers:
        words = self._take(-(-lanes // 4))
        self._at -= len(words)
        lengths: Integers = (_bits(words)[: 4 * lanes].reshape(lanes, 4) << _LENGTH_BITS).sum(1)
        return lengths

    def slots(self, lanes: int) -> Integers:
        """Slots of the next symbols of the first ``lanes`` states."""
        slots: Integers = self._states[:lanes] & _MASK
        return slots

    def advance(self, frequency: Integers, offset: Integers) -> None:
        """Take one symbol out of each of the first states.

        Args:
            frequency: of the symbols.
            offset: how far the slots were behind the first ones of the symbols.
        """
        x = self._states[: len(frequency)]
        x >>= SCALE_BITS
        x *= frequency
        x += offset
        (short,) = (x < LOW).nonzero()
        if len(short):
            x[short] = x.take(short) << 16 | self._take(len(short))

    def end(self, last: bool) -> None:
        """Check the states at the end of a phase, and put the words that began them back.

        Args:
            last: whether no phase follows this one.
        """
        if last:
            complete = not self._words[self._at :].any() and bool((self._states == LOW).all())
            expect(complete, "the stream does not end where it should")
            return
        lanes = len(self._states)
        expect(bool((self._states < 2 * LOW).all()), "a state of the stream is out of range")
        self._at -= lanes
        self._words[self._at : self._at + lanes] = self._states & 0xFFFF

    def _take(self, count: int) -> Integers:
        expect(self._at + count <= len(self._words), "the stream ends too early")
        self._at += count
        return self._words[self._at - count : self._at]


def _pack(numbers: Integers) -> Integers:
    """Words of numbers from 1 to 65,535: how many bits follow their first one, then those bits."""
    lengths = np.frexp(numbers)[1][:, None] - 1
    counts = lengths >> _LENGTH_BITS & 1
    mantissas = (numbers[:, None] >> _LONGEST & 1)[lengths > _LONGEST]
    bits = np.concatenate((counts.reshape(-1), mantissas))
    padded = np.pad(bits, (0, -len(bits) % 16)).astype(np.uint8)
    return np.packbits(padded, bitorder="little").view("<u2").astype(np.int64)


def _bits(words: Integers) -> Integers:
    """The bits of words, the lowest of each first."""
    return np.unpackbits(words.astype("<u2").view(np.uint8), bitorder="little").astype(np.int64)
