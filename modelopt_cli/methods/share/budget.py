"""The price of a bit at which the file meets its budget."""

import math
from collections.abc import Callable

from modelopt_cli.errors import GateNotMet
from modelopt_cli.methods.share.rated import Rated
from modelopt_cli.program import Program

CLOSE = 0.985
"""Part of the budget that is enough to have used."""
TRIES = 6
"""Networks made, at most, to find it."""
STEPS = 40
"""Halvings of the interval in which the price is estimated."""
PRICES = (1e-16, 1e6)
RANGE = (0.25, 8.0)
"""Bits for a weight, on average, between which an accuracy is looked for."""

Make = Callable[[float], Program]


class BudgetNotMet(GateNotMet):
    """No price of a bit meets the budget."""


def price_for_bits(rated: Rated, bits: float) -> float:
    """The price at which the weights take so many bits, on average and about.

    By the entropy of the nearest levels, without regard to contexts, rates and compensation.
    """
    low, high = (math.log(price) for price in PRICES)
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if rated.bits(math.exp(middle)) > bits else (low, middle)
    return math.exp(high)


def for_bytes(rated: Rated, make: Make, size: Callable[[Program], int], budget: float) -> Program:
    """The network whose file just stays within a budget.

    Args:
        rated: its weights.
        make: the network at a price.
        size: bytes of its file.
        budget: bytes.

    Raises:
        BudgetNotMet: no such network was found.
    """
    best: tuple[int, Program] | None = None
    nearest, bits = math.inf, 8 * CLOSE * budget / rated.count
    seen: list[tuple[float, float]] = []
    for _ in range(TRIES):
        program = make(price_for_bits(rated, bits))
        found = size(program)
        nearest = min(nearest, found)
        if found <= budget and (best is None or found > best[0]):
            best = found, program
        if CLOSE * budget <= found <= budget:
            break
        seen.append((bits, float(found)))
        bits = _next(seen, (1 + CLOSE) / 2 * budget, rated.count)
    if best is None:
        hint = "ask for more, allow more layers, or prune first"
        raise BudgetNotMet(
            f"the file does not get smaller than {nearest:,.0f} bytes; {budget:,.0f} were asked for",
            hint=hint,
        )
    return best[1]


def _next(seen: list[tuple[float, float]], wanted: float, count: int) -> float:
    """The bits at which a straight line through the last two sizes meets what is wanted."""
    bits, found = seen[-1]
    slope = count / 8
    if len(seen) > 1 and seen[-2][0] != bits:
        slope = (found - seen[-2][1]) / (bits - seen[-2][0])
    slope = max(slope, count / 80)
    return min(max(bits + (wanted - found) / slope, bits / 4, 1e-3), 16.0)


def for_drop(
    rated: Rated,
    make: Make,
    chosen: Callable[[Program], float],
    verified: Callable[[Program], float],
    most: float,
) -> Program:
    """The smallest network that loses no more than so many points.

    It is looked for on some samples and verified on others: of several that look good enough on samples, the
    smallest is there by luck in part.

    Args:
        rated: its weights.
        make: the network at a price.
        chosen: points that may be lost, on the samples to choose by.
        verified: the same, on others.
        most: points allowed.

    Raises:
        BudgetNotMet: even at 8 bits a weight more may be lost.
    """
    low, high = RANGE
    best = make(price_for_bits(rated, high))
    if (lost := max(chosen(best), verified(best))) > most:
        raise BudgetNotMet(
            f"at {RANGE[1]:g} bits a weight up to {lost:.2f} points may be lost; {most:g} were allowed",
            hint="allow more, give more samples with --calib, or leave out layers with --exclude",
        )
    passed = [high]
    for _ in range(TRIES):
        middle = math.sqrt(low * high)
        program = make(price_for_bits(rated, middle))
        if chosen(program) <= most:
            best, high = program, middle
            passed.append(middle)
        else:
            low = middle
    while passed.pop() != RANGE[1] and verified(best) > most:
        best = make(price_for_bits(rated, passed[-1]))
    return best
