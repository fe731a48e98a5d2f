"""A matrix of integers as a stream: how it is cut into blocks, and how these are passed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from modelopt_cli.artifact.codecs.base import Shape, expect
from modelopt_cli.artifact.codecs.blocks import (
    Alphabet,
    Passes,
    Symbols,
    decode_block,
    encode_block,
    relative,
)
from modelopt_cli.artifact.codecs.contexts import sizes_of

Matrix = npt.NDArray[np.integer[Any]]

LEAST_ROWS = 8
"""A tensor with fewer rows than that is cut into shorter ones."""
MOST_COLUMNS = 1 << 15
MOST_SYMBOLS = 1 << 23
"""Symbols of a block, at most: bounds memory and the size of integers."""
LONGEST_LAG = 32
SHARED_ROWS = 4
"""At least so many passes, so that the later ones are told by the columns of the earlier ones."""
BITS_OF_LANE, BITS_OF_ONE = 2100, 5600
"""A lane costs 6 to 8 bits, and the last rows 16 more: at most four in a thousand of so many bits of data."""
STEPS = 1 << 15
"""Lanes may cost more than that where there would be more steps than about so many."""
MOST_STEPS = 16 * STEPS
"""Steps of a block that is read, at most: the last rows, with fewer lanes, can take several times as many."""


@dataclass(frozen=True)
class MatrixForm:
    """Settings by which integers are read as a matrix, and coded.

    Attributes:
        center: the integer that counts as zero.
        columns: length of the rows.
        alphabet: of the symbols, which are the integers less the center.
        blocks: for each, the passes of its rows and the bytes of its stream.
    """

    center: int
    columns: int
    alphabet: Alphabet
    blocks: Sequence[tuple[Passes, int]]

    @property
    def nbytes(self) -> int:
        """Bytes of all streams."""
        return sum(size for _, size in self.blocks)


def encode(integers: Matrix, center: int) -> tuple[MatrixForm, npt.NDArray[np.uint8]]:
    """A stream, and what is needed to read it.

    Args:
        integers: at least one, in the shape they have as weights.
        center: the integer that the most frequent ones are next to.
    """
    columns = columns_of(integers.shape)
    matrix = integers.reshape(-1, columns)
    alphabet, height = _alphabet(matrix, center), MOST_SYMBOLS // columns
    blocks, streams = [], []
    for first in range(0, len(matrix), height):
        block = (matrix[first : first + height].astype(np.int32) - center).astype(np.int16)
        passes = _passes(len(block), columns, _entropy(block))
        streams.append(encode_block(block, passes, alphabet))
        blocks.append((passes, len(streams[-1])))
    return MatrixForm(center, columns, alphabet, blocks), np.concatenate(streams)


def decode(
    stream: npt.NDArray[np.uint8], form: MatrixForm, limits: tuple[int, int], dtype: npt.DTypeLike
) -> npt.NDArray[Any]:
    """The integers again, ``(rows, columns)``.

    Args:
        stream: as many bytes as the form says.
        form: how it was made.
        limits: the smallest and the largest integer there may be.
        dtype: their type.

    Raises:
        ArtifactError: the stream, which may come from a hostile file, is not one that was made so, or an
            integer exceeds the limits.
    """
    rows = sum(passes.rows for passes, _ in form.blocks)
    matrix = np.empty((rows, form.columns), dtype)
    first, at = 0, 0
    for passes, size in form.blocks:
        block = decode_block(stream[at : at + size], passes, form.columns, form.alphabet)
        integers = block.astype(np.int32) + form.center
        inside = limits[0] <= int(integers.min()) and int(integers.max()) <= limits[1]
        expect(inside, f"the integers exceed {limits[0]} to {limits[1]}")
        matrix[first : first + passes.rows] = integers
        first, at = first + passes.rows, at + size
    return matrix


def columns_of(shape: Shape) -> int:
    """Length of a tensor's rows: its last dimensions, as many as leave ``LEAST_ROWS`` rows."""
    for first in range(1, len(shape)):
        columns = math.prod(shape[first:])
        if math.prod(shape[:first]) >= LEAST_ROWS and columns <= MOST_COLUMNS:
            return columns
    return 1


def _alphabet(matrix: Matrix, center: int) -> Alphabet:
    """The alphabet that describes the first rows best."""
    low, high = int(matrix.min()) - center, int(matrix.max()) - center
    rows = max(MOST_COLUMNS // matrix.shape[1], 64)
    some = (matrix[:rows].astype(np.int32) - center).astype(np.int16)
    # Symbols of either sign have their middle at 0, or half a step off where the grid is asymmetric. Seen
    # from the side of the symbol before, the right middle gives the least entropy.
    costs = {mirror: _entropy(relative(some.T, mirror)) for mirror in (0, -1, 1)}
    mirror = min(costs, key=lambda mirror: costs[mirror])
    reach = max(high, -low, high - mirror, mirror - low)
    return Alphabet(reach, mirror, costs[mirror] <= _entropy(some), _lag(some, mirror))


def _lag(some: Symbols, mirror: int) -> int:
    """Distance, from 2 on, to the earlier symbol of a row that tells most of a symbol's size."""
    columns = some.shape[1]
    sizes = sizes_of(some, mirror)
    # The lag of the largest autocorrelation: in a convolution the one above in the kernel.
    sizes -= int(sizes.sum()) // sizes.size
    lags = range(2, min(LONGEST_LAG, columns - 1) + 1)
    products = [int((sizes[:, lag:] * sizes[:, :-lag]).sum()) // (columns - lag) for lag in lags]
    return 2 + products.index(max(products)) if products else 2


def _entropy(symbols: Symbols) -> float:
    """Bits that symbols take if each is coded by how frequent it is."""
    counts = np.bincount(symbols.reshape(-1) - int(symbols.min()))
    counts = counts[counts > 0]
    return float((counts * np.log2(symbols.size / counts)).sum())


def _passes(rows: int, columns: int, bits: float) -> Passes:
    """Lanes for a block that will take about so many bits."""
    # More lanes are faster and cost bits: as many as the data are worth, and enough to stay below STEPS.
    lanes = min(rows // SHARED_ROWS, int((bits - BITS_OF_ONE) / BITS_OF_LANE))
    lanes = min(max(lanes, rows * columns // STEPS, 1), rows)
    # The last rows give each of the other lanes a word of 16 bits to begin with.
    last = math.ceil(1.25 * 16 * lanes * rows / max(bits, 1))
    return Passes(rows, lanes, last if 1 < lanes <= rows - last else 0)
