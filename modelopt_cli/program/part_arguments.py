"""Arguments of a part of a network, as plain data, and its outputs in the network's own terms."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


class OtherArguments(Exception):
    """A part is called with other arguments than it was captured with."""


def described(
    arguments: Any, name_of: Callable[[tuple[str, ...], Tensor], str], place: tuple[str, ...] = ()
) -> Any:
    """Arguments as plain data: ``{"input": name}`` for a tensor, lists, ``{"dict": pairs}``, constants.

    Args:
        arguments: plain ones, in lists and dictionaries.
        name_of: names a tensor by its place.
        place: where they are.

    Raises:
        TypeError: there is something else among them.
    """
    if isinstance(arguments, Tensor):
        return {"input": name_of(place, arguments)}
    if isinstance(arguments, Mapping):
        if not all(isinstance(key, str) for key in arguments):
            raise TypeError("a dictionary whose keys are no names")
        return {"dict": [[key, described(each, name_of, (*place, key))] for key, each in arguments.items()]}
    if isinstance(arguments, list | tuple):
        return [described(each, name_of, (*place, str(i))) for i, each in enumerate(arguments)]
    if arguments is None or type(arguments) in (bool, int, float, str):
        return arguments
    raise TypeError(f"a {type(arguments).__name__}")


def matched(pattern: Any, arguments: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors among arguments, by the names that a description gives them.

    Raises:
        OtherArguments: they are others than it describes.
    """
    if isinstance(pattern, dict) and "input" in pattern:
        if not isinstance(arguments, Tensor):
            raise OtherArguments(f"{pattern['input']} is no tensor")
        yield pattern["input"], arguments
    elif isinstance(pattern, dict):
        pairs = pattern["dict"]
        if not isinstance(arguments, Mapping) or [key for key, _ in pairs] != list(arguments):
            raise OtherArguments("it has other names")
        for key, each in pairs:
            yield from matched(each, arguments[key])
    elif isinstance(pattern, list):
        if not isinstance(arguments, list | tuple) or len(arguments) != len(pattern):
            raise OtherArguments("it has another number of values")
        for each, argument in zip(pattern, arguments, strict=True):
            yield from matched(each, argument)
    elif type(arguments) is not type(pattern) or arguments != pattern:
        raise OtherArguments(f"a value of {pattern!r} is another one")


class _Fields(OrderedDict[str, Any]):
    """A dictionary of outputs whose values are attributes, too, as in those that models return."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def as_returned(outputs: Any) -> Any:
    """Outputs of a graph in containers like those of the submodule itself."""
    if isinstance(outputs, Mapping):
        return _Fields((key, as_returned(value)) for key, value in outputs.items())
    if isinstance(outputs, tuple):
        return tuple(map(as_returned, outputs))
    return list(map(as_returned, outputs)) if isinstance(outputs, list) else outputs
