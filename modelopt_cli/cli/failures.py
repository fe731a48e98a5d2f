"""The one exception table: what ends a run, the exit code it means, and the line that says so.

0    done
1    a gate was not met                       GateNotMet
2    usage, config or input file              InputError, typer's own usage errors
3    space, memory, permission, package       EnvironmentFailure, MemoryError, some OSErrors,
                                              and an InputError that arose from one of these
4    a bug of ours                            everything else
130  SIGINT    143  SIGTERM    141  closed pipe
"""

import errno
from dataclasses import dataclass, replace
from typing import Any

from typer.exceptions import TyperException

from modelopt_cli.cli.groups import nearest_option
from modelopt_cli.errors import InputError, ModeloptError

_ENVIRONMENT = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ENOSPC,
    errno.EPERM,
    errno.EROFS,
}
_OUT_OF_MEMORY = ("out of memory", None, "use smaller batches, with --batch-size or --data-batch-size")


class Terminated(BaseException):
    """SIGTERM arrived. Raised where the program stood, so that every cleanup runs."""


@dataclass(frozen=True)
class Failure:
    """The end of a run that failed.

    Attributes:
        exit_code: of the process.
        message: what happened; None where nobody would read it.
        where: the file, layer or option it happened in.
        hint: what to do next.
        notes: what a verb has added, how to go on say.
    """

    exit_code: int
    message: str | None
    where: str | None = None
    hint: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def line(self) -> str | None:
        """All of it for stderr, or None."""
        if self.message is None:
            return None
        told = f"{self.where}: {self.message}" if self.where else self.message
        return "; ".join(filter(None, (told, self.hint, *self.notes)))

    def as_json(self) -> dict[str, Any]:
        """The object that takes the place of a result under ``--json``."""
        texts = {"what": self.message, "where": self.where, "hint": self.hint}
        error = {name: text and _text(text) for name, text in texts.items()}
        return {
            "schema_version": 1,
            "error": {"exit": self.exit_code, **error, "notes": [_text(note) for note in self.notes]},
        }


def explain(error: BaseException) -> Failure:
    """Look ``error`` up in the table above; what a verb has noted on it follows."""
    return replace(_look_up(error), notes=tuple(getattr(error, "__notes__", ())))


def _look_up(error: BaseException) -> Failure:
    match error:
        case InputError() if _refused_by_machine(error):
            return Failure(3, error.message, error.where, error.hint)
        case ModeloptError():
            return Failure(error.exit_code, error.message, error.where, error.hint)
        case TyperException():
            return Failure(2, *_usage(error))
        case KeyboardInterrupt():
            return Failure(130, "interrupted")
        case Terminated():
            return Failure(143, "terminated")
        case BrokenPipeError():
            return Failure(141, None)
        case MemoryError():
            return Failure(3, *_OUT_OF_MEMORY)
        case OSError() if error.errno in _ENVIRONMENT:
            return Failure(3, _os_line(error))
        case RuntimeError() if _torch_out_of_memory(error):
            return Failure(3, *_OUT_OF_MEMORY)
        case SystemExit():
            return Failure(2, "the code that --arch or --data names ended the program")
    return Failure(4, _bug_line(error), None, "this is a bug in modelopt, --debug shows the traceback")


def _refused_by_machine(error: InputError) -> bool:
    """True if the operating system refused to give the input: permission, memory, a failing disk."""
    cause = error.__cause__ or error.__context__
    return isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno in _ENVIRONMENT)


def _usage(error: TyperException) -> tuple[str, None, str | None]:
    """The fault of a command line, no place, and a hint: the nearest option there is."""
    if type(error).__name__ == "NoSuchOption":
        name, context = str(getattr(error, "option_name", "")), getattr(error, "ctx", None)
        near = None if context is None else nearest_option(context.command, name)
        return f"unknown option {name}", None, near and f"did you mean {near}?"
    message = error.format_message().rstrip(".").partition(", unable to parse")[0]
    message = message.replace("Value error, ", "")  # pydantic's, before what a parser of ours says
    return message[:1].lower() + message[1:], None, None


def _os_line(error: OSError) -> str:
    reason = (error.strerror or str(error)).lower()
    return f"{error.filename}: {reason}" if error.filename else reason


def _torch_out_of_memory(error: RuntimeError) -> bool:
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: " in text:
        return True
    return text == "could not create a primitive"  # oneDNN's whole word on memory it did not get


def _bug_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _text(text: str) -> str:
    """The text in a form that UTF-8 can encode: a path may hold bytes that are not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()
