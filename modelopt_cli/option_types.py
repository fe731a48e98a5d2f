"""Declared types of options and arguments, and complaints about values that are of another."""

import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from modelopt_cli.errors import UsageError, a_or_an
from modelopt_cli.option_values import did_you_mean

_LONGEST = 60
_WORDS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    str: "a text",
    bool: "True or False",
    Path: "a path",
    PathLike: "a path",
    Mapping: "a mapping",
    Sequence: "a list",
    Iterable: "a list",
    type(None): "None",
}
_SEVERAL = {int: "integers", float: "numbers", str: "texts"}


def as_python(value: Any) -> Any:
    """The numbers of a small NumPy array or tensor as Python's own, and a torch device as its name."""
    if type(value).__module__ == "torch" and type(value).__name__ == "device":
        return str(value)
    if getattr(value, "ndim", 2) > 1 or not hasattr(value, "tolist"):
        return value
    try:
        return value.tolist()
    except RuntimeError:  # a tensor without values, on the meta device
        return value


def converted(value: Any, kind: Any) -> Any:
    """A value as its declared type has it, where something else stands for it: a list for a tuple, say."""
    if is_of_type(value, kind):
        return value
    value = as_python(value)
    return tuple(value) if isinstance(value, list) and is_of_type(tuple(value), kind) else value


def require_declared(record: Any) -> None:
    """Settle the fields of a new dataclass, frozen or not.

    Raises:
        UsageError: one is of another type than the declared one.
    """
    declared: Any = type(record)
    for name, kind in _types_of(declared).items():
        object.__setattr__(record, name, value := converted(getattr(record, name), kind))
        if (problem := not_of_type(value, kind)) is not None:
            raise UsageError(problem, where=name)


@cache
def _types_of(record: Any) -> dict[str, Any]:
    return get_type_hints(record)


def is_of_type(value: Any, kind: Any) -> bool:
    """True if a value is of a declared type."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(is_of_type(value, arg) for arg in args)
    if origin is Literal:
        return isinstance(value, str | int) and value in args
    if origin is tuple:
        inner = args[:1] * len(value) if args[-1] is ... and isinstance(value, tuple) else args
        return isinstance(value, tuple) and len(value) == len(inner) and all(map(is_of_type, value, inner))
    if origin is Callable:
        return callable(value) and _takes(value, len(args[0]))
    if origin is not None:
        return isinstance(value, origin) and not isinstance(value, str)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _takes(function: Callable[..., Any], count: int) -> bool:
    """True if a function can be called with so many arguments, as far as it says."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # of some functions in C nobody knows
        return True
    return True


def not_of_type(value: Any, kind: Any) -> str | None:
    """The complaint about a value that is of another type than the declared one, or None."""
    if is_of_type(value, kind):
        return f"{value!r} is no name of a file" if _is_nameless(value, kind) else None
    problem = _odd_item(value, kind) or f"{_shown(value)} is not {type_in_words(kind)}"
    nearest = did_you_mean(value, map(str, _choices(kind))) if isinstance(value, str) else None
    return problem if nearest is None else f"{problem}; {nearest}"


def _odd_item(value: Any, kind: Any) -> str | None:
    """The complaint about the first item of a list that is of another type than the others should be."""
    item_kind, *more = get_args(kind) if get_origin(kind) is tuple else (None,)
    if more != [...] or not isinstance(value, list | tuple):
        return None
    odd = next((item for item in value if not is_of_type(item, item_kind)), None)
    return f"holds {_shown(odd)}, which is not {type_in_words(item_kind)}"


def _is_nameless(value: Any, kind: Any) -> bool:
    """True of a path that no file can have."""
    of_paths = any(get_origin(each) is PathLike for each in get_args(kind))
    if not of_paths or not isinstance(value, str | PathLike):
        return False
    return fspath(value) == "" or "\0" in fspath(value)


def _choices(kind: Any) -> Iterator[Any]:
    """The values of a literal, or of those in a union."""
    if get_origin(kind) is Literal:
        yield from get_args(kind)
    if get_origin(kind) in (Union, types.UnionType):
        for arg in get_args(kind):
            yield from _choices(arg)


def _shown(value: Any) -> str:
    """A plain value as Python writes it; of another, or of a long one, its type."""
    if isinstance(value, str | bytes | int | float | list | tuple | dict | None):
        text = repr(value)
        if len(text) <= _LONGEST and text.isprintable():
            return text
    return a_or_an(type(value).__name__)


def type_in_words(kind: Any) -> str:
    """A declared type in a complaint, such as ``an integer or a text``; that it may be None is not said."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _alternatives([arg for arg in args if arg is not type(None)])
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is tuple:
        several = _SEVERAL.get(args[0], "values")
        return f"a list of {several}" if args[-1] is ... else f"{len(args)} {several}"
    if origin is Callable:
        return f"a function of {len(args[0])} argument{'s' * (len(args[0]) != 1)}"
    known = _WORDS.get(origin or kind)
    if known is not None:
        return known
    package, _, inner = kind.__module__.partition(".")
    if package == "torch":
        return f"an nn.{kind.__name__}" if inner.startswith("nn.") else f"a torch.{kind.__name__}"
    return a_or_an(kind.__name__)


def _alternatives(kinds: Sequence[Any]) -> str:
    """Types joined by ``or``; a text that names a file is no other than a path."""
    words = list(dict.fromkeys(map(type_in_words, kinds)))
    if "a path" in words and "a text" in words:
        words.remove("a text")
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
