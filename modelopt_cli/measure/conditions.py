"""Conditions under which a figure can be measured, and what keeps it from being measured."""

from dataclasses import dataclass

from modelopt_cli.settings import option


@dataclass(frozen=True)
class Conditions:
    """Properties of an evaluation that are known before it begins.

    Attributes:
        labelled: True if there is data with labels.
        runs: number of timed rounds.
        undefined: why the main metric is not a number on the data; None where it is one, or nobody knows yet.
        incomparable: why the outputs of two models are not compared; None where they are, or as above.
    """

    labelled: bool
    runs: int
    undefined: str | None = None
    incomparable: str | None = None


@dataclass(frozen=True)
class Obstacle:
    """Reason why a figure cannot be measured.

    Attributes:
        reason: what is missing.
        hint: the next step.
    """

    reason: str
    hint: str


def without_labels(conditions: Conditions) -> Obstacle | None:
    """Reason why a metric cannot be measured, or None."""
    if conditions.undefined is not None:
        return Obstacle(
            f"cannot be judged on this data: {conditions.undefined}", f"give other {option('data')}"
        )
    if conditions.labelled:
        return None
    return Obstacle("needs labelled data to be held against", f"give {option('data')}")


def without_comparison(conditions: Conditions) -> Obstacle | None:
    """Reason why outputs cannot be compared, or None."""
    if conditions.incomparable is None:
        return None
    hint = "leave the limit out, or have the network return the same outputs in every call"
    return Obstacle(f"cannot be judged: {conditions.incomparable}", hint)
