"""Keyword arguments of the Python API: the fields of the configs, by the names that the command line has."""

import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Concatenate, ParamSpec, TypeVar, get_type_hints

from modelopt_cli.errors import ModeloptError, UsageError
from modelopt_cli.settings import Config, did_you_mean, fields_of

P = ParamSpec("P")
R = TypeVar("R")

_RENAMED = {
    "--no-eval": "evaluate=False",
    "--force": "force=True",
    "--resume": "resume=True",
}
"""Options that are written otherwise in Python."""

_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")


class UnknownArgument(UsageError, TypeError):
    """A keyword that a function does not have."""


@dataclass(frozen=True)
class Argument:
    """A keyword argument that is a field of a config.

    Attributes:
        group: name of the config, which may be given as a whole, too.
        field: name of the field.
        annotation: type of its values.
        default: its value where it is not given.
        help: one sentence; empty where the config says it in its docstring.
    """

    group: str
    field: str
    annotation: Any
    default: Any
    help: str


def arguments_of(groups: Mapping[str, type[Any]], taken: Iterable[str] = ()) -> dict[str, Argument]:
    """Keyword arguments for the fields of configs, by name: that of the command line's option.

    Args:
        groups: the configs, by name; of two fields of one name the first counts.
        taken: names that are not to be used.
    """
    arguments: dict[str, Argument] = {}
    for group, config in groups.items():
        settings = {each.name: each for each in fields_of(config)} if issubclass(config, Config) else {}
        hints, noted = get_type_hints(config), get_type_hints(config, include_extras=True)
        for each in fields(config):
            setting = settings.get(each.name)
            name = each.name if setting is None else setting.flag.lstrip("-").replace("-", "_")
            text = _help(noted[each.name]) if setting is None else setting.setting.help
            if name not in taken:
                found = Argument(group, each.name, hints[each.name], each.default, text)
                first = arguments.setdefault(name, found)
                arguments[name] = first if first.help else replace(first, help=text)
    return arguments


def _help(annotation: Any) -> str:
    notes = getattr(annotation, "__metadata__", ())
    return next((note for note in notes if isinstance(note, str)), "")


def configured(
    groups: Mapping[str, type[Any]], hidden: Iterable[str] = ()
) -> Callable[[Callable[Concatenate[dict[str, Any], P], R]], Callable[..., R]]:
    """Let a function take the fields of configs as keywords; its first argument is then the configs, by name.

    The signature and the docstring of the function show them.

    Args:
        groups: the configs, by name.
        hidden: fields that are no arguments.
    """

    def decorate(function: Callable[Concatenate[dict[str, Any], P], R]) -> Callable[..., R]:
        own = list(inspect.signature(function).parameters.values())[1:]
        names = [parameter.name for parameter in own]
        known = arguments_of(groups, {*names, *hidden})

        @functools.wraps(function)
        def call(*given: Any, **keywords: Any) -> R:
            with naming_arguments():
                values = {name: keywords.pop(name) for name in names if name in keywords}
                configs = _configs(function.__name__, groups, known, names, keywords)
                return function(configs, *given, **values)

        call.__signature__ = _signature(function, own, known)  # type: ignore[attr-defined]
        call.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\n{_described(known)}"
        return call

    return decorate


def _configs(
    verb: str,
    groups: Mapping[str, type[Any]],
    known: Mapping[str, Argument],
    names: Iterable[str],
    keywords: Mapping[str, Any],
) -> dict[str, Any]:
    """The configs that keywords make; one that is given as a whole is what they change."""
    values: dict[str, dict[str, Any]] = {group: {} for group in groups}
    wholes: dict[str, Any] = {}
    for name, value in keywords.items():
        if name in groups and name not in known:
            wholes[name] = value
        elif name in known:
            each = known[name]
            values[each.group][each.field] = _settled(groups[each.group], each.field, value)
        else:
            hint = did_you_mean(name, [*known, *names])
            raise UnknownArgument(f"{verb} has no argument {name!r}", hint=hint)
    configs: dict[str, Any] = {}
    for group, config in groups.items():
        whole = wholes.get(group)
        configs[group] = config(**values[group]) if whole is None else replace(whole, **values[group])
    return configs


def _settled(config: type[Any], name: str, value: Any) -> Any:
    """A value as configs hold it; a text stands for what it does on the command line."""
    fields = fields_of(config) if issubclass(config, Config) else ()
    for field in fields:
        if field.name == name:
            return field.settled(value)
    return tuple(value) if isinstance(value, list) else value


def _signature(
    function: Callable[..., Any], own: list[inspect.Parameter], known: Mapping[str, Argument]
) -> inspect.Signature:
    keyword = inspect.Parameter.KEYWORD_ONLY
    more = [
        inspect.Parameter(name, keyword, default=each.default, annotation=each.annotation)
        for name, each in known.items()
    ]
    return inspect.Signature([*own, *more], return_annotation=get_type_hints(function).get("return"))


def _described(known: Mapping[str, Argument]) -> str:
    """A section of a docstring on the keywords that are fields of configs."""
    lines = ["Options:"]
    for name, each in known.items():
        if each.help:
            text = f"{name}: {in_python(each.help)} [{each.default!r}]"
            lines.append(textwrap.indent(textwrap.fill(text, 100, subsequent_indent="    "), "    "))
    return "\n".join(lines)


def in_python(text: str) -> str:
    """A message with the names of arguments in place of the command line's options."""
    return _FLAG.sub(lambda flag: _RENAMED.get(flag[0], flag[0][2:].replace("-", "_")), text)


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
