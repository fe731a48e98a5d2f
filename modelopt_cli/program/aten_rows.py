"""The form of a row that says how an ATen operator is written in the normal form's terms."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import fx

Arguments = dict[str, Any]


class Writer(Protocol):
    """Interface by which rows write nodes."""

    @property
    def source(self) -> fx.Node:
        """The network's first input."""

    def call(self, name: str, /, **named: Any) -> Any:
        """A call of an operation on the allow-list."""


Row = Callable[[Writer, Arguments], Any]


def renamed(name: str, **names: str) -> Row:
    """The same arguments, some under other names, to another operation."""

    def row(write: Writer, arguments: Arguments) -> Any:
        return write.call(name, **{names.get(key, key): value for key, value in arguments.items()})

    return row
