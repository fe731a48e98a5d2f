"""A decoder for the codec `entropy`, written from docs/format.md alone: plain integers, one symbol at a time.

It is slow and short, and shares nothing with the package: what it decodes, the page describes.
"""

from math import isqrt


def decode(stream, settings):
    """The integers that a stream of bytes stands for, row-major.

    Args:
        stream: bytes.
        settings: those of the codec, as in the file.
    """
    integers = []
    for rows, lanes, last, size in settings["blocks"]:
        block, stream = stream[:size], stream[size:]
        symbols = Block(block, rows, lanes, last, settings).decode()
        integers += [symbol + settings["center"] for row in symbols for symbol in row]
    assert not stream
    return integers


class Block:
    """One block; its attributes have the names that the page gives them."""

    def __init__(self, stream, rows, lanes, last, settings):
        assert len(stream) % 2 == 0
        self.words = [stream[i] | stream[i + 1] << 8 for i in range(0, len(stream), 2)]
        self.rows, self.lanes, self.last = rows, lanes, last
        self.reach, self.mirror, self.lag = settings["reach"], settings["mirror"], settings["lag"]
        self.signed, self.columns = settings["signed"], settings["columns"]
        self.alphabet = range(-self.reach, self.reach + 1)
        self.limits = [4]
        while self.limits[-1] < 130_560:
            self.limits.append(self.limits[-1] * 3 // 2)
        self.shapes = [self.shape(low) for low in (2, *self.limits)]
        self.counts = [dict.fromkeys(self.alphabet, 0) for _ in self.shapes]
        self.learn()
        self.weights, self.mean = [4096] * self.columns, max(self.reach * 4096 // 5, 1)
        self.sums = [0] * self.columns
        self.rows_so_far = 0

    def decode(self):
        phases = [(self.rows - self.last, self.lanes)]
        if self.last:
            phases.append((self.last, min(max(self.lanes // 8, 1), self.last)))
        symbols = []
        for number, (rows, lanes) in enumerate(phases):
            self.states = self.read_states(lanes)
            for first in range(0, rows, lanes):
                symbols += self.decode_pass(min(lanes, rows - first))
            if number < len(phases) - 1:
                assert all(state < 1 << 17 for state in self.states)
                self.words = [state & 0xFFFF for state in self.states] + self.words
        assert all(state == 1 << 16 for state in self.states)
        assert not any(self.words)
        return symbols

    def read_states(self, lanes):
        bits, used = [], 0

        def take(count):
            nonlocal bits, used
            while len(bits) < used + count:
                word = self.words.pop(0)
                bits += [word >> i & 1 for i in range(16)]
            number = sum(bit << i for i, bit in enumerate(bits[used : used + count]))
            used += count
            return number

        lengths = [take(4) for _ in range(lanes)]
        upper = [(1 << length) + take(length) for length in lengths]
        assert not any(bits[used:])
        return [half << 16 | self.words.pop(0) for half in upper]

    def decode_pass(self, lanes):
        gains, offsets, before = [], [], 0
        for weight in self.weights:
            gains.append((6 * weight << 20) // (before + 4 * 4096))
            offsets.append((4 * self.mean * gains[-1] >> 20) * 128 // 4096)
            before += weight
        coded = [[] for _ in range(lanes)]
        for column in range(self.columns):
            for lane in range(lanes):
                context = self.context(coded[lane], gains[column], offsets[column])
                coded[lane].append(self.take_symbol(lane, context))
            if self.taken >= self.due:
                self.learn()
        self.end_pass(coded)
        return [self.sides(row) for row in coded] if self.signed else coded

    def size(self, symbol):
        return 64 * min(abs(2 * symbol - self.mirror), 510)

    def context(self, row, gain, offset):
        sizes = [self.size(symbol) for symbol in row]
        missing = self.mean * 128 // 4096
        left = sizes[-1] if sizes else missing
        above = sizes[-self.lag] if len(sizes) >= self.lag else missing
        expectation = (sum(sizes) * gain >> 20) + offset + left + above
        return sum(limit <= expectation for limit in self.limits)

    def take_symbol(self, lane, context):
        x = self.states[lane]
        start = 0
        for symbol in self.alphabet:
            frequency = self.frequencies[context][symbol]
            if x % 32768 < start + frequency:
                break
            start += frequency
        x = frequency * (x >> 15) + x % 32768 - start
        self.states[lane] = x if x >= 1 << 16 else x << 16 | self.words.pop(0)
        self.counts[context][symbol] += 1
        self.taken += 1
        return symbol

    def end_pass(self, coded):
        self.rows_so_far += len(coded)
        for row in coded:
            for column, symbol in enumerate(row):
                self.sums[column] += self.size(symbol)
        rows, columns, total = self.rows_so_far, self.columns, max(sum(self.sums), 1)
        for column, part in enumerate(self.sums):
            ratio = min(part * 4096 * columns // total, 255 * 4096)
            self.weights[column] = max((ratio * rows + 4 * 4096) // (rows + 4), 64)
        self.mean = max(total * 32 // (rows * columns), 1)

    def sides(self, row):
        symbols, below = [], False
        for coded in row:
            symbol = self.mirror - coded if below else coded
            if 2 * symbol != self.mirror:
                below = 2 * symbol < self.mirror
            symbols.append(symbol)
        return symbols

    def shape(self, low):
        mean = 5 * low // 4
        ratio = (isqrt((1024**2 + mean**2) * 2**32) - (1024 << 16)) // mean
        masses = [2**30]
        for _ in range(self.reach):
            masses.append(masses[-1] * ratio >> 16)
        shape = shares({symbol: masses[abs(symbol)] for symbol in self.alphabet})
        return {**shares({**shape, 0: 0}), 0: shape[0]}

    def learn(self):
        n = sum(sum(counts.values()) for counts in self.counts)
        self.taken, self.due = 0, max(n // 16, 1)
        t = {symbol: sum(counts[symbol] for counts in self.counts) for symbol in self.alphabet}
        common = (2 * t[0] + 1) * 2**20 // 2 // (n + 1)
        u = self.other_shares(t)
        both = zip(self.counts, self.shapes, strict=True)
        self.frequencies = [self.distribution(counts, shape, common, u) for counts, shape in both]

    def other_shares(self, t):
        t[0] = 0
        reach = len(t) // 32
        masses = {}
        for s in self.alphabet:
            near = sum(t.get(i, 0) for i in range(s - reach, s + reach + 1))
            masses[s] = 2 * near + (4 * t[s] if reach else 0) + 1
        return shares({**masses, 0: 0})

    def distribution(self, c, shape, common, u):
        size = len(self.alphabet)
        room = 32768 - size
        prior = (shape[0] + 3 * common) >> 2
        zeros = room * (c[0] * 2**20 + 4 * prior) // ((sum(c.values()) + 4) * 2**20)
        mass = {s: c[s] * 2**20 + size * ((shape[s] + 3 * u[s]) >> 2) for s in self.alphabet}
        mass[0] = 0
        total = max(sum(mass.values()), 1)
        frequency = {s: 1 + mass[s] * (room - zeros) // total for s in self.alphabet}
        frequency[0] += zeros
        largest = max(self.alphabet, key=lambda s: frequency[s])
        frequency[largest] += 32768 - sum(frequency.values())
        return frequency


def shares(masses):
    total = max(sum(masses.values()), 1)
    return {symbol: mass * 2**20 // total for symbol, mass in masses.items()}
