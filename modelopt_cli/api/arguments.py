"""Keyword arguments of the Python API: the fields of the configs, by the names that the command line has."""

import functools
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Concatenate, ParamSpec, TypeVar, get_type_hints

from modelopt_cli.api.signatures import Own, converted, without_notes
from modelopt_cli.errors import UsageError
from modelopt_cli.option_names import in_python, naming_arguments
from modelopt_cli.settings import Config, fields_of

P = ParamSpec("P")
R = TypeVar("R")
_NO_OTHERS: Mapping[str, type[Any]] = {}


@dataclass(frozen=True)
class Argument:
    """A keyword argument that is a field of a config.

    Attributes:
        group: name of the config, which may be given as a whole, too.
        field: name of the field.
        annotation: type of its values, with notes.
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
        hints = get_type_hints(config, include_extras=True)
        for each in fields(config):
            setting = settings.get(each.name)
            name = each.name if setting is None else setting.flag.lstrip("-").replace("-", "_")
            text = _help(hints[each.name]) if setting is None else setting.setting.help
            if name not in taken:
                argument = Argument(group, each.name, hints[each.name], each.default, text)
                first = arguments.setdefault(name, argument)
                arguments[name] = first if first.help else replace(first, help=text)
    return arguments


def _help(annotation: Any) -> str:
    notes = getattr(annotation, "__metadata__", ())
    return next((note for note in notes if isinstance(note, str)), "")


def configured(
    groups: Mapping[str, type[Any]], hidden: Iterable[str] = (), wholes: Mapping[str, type[Any]] = _NO_OTHERS
) -> Callable[[Callable[Concatenate[dict[str, Any], P], R]], Callable[..., R]]:
    """Let a function take the fields of configs as keywords; its first argument is then the configs, by name.

    The signature and the docstring of the function show them.

    Args:
        groups: the configs, by name.
        hidden: fields that are no arguments.
        wholes: what may be given in place of a config, by the config's name.
    """

    def decorate(function: Callable[Concatenate[dict[str, Any], P], R]) -> Callable[..., R]:
        own = Own.of(function, skip=1)
        known = arguments_of(groups, {*own.parameters, *hidden})

        @functools.wraps(function)
        def call(*positional: Any, **keywords: Any) -> R:
            with naming_arguments():
                values = own.take(positional, keywords, (*known, *groups))
                settings = {name: value for name, value in keywords.items() if name not in values}
                configs = _configs(groups, known, settings, wholes)
                return function(configs, **values)  # type: ignore[call-arg]

        returned = get_type_hints(function).get("return")
        parameters = [*own.shown(), *_keywords(known)]
        call.__signature__ = inspect.Signature(parameters, return_annotation=returned)  # type: ignore[attr-defined]
        call.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\n{_described(known)}"
        return call

    return decorate


def _configs(
    groups: Mapping[str, type[Any]],
    known: Mapping[str, Argument],
    keywords: Mapping[str, Any],
    wholes: Mapping[str, type[Any]],
) -> dict[str, Any]:
    """The configs that keywords make; one that is given as a whole is what they change."""
    values: dict[str, dict[str, Any]] = {group: {} for group in groups}
    configs: dict[str, Any] = {}
    for name, value in keywords.items():
        if name in known:
            each = known[name]
            values[each.group][each.field] = _converted(name, groups[each.group], each, value)
        elif value is not None:
            kind = wholes.get(name)
            taken = kind is not None and isinstance(value, kind)
            configs[name] = value if taken else converted(name, value, groups[name])
    for group, config in groups.items():
        configs[group] = _changed(group, configs.get(group), config, values[group])
    return configs


def _changed(group: str, base: Any, config: type[Any], values: dict[str, Any]) -> Any:
    """A config with these values, made of the whole one where there is one."""
    if base is None:
        return config(**values)
    if values and not isinstance(base, config):
        raise UsageError(f"cannot be given together with {', '.join(values)}", where=group)
    return replace(base, **values)


def _converted(name: str, config: type[Any], argument: Argument, value: Any) -> Any:
    """A value as configs hold it; a text stands for what it does on the command line."""
    declared = fields_of(config) if issubclass(config, Config) else ()
    setting = next((field for field in declared if field.name == argument.field), None)
    return converted(name, value, argument.annotation) if setting is None else setting.converted(value)


def _keywords(known: Mapping[str, Argument]) -> list[inspect.Parameter]:
    keyword = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(name, keyword, default=each.default, annotation=without_notes(each.annotation))
        for name, each in known.items()
    ]


def _described(known: Mapping[str, Argument]) -> str:
    """A section of a docstring on the keywords that are fields of configs."""
    lines = ["Options:"]
    for name, each in known.items():
        if each.help:
            text = f"{name}: {in_python(each.help)} [{each.default!r}]"
            lines.append(textwrap.indent(textwrap.fill(text, 100, subsequent_indent="    "), "    "))
    return "\n".join(lines)
