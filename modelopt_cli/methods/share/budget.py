"""The price of a bit at which the file meets its budget.

Loss of accuracy by sharing, on samples that no choice was made by.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt_cli.data import Data
from modelopt_cli.errors import GateNotMet, UsageError
from modelopt_cli.measure.statistics import Z_95, paired_difference_from_counts, proportion_interval
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.share.bit_allocation import Rated
from modelopt_cli.program import Program
from modelopt_cli.program.shapes import evaluation_mode
from modelopt_cli.training.split import hold_out

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


HELD_OUT = 0.5
"""Part of the calibration samples on which the network that was chosen by the others is verified."""


@dataclass(frozen=True)
class Drop:
    """Points that a network loses on some samples: of accuracy if they have labels, else of agreement.

    Attributes:
        data: the samples.
        context: device, batch size, workers.
        answers: the original network's classes, int64 ``(N,)``.
        labels: int64 ``(N,)``.
    """

    data: Data
    context: Context
    answers: Tensor
    labels: Tensor

    @classmethod
    def of(cls, program: Program, data: Data, context: Context) -> "Drop":
        """The measure of what is lost against ``program``.

        Raises:
            DataError: the labels cannot be used, or their classes are not the network's.
        """
        data = data.with_labels(program.labels)
        return cls(data, context, *_answers(program, data, context))

    def upper(self, program: Program) -> float:
        """The upper end of the 95 % interval of the points lost: Tango's, or Wilson's without labels."""
        answers, _ = _answers(program, self.data, self.context)
        samples = len(answers)
        if not self.data.labelled:
            return 100 * proportion_interval(int((answers != self.answers).sum()), samples)[1]
        before, after = self.answers == self.labels, answers == self.labels
        lost, gained = int((before & ~after).sum()), int((~before & after).sum())
        return paired_difference_from_counts(lost, gained, samples).high


def split(context: Context, most: float) -> tuple[Data, Data]:
    """Samples to choose a network by, and others to verify it on.

    Where the network is trained on the samples too, they are those that training does not see.

    Args:
        context: its data and what it trains with.
        most: points that may be lost.

    Raises:
        UsageError: there are none, they have no length, or are too few to tell such a drop.
    """
    data, training = context.data, context.training
    if data is None:
        raise UsageError("--max-drop is measured on data", hint="give --calib or --data")
    if data.size is None:
        raise UsageError("--max-drop holds samples out, and these have no length", where=data.name)
    if training is not None and training.val is not None:
        choosing, held = data, training.val
    else:
        unseen = training is not None and data is training.train and training.config.val_fraction
        choosing, held = hold_out(data, unseen) if unseen else data.split(round(HELD_OUT * data.size))
    for part in (choosing, held):
        if part.size is not None:
            require_enough(part.size, most, data.name)
    return choosing, held


def require_enough(samples: int, most: float, where: str) -> None:
    """Refuse samples on which even equal classes could have lost more than ``most`` points.

    Raises:
        UsageError: says how many there must be.
    """
    square = Z_95 * Z_95
    if 100 * square / (samples + square) <= most:
        return
    if most <= 0:
        raise UsageError(
            "no number of samples shows that nothing is lost", where="--max-drop", hint="allow more"
        )
    needed = math.ceil(square * (100 / most - 1))
    raise UsageError(
        f"{samples:,} samples cannot tell a drop of {most:g} points: it takes {needed:,} to choose by, "
        "and as many to verify on",
        where=where,
        hint="give more with --calib, or allow more",
    )


def _answers(program: Program, data: Data, context: Context) -> tuple[Tensor, Tensor]:
    """Classes and labels, int64 ``(N,)``."""
    found, known = [], []
    network = program.to(context.device)
    with evaluation_mode(network), torch.inference_mode():
        for images, labels in data.batches(context.batch_size, workers=context.workers):
            found.append(network(images.to(context.device)).flatten(1).argmax(1).cpu())
            known.append(labels)
    program.to("cpu")
    return torch.cat(found), torch.cat(known)
