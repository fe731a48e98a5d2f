"""Everything wrong with a command line, reported together."""

from collections.abc import Callable
from typing import TypeVar

from modelopt_cli.errors import UsageError

Value = TypeVar("Value")


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
