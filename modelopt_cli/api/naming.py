"""Errors, notes and help that name the arguments of functions instead of the command line's options."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from modelopt_cli.errors import ModeloptError
from modelopt_cli.option_names import in_python


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
