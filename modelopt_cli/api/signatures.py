"""Calls of public functions: arguments that the function has, each of a type that it takes."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from inspect import Parameter
from typing import Any, ParamSpec, TypeVar, get_type_hints

from modelopt_cli import option_types
from modelopt_cli.errors import UsageError
from modelopt_cli.option_names import naming_arguments
from modelopt_cli.settings import did_you_mean

P = ParamSpec("P")
R = TypeVar("R")


class WrongCall(UsageError, TypeError):
    """A call that a signature does not allow: an argument too many, too few, or of another name."""


@dataclass(frozen=True)
class Instead:
    """The next step where an argument is of a wrong type; it stands in ``Annotated`` next to the type.

    Attributes:
        hint: what to give.
    """

    hint: str


@dataclass(frozen=True)
class Own:
    """The parameters that stand in the definition of a public function.

    Attributes:
        verb: name of the function.
        parameters: by name, in order.
        unknown: next step where an argument is unknown and like no other; ``{}`` stands for its name.
    """

    verb: str
    parameters: Mapping[str, Parameter]
    unknown: str

    @classmethod
    def of(cls, function: Callable[..., Any], unknown: str | None = None, skip: int = 0) -> "Own":
        """The parameters of a function, but for the first ``skip``."""
        listed = list(inspect.signature(function).parameters.values())[skip:]
        hints = get_type_hints(function, include_extras=True)
        known = {each.name: each.replace(annotation=hints[each.name]) for each in listed}
        name = function.__name__
        return cls(name, known, unknown or f"help(modelopt_cli.{name}) lists them")

    def take(
        self, positional: tuple[Any, ...], keywords: Mapping[str, Any], further_names: Iterable[str] = ()
    ) -> dict[str, Any]:
        """The arguments of a call by name.

        Args:
            positional: without names.
            keywords: by name.
            further_names: names that the function takes besides, which are left alone.

        Raises:
            WrongCall: one is unknown, missing or given twice, or there are too many.
            UsageError: one is of a type that the function does not take.
        """
        self._require_known(keywords, further_names)
        unnamed = [each.name for each in self.parameters.values() if each.kind != Parameter.KEYWORD_ONLY]
        if len(positional) > len(unnamed):
            only = " and ".join(unnamed)
            problem = f"{self.verb} takes only {only} without a name, not {len(positional)} arguments"
            raise WrongCall(problem, hint="write the others as name=value")
        values = dict(zip(unnamed, positional, strict=False))
        for name in self.parameters:
            if name in values and name in keywords:
                raise WrongCall(f"{self.verb} has been given {name} twice", hint="leave one of them out")
        values |= {name: value for name, value in keywords.items() if name in self.parameters}
        for name, parameter in self.parameters.items():
            if name not in values and parameter.default is Parameter.empty:
                raise WrongCall(f"{self.verb} needs {name}", hint=f"call {self.verb}({name}=...)")
        return {
            name: converted(name, value, self.parameters[name].annotation) for name, value in values.items()
        }

    def _require_known(self, keywords: Iterable[str], further_names: Iterable[str]) -> None:
        known = [*self.parameters, *further_names]
        for name in keywords:
            if name not in known:
                hint = did_you_mean(name, known) or self.unknown.format(name)
                raise WrongCall(f"{self.verb} has no argument {name!r}", hint=hint)

    def shown(self) -> list[Parameter]:
        """The parameters for a signature, their types alone."""
        return [each.replace(annotation=without_notes(each.annotation)) for each in self.parameters.values()]


def public(unknown: str | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Refuse a call that a function cannot take in one line, and let errors name arguments.

    Args:
        unknown: next step where an argument is unknown and like no other; ``{}`` stands for its name.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        own = Own.of(function, unknown)

        @functools.wraps(function)
        def call(*positional: P.args, **keywords: P.kwargs) -> R:
            with naming_arguments():
                return function(**own.take(positional, keywords))  # type: ignore[call-arg]

        returned = get_type_hints(function).get("return")
        call.__signature__ = inspect.Signature(own.shown(), return_annotation=returned)  # type: ignore[attr-defined]
        return call

    return decorate


def converted(name: str, value: Any, annotation: Any) -> Any:
    """The value of an argument, once it is known to be of its type.

    Args:
        name: of the argument.
        value: a list may stand for a tuple, and a number of NumPy or torch for Python's own.
        annotation: its type, with an :class:`Instead` or without.

    Raises:
        UsageError: the value is of another type.
    """
    kind = without_notes(annotation)
    value = option_types.converted(value, kind)
    if (problem := option_types.not_of_type(value, kind)) is not None:
        notes = getattr(annotation, "__metadata__", ())
        hint = next((note.hint for note in notes if isinstance(note, Instead)), None)
        raise UsageError(problem, where=name, hint=hint)
    return value


def without_notes(annotation: Any) -> Any:
    """A type without its notes."""
    return (
        getattr(annotation, "__origin__", annotation) if hasattr(annotation, "__metadata__") else annotation
    )
