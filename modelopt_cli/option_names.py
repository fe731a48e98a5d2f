"""Names of options in messages: flags on the command line, arguments in Python. Imports no torch."""

import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from modelopt_cli.errors import ModeloptError

_FLAGS: ContextVar[bool] = ContextVar("flags", default=False)
_SWITCHES = {"evaluate": "eval"}
"""Arguments that are turned off by a flag of another name: ``evaluate=False`` is ``--no-eval``."""
_RENAMED = {
    "--no-eval": "evaluate=False",
    "--force": "force=True",
    "--resume": "resume=True",
    "--set": "settings",
}
"""Options that are written otherwise in Python."""

_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")


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


def in_python(text: str) -> str:
    """A message with the names of arguments in place of the command line's options."""
    return _FLAG.sub(lambda flag: _RENAMED.get(flag[0], flag[0][2:].replace("-", "_")), text)


def as_read(text: str) -> str:
    """A recorded text, which names flags in every file, as the reader of a message writes options.

    Example:
        >>> as_read("not matched by --include")
        'not matched by include'
        >>> with naming_flags():
        ...     as_read("not matched by --include")
        'not matched by --include'
    """
    return text if _FLAGS.get() else in_python(text)


@contextmanager
def naming_arguments() -> Iterator[None]:
    """Errors raised within name arguments instead of options."""
    try:
        yield
    except BaseException as error:  # Ctrl-C included, which a note may say more of
        rephrase(error, in_python)
        raise


def rephrase(error: BaseException, change: Callable[[str], str]) -> None:
    """Change the words of an error, and of the notes on it."""
    if isinstance(error, ModeloptError):
        error.message = change(error.message)
        error.where = error.where and change(error.where)
        error.hint = error.hint and change(error.hint)
        error.args = (error.message,)
    if notes := getattr(error, "__notes__", None):
        error.__notes__ = [change(note) for note in notes]
