"""Text from untrusted files and other people's code, and numbers, made fit for a terminal or a report."""

import math
import unicodedata
from collections.abc import Sequence

# Controls, direction overrides, lone surrogates, line separators; private and unassigned characters, which
# a terminal may show as anything.
_ESCAPED = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_LONGEST = 120
TOO_DEEP = "its calls are nested too deep"


def printable(text: str) -> str:
    """``text`` on one line, with everything that could move a terminal's cursor written as an escape."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(char) if unicodedata.category(char) in _ESCAPED else char for char in text)


def short(text: object, limit: int = _LONGEST) -> str:
    """``printable`` text, cut after ``limit`` characters.

    Layer names and error messages of other libraries are data from an untrusted file.
    """
    line = printable(str(text)[: limit + 1])
    return line if len(line) <= limit else line[: limit - 1] + "…"


def shortened(text: str, limit: int = _LONGEST) -> str:
    """``text`` without its middle where it is longer than ``limit``: both ends of a path say what it is."""
    if len(text) <= limit:
        return text
    end = (limit - 1) // 2
    return f"{text[: limit - 1 - end]}…{text[-end:]}"


def json_number(value: float | None) -> float | None:
    """A number as JSON has it, which knows neither NaN nor infinity: None in their place."""
    return value if value is not None and math.isfinite(value) else None


def is_too_deep(error: BaseException | str) -> bool:
    """True of an error that says no more than that Python's stack was used up."""
    return isinstance(error, RecursionError) or "maximum recursion depth" in str(error)


def first_line(error: BaseException | str) -> str:
    """The first non-empty line of an exception's message, or its type's name."""
    if is_too_deep(error):
        return TOO_DEEP
    lines = (line.strip() for line in str(error).splitlines())
    return short(next((line for line in lines if line), type(error).__name__))


def typed_line(error: BaseException) -> str:
    """An exception's type and the first line of its message."""
    if is_too_deep(error):
        return TOO_DEEP
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {printable(lines[0])}" if lines else type(error).__name__


def listing(names: Sequence[str], show: int = 3) -> str:
    """``a, b, c and 5 more``."""
    shown = ", ".join(short(name) for name in names[:show])
    hidden = len(names) - show
    return f"{shown} and {hidden} more" if hidden > 0 else shown


def _escape(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")
