"""Strings that came out of a file, made fit for one line of terminal output."""

import shlex
from pathlib import Path

from modelopt_cli.text import printable as one_line

_LONGEST = 120


def printable(text: object, limit: int = _LONGEST) -> str:
    """``text`` on one line: control and undecodable characters escaped, cut after ``limit`` characters.

    Layer names and error messages of other libraries are data from an untrusted file.
    """
    line = one_line(str(text)[: limit + 1])
    return line if len(line) <= limit else line[: limit - 1] + "…"


def first_line(error: BaseException | str) -> str:
    """The first non-empty line of an exception's message, or its type's name."""
    lines = (line.strip() for line in str(error).splitlines())
    return printable(next((line for line in lines if line), type(error).__name__))


def listing(names: list[str], show: int = 3) -> str:
    """``a, b, c and 5 more``."""
    shown = ", ".join(printable(name) for name in names[:show])
    rest = len(names) - show
    return f"{shown} and {rest} more" if rest > 0 else shown


def convert_command(script: str, path: Path) -> str:
    """A ``python -c`` line that writes ``NAME-weights.pth`` beside ``path``; both names are quoted."""
    target = path.with_name(f"{path.stem}-weights.pth")
    return f"python -c '{script}' {shlex.quote(str(path))} {shlex.quote(str(target))}"
