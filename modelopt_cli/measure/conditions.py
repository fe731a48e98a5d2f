"""Conditions under which a figure can be measured, and what keeps it from being measured."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Conditions:
    """Properties of an evaluation that are known before it begins.

    Attributes:
        labelled: True if there is data with labels.
        runs: number of timed rounds.
        undefined: why the main metric is not a number on the data; None where it is one, or nobody knows yet.
    """

    labelled: bool
    runs: int
    undefined: str | None = None


@dataclass(frozen=True)
class Obstacle:
    """Reason why a figure cannot be measured.

    Attributes:
        reason: what is missing.
        hint: the next step.
    """

    reason: str
    hint: str
