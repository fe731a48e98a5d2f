"""Names of options in messages: flags on the command line, arguments in Python. Imports no torch."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_FLAGS: ContextVar[bool] = ContextVar("flags", default=False)
_SWITCHES = {"evaluate": "eval"}
"""Arguments that are turned off by a flag of another name: ``evaluate=False`` is ``--no-eval``."""


def option(name: str, value: Any = None) -> str:
    """A setting as the reader of a message writes it: on the command line or in Python.

    Args:
        name: of the argument.
        value: what to set it to; None for the name alone.

    Example:
        >>> option("max_drop"), option("bits", 4), option("force", True)
        ('max_drop', 'bits=4', 'force=True')
        >>> with naming_flags():
        ...     option("max_drop"), option("bits", 4), option("force", True), option("evaluate", False)
        ('--max-drop', '--bits 4', '--force', '--no-eval')
    """
    if not _FLAGS.get():
        return name if value is None else f"{name}={value!r}"
    if value is False:
        return f"--no-{flag_of(_SWITCHES.get(name, name)).removeprefix('--')}"
    flag = flag_of(name)
    return flag if value is None or value is True else f"{flag} {shlex.quote(str(value))}"


@contextmanager
def naming_flags() -> Iterator[None]:
    """Messages made within name the command line's options instead of the arguments of functions."""
    token = _FLAGS.set(True)
    try:
        yield
    finally:
        _FLAGS.reset(token)


def flag_of(name: str) -> str:
    """The usual spelling of an argument on the command line, such as ``--max-drop``."""
    return "--" + name.replace("_", "-")
