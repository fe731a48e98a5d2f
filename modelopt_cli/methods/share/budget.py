"""Budgets of ``--bits auto``: the price of a bit at which the file or the loss of accuracy meets a limit."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from modelopt_cli.data import Data
from modelopt_cli.errors import GateNotMet
from modelopt_cli.measure.metrics import ACCURACY, METRICS, Metric
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.share.bit_allocation import BitAllocation
from modelopt_cli.methods.share.metric_drop import MetricDrop, main_metric, split_to_verify, unit_of
from modelopt_cli.program import Program
from modelopt_cli.settings import option

CLOSE = 0.985
"""Fraction of a budget in bytes that is enough to have used."""
TRIES = 6
"""Largest number of networks made to find the price."""
HALVINGS = 40
"""Halvings of the interval in which the price for a number of bits is estimated."""
PRICES = (1e-16, 1e6)
"""Lowest and highest price of a bit."""
BITS = (0.25, 8.0)
"""Bits for a weight, on average, between which an accuracy is searched."""

Make = Callable[[float], Program]
"""Makes the network at a price of a bit."""


class BudgetNotMet(GateNotMet):
    """No price of a bit meets the budget."""


@dataclass(frozen=True)
class BudgetTask:
    """A network to bring within a limit.

    Attributes:
        limit: in the unit of the budget's metric.
        original: the network to compare with, in the form that is clustered.
        context: calibration data and training, if any.
        file_bytes: predicts the size of a network's file, history included.
        full_bytes: size of the original's file, written as a plain artifact.
    """

    limit: float
    original: Program
    context: Context
    file_bytes: Callable[[Program], int]
    full_bytes: int


class Search(Protocol):
    """The search for the best network within a limit; made from a ``BudgetTask``."""

    def choosing_data(self) -> Data | None:
        """The calibration data that may be looked at while choosing."""

    def find(self, allocation: BitAllocation, make: Make) -> Program:
        """The network at the price that meets the limit; raises BudgetNotMet."""

    def reached(self, network: Program) -> float:
        """The limited quantity as measured on a network, in the limit's unit."""

    @property
    def unit(self) -> str:
        """Unit of the limit, after the number; empty of a fraction."""


class FileSearch:
    """Search for the largest file of at most a fraction of the original's bytes."""

    unit = ""

    def __init__(self, task: BudgetTask) -> None:
        self._task = task

    def choosing_data(self) -> Data | None:
        """All calibration data: no accuracy is promised."""
        return self._task.context.data

    def find(self, allocation: BitAllocation, make: Make) -> Program:
        """The network whose file just stays within the limit."""
        budget = self._task.limit * self._task.full_bytes
        return largest_within(allocation, make, self._task.file_bytes, budget)

    def reached(self, network: Program) -> float:
        """Fraction of the original's bytes."""
        return self._task.file_bytes(network) / self._task.full_bytes


class DropSearch:
    """Search for the smallest network that loses at most so much of the task's main metric."""

    def __init__(self, task: BudgetTask) -> None:
        self._task = task

    @cached_property
    def _parts(self) -> tuple[Data, Data]:
        return split_to_verify(self._task.context, self._task.limit)

    def choosing_data(self) -> Data | None:
        """The part that the result is not verified on."""
        return self._parts[0]

    def find(self, allocation: BitAllocation, make: Make) -> Program:
        """The smallest network that is good enough on both parts."""
        choosing, verifying = (self._drop_on(part).upper for part in self._parts)
        return smallest_without_loss(allocation, make, choosing, verifying, self._task.limit, self._metric)

    def reached(self, network: Program) -> float:
        """Largest loss to expect, on the part that nothing was chosen by."""
        return self._drop_on(self._parts[1]).upper(network)

    @property
    def unit(self) -> str:
        """Unit of a drop of the main metric."""
        return unit_of(self._metric)

    @property
    def _metric(self) -> Metric:
        return main_metric(self._task.context.task)

    def _drop_on(self, data: Data) -> MetricDrop:
        return MetricDrop.of(self._task.original, data, self._task.context)


def price_for_bits(allocation: BitAllocation, bits: float) -> float:
    """The price of a bit at which the weights take about so many bits on average.

    Estimated by the entropy of the nearest levels, without regard to contexts, rates and compensation.
    """
    low, high = (math.log(price) for price in PRICES)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if allocation.bits(math.exp(middle)) > bits else (low, middle)
    return math.exp(high)


def largest_within(
    allocation: BitAllocation, make: Make, size: Callable[[Program], int], budget: float
) -> Program:
    """The network whose file just stays within a budget.

    Args:
        allocation: of the network's weights.
        make: makes the network at a price.
        size: bytes of its file.
        budget: bytes.

    Raises:
        BudgetNotMet: no such network was found.
    """
    best: tuple[int, Program] | None = None
    smallest, bits = math.inf, 8 * CLOSE * budget / allocation.count
    tried: list[tuple[float, float]] = []
    for _ in range(TRIES):
        program = make(price_for_bits(allocation, bits))
        file_bytes = size(program)
        smallest = min(smallest, file_bytes)
        if file_bytes <= budget and (best is None or file_bytes > best[0]):
            best = file_bytes, program
        if CLOSE * budget <= file_bytes <= budget:
            break
        tried.append((bits, float(file_bytes)))
        bits = _next_bits(tried, (1 + CLOSE) / 2 * budget, allocation.count)
    if best is None:
        raise BudgetNotMet(
            f"the file does not get smaller than {smallest:,.0f} bytes; {budget:,.0f} were asked for",
            hint="ask for more, allow more layers, or prune first",
        )
    return best[1]


def _next_bits(tried: list[tuple[float, float]], target: float, count: int) -> float:
    """Bits for a weight at which a straight line through the last two sizes meets the target's bytes.

    After one try the slope is that of the indices alone: a bit more for each of ``count`` weights. A slope
    far below that comes from two sizes that hardly differ; it would send the next try anywhere.
    """
    bits, file_bytes = tried[-1]
    slope = count / 8
    if len(tried) > 1 and tried[-2][0] != bits:
        slope = (file_bytes - tried[-2][1]) / (bits - tried[-2][0])
    slope = max(slope, count / 80)
    return min(max(bits + (target - file_bytes) / slope, bits / 4, 1e-3), 16.0)


def smallest_without_loss(
    allocation: BitAllocation,
    make: Make,
    choosing_drop: Callable[[Program], float],
    verifying_drop: Callable[[Program], float],
    most: float,
    metric: Metric = METRICS[ACCURACY],
) -> Program:
    """The smallest network that loses no more than so much.

    It is searched on some samples and verified on others: of several networks that look good enough on the
    same samples, the smallest is there by luck in part.

    Args:
        allocation: of the network's weights.
        make: makes the network at a price.
        choosing_drop: what may be lost, on the samples to choose by.
        verifying_drop: the same, on others.
        most: allowed.
        metric: that it is lost of.

    Raises:
        BudgetNotMet: even at 8 bits a weight more may be lost.
    """
    low, high = BITS
    best = make(price_for_bits(allocation, high))
    if (lost := max(choosing_drop(best), verifying_drop(best))) > most:
        raise BudgetNotMet(
            f"at {BITS[1]:g} bits a weight up to {lost:.{metric.digits}f}{unit_of(metric)} may be lost; "
            f"{most:g} were allowed",
            hint=f"allow more, give more samples with {option('calibration')}, or leave out "
            f"layers with {option('exclude')}",
        )
    # Bisection on a logarithmic scale: from 8 bits to 4 matters as much as from 1 to a half.
    passed = [high]
    for _ in range(TRIES):
        middle = math.sqrt(low * high)
        program = make(price_for_bits(allocation, middle))
        if choosing_drop(program) <= most:
            best, high = program, middle
            passed.append(middle)
        else:
            low = middle
    # Back up, one network that passed at a time, until the samples not chosen by agree.
    while passed.pop() != BITS[1] and verifying_drop(best) > most:
        best = make(price_for_bits(allocation, passed[-1]))
    return best
