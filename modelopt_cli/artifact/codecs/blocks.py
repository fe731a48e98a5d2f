"""A block of small signed integers to a stream of bytes and back: contexts and rANS together.

Rows are passed some at a time, as many as there are lanes, column by column: a step takes one symbol of each
of these rows, so that it can be computed for all of them at once. The last rows are passed with fewer lanes,
see ``rans``.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modelopt_cli.artifact.codecs.contexts import Columns, bases_of, sizes_of
from modelopt_cli.artifact.codecs.distributions import Distributions
from modelopt_cli.artifact.codecs.rans import SCALE_BITS, StreamReader, Words, Writer

Symbols = npt.NDArray[np.int16]

LAST_LANES = 8
"""Ratio of the lanes of the first rows to those of the last."""


@dataclass(frozen=True)
class Alphabet:
    """Range of the symbols, and the relations between neighbours.

    Attributes:
        reach: they are from ``-reach`` to ``reach``.
        mirror: the sum of two symbols that are as far from the middle, 0 or 1 or -1.
        signed: whether the side a symbol is on is told by that of the last one before it in its row that is
            not in the middle: neighbours in a kernel are more often on one side than on two.
        lag: how far before a symbol in its row another one is that tells of its size.
    """

    reach: int
    mirror: int
    signed: bool
    lag: int


@dataclass(frozen=True)
class Passes:
    """Order in which the rows of a matrix are passed.

    Attributes:
        rows: how many there are.
        lanes: how many are passed at a time.
        last: how many rows, at the end, are passed ``lanes // LAST_LANES`` at a time; perhaps none.
    """

    rows: int
    lanes: int
    last: int

    def phases(self) -> list[tuple[int, list[range]]]:
        """The lanes of each phase, and the rows of each of its passes."""
        first = self.rows - self.last
        phases = [(self.lanes, _cut(range(first), self.lanes))]
        if self.last:
            lanes = min(max(self.lanes // LAST_LANES, 1), self.last)
            phases.append((lanes, _cut(range(first, self.rows), lanes)))
        return phases

    def steps(self, columns: int) -> int:
        """Steps that it takes to pass them."""
        return columns * sum(len(groups) for _, groups in self.phases())


def _cut(rows: range, lanes: int) -> list[range]:
    return [rows[i : i + lanes] for i in range(0, len(rows), lanes)]


class _Model:
    """State of the model while a block is passed."""

    def __init__(self, columns: int, alphabet: Alphabet) -> None:
        self.alphabet = alphabet
        self.columns = Columns(columns, alphabet.reach)
        self.distributions = Distributions(alphabet.reach, alphabet.mirror)


def encode_block(block: Symbols, passes: Passes, alphabet: Alphabet) -> npt.NDArray[np.uint8]:
    """A block as a stream.

    Args:
        block: ``(rows, columns)``, at least one element.
        passes: how its rows are passed.
        alphabet: of its elements.
    """
    model, phases = _Model(block.shape[1], alphabet), passes.phases()
    coded = [[_slots(model, block[rows.start : rows.stop]) for rows in groups] for _, groups in phases]
    writer = Writer(block.size, sum(lanes for lanes, _ in phases))
    for (lanes, _), groups in zip(reversed(phases), reversed(coded), strict=True):
        writer.begin(lanes)
        for frequencies, starts in reversed(groups):
            writer.steps(frequencies, starts)
        writer.end()
    return writer.stream()


def _slots(model: _Model, rows: Symbols) -> tuple[Words, Words]:
    """Frequencies and first slots of the symbols of a pass, ``(columns, lanes)``."""
    columns, distributions, lag = model.columns, model.distributions, model.alphabet.lag
    symbols = relative(rows.T, model.alphabet.mirror) if model.alphabet.signed else rows.T
    seen = sizes_of(symbols, model.alphabet.mirror)
    sizes = np.concatenate((np.full((lag, len(rows)), columns.mean), seen))
    sums = np.cumsum(seen, 0) - seen
    bases = bases_of(sums, columns.gains, columns.offsets, sizes[lag - 1 : -1], sizes[:-lag])
    places = (bases >> SCALE_BITS) * distributions.alphabet + symbols + distributions.alphabet // 2
    frequencies, starts = np.empty(places.shape, np.uint16), np.empty(places.shape, np.uint16)
    column = 0
    while column < len(places):
        some = slice(column, column + math.ceil(distributions.wait / len(rows)))
        frequencies[some] = distributions.frequencies[places[some]]
        starts[some] = distributions.starts[places[some]] - bases[some]
        distributions.see(places[some].reshape(-1))
        column = some.stop
    columns.see(seen.sum(1), len(rows))
    return frequencies, starts


def decode_block(stream: npt.NDArray[np.uint8], passes: Passes, columns: int, alphabet: Alphabet) -> Symbols:
    """The block again.

    Raises:
        ArtifactError: the stream is not one that :func:`encode_block` makes.
    """
    reader, model, phases = StreamReader(stream), _Model(columns, alphabet), passes.phases()
    block = np.empty((passes.rows, columns), np.int16)
    for number, (lanes, groups) in enumerate(phases):
        reader.begin(lanes)
        for rows in groups:
            block[rows.start : rows.stop] = _read(reader, model, len(rows)).T
        reader.end(number == len(phases) - 1)
    return block


def _read(reader: StreamReader, model: _Model, lanes: int) -> Symbols:
    """The symbols of a pass, ``(columns, lanes)``."""
    columns, distributions, lag = model.columns, model.distributions, model.alphabet.lag
    sizes = np.full((lag + len(columns.gains), lanes), columns.mean)
    symbols = np.empty((len(columns.gains), lanes), np.int16)
    sums = np.zeros(lanes, np.int64)
    for column, (gain, offset) in enumerate(zip(columns.gains, columns.offsets, strict=True)):
        slots = reader.slots(lanes)
        slots += bases_of(sums, gain, offset, sizes[column + lag - 1], sizes[column])
        places = distributions.ends.searchsorted(slots, "right")
        slots -= distributions.starts.take(places)
        reader.advance(distributions.frequencies.take(places), slots)
        sums += distributions.sizes.take(places, out=sizes[column + lag], mode="clip")
        symbols[column] = distributions.symbols.take(places)
        distributions.see(places)
    columns.see(sizes[lag:].sum(1), lanes)
    return _absolute(symbols, model.alphabet.mirror) if model.alphabet.signed else symbols


def relative(symbols: Symbols, mirror: int) -> Symbols:
    """Symbols as seen from the side on which the last one before them is, ``(columns, rows)``."""
    doubled = 2 * symbols
    last = np.maximum.accumulate(np.where(doubled != mirror, np.arange(len(symbols))[:, None], 0), 0)
    below = np.take_along_axis(doubled < mirror, last, 0)
    turned = symbols.copy()
    np.subtract(mirror, symbols[1:], out=turned[1:], where=below[:-1])
    return turned


def _absolute(turned: Symbols, mirror: int) -> Symbols:
    """The symbols again."""
    below = np.logical_xor.accumulate(2 * turned < mirror, 0)
    symbols = turned.copy()
    np.subtract(mirror, turned[1:], out=symbols[1:], where=below[:-1])
    return symbols
