"""The text of an option's value becomes a typed value here and nowhere else.

Everything wrong with a command line is reported together.
"""

import math
import re
from collections.abc import Callable
from typing import Literal, TypeVar, get_args

from modelopt_cli.errors import UsageError
from modelopt_cli.settings import not_one_of

InputType = Literal["float32", "int64", "int32", "uint8", "bool"]
Value = TypeVar("Value")
Choice = TypeVar("Choice", bound=str)


class Reader:
    """Parses option values, and keeps what is wrong with them until all have been looked at.

    Attributes:
        wrong: one line for each problem.
    """

    def __init__(self) -> None:
        self.wrong: list[str] = []

    def read(self, option: str, text: str | None, parse: Callable[[str], Value]) -> Value | None:
        """``parse(text)``; None if there is no text, or if ``parse`` raises ValueError."""
        if text is None:
            return None
        try:
            return parse(text)
        except ValueError as error:
            self.wrong.append(f"{option}: {error}")
            return None

    def check(self, fine: bool, option: str, problem: str) -> None:
        """Note ``problem`` unless ``fine``."""
        if not fine:
            self.wrong.append(f"{option}: {problem}")

    def note(self, problem: str) -> None:
        """Note a problem that says itself where it is."""
        self.wrong.append(problem)

    def take(self, other: "Reader", where: str) -> None:
        """Note what ``other`` has found wrong with one part of the whole."""
        self.wrong += [f"{where}: {problem}" for problem in other.wrong]

    def finish(self, where: str | None = None) -> None:
        """Raise UsageError with everything that was wrong, if anything was."""
        if self.wrong:
            raise UsageError("; ".join(self.wrong), where=where)


def parse_choice(text: str, choices: tuple[Choice, ...]) -> Choice:
    """One of ``choices``."""
    for choice in choices:
        if choice == text:
            return choice
    raise ValueError(not_one_of(text, choices))


def parse_size(text: str) -> tuple[int, int]:
    """``224`` or ``192x256`` as (height, width) in pixels."""
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text, re.ASCII)
    if match is None:
        raise ValueError(f"'{text}' is neither N nor HEIGHTxWIDTH in pixels")
    return int(match[1]), int(match[2] or match[1])


def parse_shape(text: str) -> tuple[tuple[int, ...], InputType]:
    """``3x8x56x56`` or ``128:int64``: the shape of one sample and the type of its elements."""
    size = r"[1-9]\d{0,5}"
    match = re.fullmatch(rf"({size}(?:x{size}){{0,7}})(?::(\w+))?", text, re.ASCII)
    if match is None:
        raise ValueError(f"'{text}' is not the shape of a sample, such as 3x224x224 or 128:int64")
    return tuple(map(int, match[1].split("x"))), parse_choice(match[2] or "float32", get_args(InputType))


def parse_resize(text: str) -> int | tuple[int, int]:
    """``256``, the short side, or ``192x256``, exactly that height and width."""
    height, width = parse_size(text)
    return (height, width) if "x" in text else height


def parse_crop(text: str) -> int | float:
    """``224`` in pixels, or ``0.875`` or ``87.5%``, a fraction of the short side."""
    if re.fullmatch(r"[1-9]\d{0,4}", text, re.ASCII):
        return int(text)
    if re.fullmatch(r"0?\.\d+|[\d.]+%", text, re.ASCII) and 0 < parse_fraction(text) < 1:
        return parse_fraction(text)
    raise ValueError(f"'{text}' is neither a number of pixels nor a fraction between 0 and 1")


def parse_fraction(value: str | float) -> float:
    """``0.3`` or ``30%``; a default is a number already."""
    if isinstance(value, float):
        return value
    text = str(value).strip()
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"'{value}' is neither a fraction such as 0.3 nor a percentage such as 30%")
    return number


def parse_floats(text: str) -> tuple[float, ...]:
    """``0.485,0.456,0.406``: one number for each channel."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"'{text}' is not a list of numbers such as 0.485,0.456,0.406")
    return values


def parse_device(text: str) -> str:
    """``cpu``, ``cuda`` or ``cuda:N``."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", text, re.ASCII):
        raise ValueError(f"'{text}' is not cpu, cuda or cuda:N")
    return text
