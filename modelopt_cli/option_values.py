"""Texts that become values of options, rows that are named by texts, and complaints about both."""

import math
import operator
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

Row = TypeVar("Row")


def help_of(row: Any) -> str:
    """The one-line description of a row of a table of choices."""
    text: str = row if isinstance(row, str) else row.help
    return text


def row_named(text: str, rows: Mapping[str, Row]) -> Row | None:
    """The row that ``text`` names, or None."""
    for name, row in rows.items():
        spelling = getattr(row, "spelling", None)
        if spelling.fullmatch(text) if spelling else name == text:
            return row
    return None


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The entry of ``known`` nearest to ``word``, or None if nothing is near.

    Args:
        word: what was written.
        known: what could have been meant.
        cutoff: least similarity, of ``difflib``'s ratio from 0 to 1; larger where ``known`` is long, since
            something is a little like any word there.
    """
    spelled = {name.lower(): name for name in known}
    matches = get_close_matches(word.lower(), list(spelled), n=1, cutoff=cutoff)
    return spelled[matches[0]] if matches else None


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """A hint naming the entry of ``known`` nearest to ``word``; arguments are those of :func:`nearest`."""
    near = nearest(word, known, cutoff)
    return None if near is None else f"did you mean '{near}'?"


def not_one_of(value: Any, choices: Iterable[str]) -> str:
    """The complaint about a value that is none of ``choices``, with the nearest of them."""
    hint = did_you_mean(str(value), choices)
    return f"'{value}' is not one of {', '.join(choices)}" + (f"; {hint}" if hint else "")


def number(text: str) -> float:
    """A finite number; raises ValueError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"'{text}' is not a number")
    return value


def plain(value: float) -> str:
    """A number for a message; a whole one is written out."""
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else f"{value:g}"


def out_of_bounds(
    value: float, least: float | None, above: float | None, most: float | None, below: float | None
) -> str | None:
    """The complaint about a number that does not keep all of its bounds, those that are not None."""
    bounds = (
        (least, "at least", operator.ge),
        (above, "above", operator.gt),
        (most, "at most", operator.le),
        (below, "below", operator.lt),
    )
    limits = [(limit, word, holds) for limit, word, holds in bounds if limit is not None]
    if all(holds(value, limit) for limit, _, holds in limits):
        return None
    bounded = " and ".join(f"{word} {plain(limit)}" for limit, word, _ in limits)
    return f"must be {bounded}, not {plain(value)}"


def fraction(text: str) -> float:
    """``0.3`` or ``30%``; raises ValueError."""
    try:
        return number(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        raise ValueError(f"'{text}' is neither a fraction such as 0.3 nor a percentage such as 30%") from None


def parse_device(text: str) -> str:
    """``cpu``, ``cuda`` or ``cuda:N``; raises ValueError."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", text, re.ASCII):
        raise ValueError(f"'{text}' is not cpu, cuda or cuda:N")
    return text


def boolean(text: str) -> bool:
    """``true`` or ``false``, or ``1`` or ``0``; raises ValueError."""
    if text.lower() not in ("true", "false", "1", "0"):
        raise ValueError(f"'{text}' is neither true nor false")
    return text.lower() in ("true", "1")
