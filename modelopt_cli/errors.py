"""Every error modelopt raises on purpose, and the exit code each one means.

    ModeloptError                    4  a bug of ours, unless a subclass says otherwise
    ├── GateNotMet                   1  a gate failed: accuracy, size, speed or coverage
    │   └── NothingCompressed        1  the method would not have touched a single layer
    ├── BrokenResult                 4  what a method made does not do what it was made from
    ├── InputError                   2  what the user gave cannot be used
    │   ├── UsageError               2  an option, its value, a layer glob
    │   ├── CheckpointError          2  a file that others wrote and we cannot read
    │   ├── ArtifactError            2  a file in our format that is damaged or not ours
    │   ├── ArchitectureError        2  --arch, recognition, or weights that do not fit it
    │   ├── CaptureError             2  a network that cannot become a Program
    │   ├── DataError                2  a --data spec or what it points to
    │   └── OutputError              2  an output path we must not write to
    └── EnvironmentFailure           3  space, memory, permission, a missing optional package

An error is one line: what happened, where, and what to do next.
"""


class ModeloptError(Exception):
    """Base of the tree.

    Args:
        message: what happened, without a full stop.
        where: the file, layer or option it happened in.
        hint: what to do next.
    """

    exit_code = 4

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        line = f"{self.where}: {self.message}" if self.where else self.message
        return f"{line}; {self.hint}" if self.hint else line


class GateNotMet(ModeloptError):
    """A limit the user set was not reached."""

    exit_code = 1


class NothingCompressed(GateNotMet):
    """The method would have changed nothing."""


class BrokenResult(ModeloptError):
    """A method made a network that fails, or whose outputs have lost their form or their finiteness."""

    def __init__(self, message: str, *, where: str | None = None) -> None:
        super().__init__(message, where=where, hint="nothing was written; this is a bug in modelopt")


class InputError(ModeloptError):
    """Something the user gave cannot be used."""

    exit_code = 2


class UsageError(InputError):
    """An option, an option's value, a config key or a layer glob is wrong."""


class GraphNeeded(UsageError):
    """A choice works on the graph of a network, or on its layers, and there is none."""


class CheckpointError(InputError):
    """A checkpoint written by another tool cannot be read."""


class ArtifactError(InputError):
    """A modelopt file is damaged, truncated, of another version, or not ours."""


class ArchitectureError(InputError):
    """The architecture is unknown, or the weights do not fit it."""


class CaptureError(InputError):
    """The network cannot be represented as a Program."""


class DataError(InputError):
    """A data spec is malformed, or what it points to is empty or unreadable."""


class OutputError(InputError):
    """The output path is not a place where a file may be written."""


class EnvironmentFailure(ModeloptError):
    """The machine lacks space, memory, a permission or an optional package."""

    exit_code = 3


def a_or_an(word: str) -> str:
    """``a Linear``, ``an argparse.Namespace``: a word after its article, chosen by its first letter."""
    return f"an {word}" if word[:1].lower() in tuple("aeio") else f"a {word}"
