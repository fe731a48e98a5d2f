"""Options as typer takes them, made from their declarations."""

from dataclasses import MISSING
from inspect import Parameter
from typing import Annotated, Any

import typer

from modelopt_cli.cli.completion import completion
from modelopt_cli.settings import Field


def parameter_of(key: str, field: Field, flags: tuple[str, ...], hidden: bool = False) -> Parameter:
    """An option as typer takes it: of texts, or a flag; None where it is not given."""
    kind: Any = bool if field.type is bool else list[str] if field.several else str
    if field.negatable and not hidden:
        flags = ("/".join(flags),)
    complete = completion(field)
    option = typer.Option(
        *flags,
        autocompletion=complete,
        help=described(field),
        metavar=None if kind is bool else field.metavar,
        show_default=False,
        rich_help_panel=field.title,
        hidden=hidden,
    )
    required = field.initial is MISSING
    annotation = Annotated[kind if required else kind | None, option]  # type: ignore[valid-type]
    default = Parameter.empty if required else None
    return Parameter(key, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def described(field: Field) -> str:
    """The help of an option, with its default."""
    if field.setting.default is not None:
        return f"{field.setting.help} [default: {field.setting.default}]"
    if field.type is bool or field.initial in (None, MISSING, ()):
        return field.setting.help
    return f"{field.setting.help} [default: {field.initial}]"


def key_of(field: Field) -> str:
    """The name of the parameter that stands for an option."""
    return field.flag.removeprefix("--").replace("-", "_")


VERBOSE = Parameter(
    "verbose",
    Parameter.KEYWORD_ONLY,
    default=0,
    annotation=Annotated[
        int,
        typer.Option(
            "-v",
            "--verbose",
            count=True,
            show_default=False,
            help="Tell more on stderr, layer by layer.",
            rich_help_panel="Output",
        ),
    ],
)
