"""How a command is written: what it takes, and what it returns.

It takes a console, single options, and groups of options: frozen dataclasses whose every field typer sees
as an option of its own. It reads and checks them all, and returns the work that is then to be done. So a
command line can be checked without doing anything, as a recipe's are.
"""

import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import MISSING, fields, is_dataclass
from inspect import Parameter
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand

from modelopt_cli.cli.console import Console

QUIET = typer.Option("-q", "--quiet", help="Say nothing on stderr but errors.", rich_help_panel="Output")
VERBOSE = typer.Option(
    "-v",
    "--verbose",
    count=True,
    show_default=False,
    help="Tell more on stderr, layer by layer.",
    rich_help_panel="Output",
)
DEBUG = typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel="Output")
JSON = typer.Option("--json", help="Print the result as one JSON object.", rich_help_panel="Output")


Work = Callable[[], None]
"""What a command does once its options are known to be good."""
Command = Callable[..., Work | None]
"""``function(console, ..., group: SomeDataclass, ...)``; None if it is done already."""


def flatten(function: Command) -> Command:
    """Make ``function`` a command with one option for each field of its groups.

    Every command also gets ``-q -v --debug --json``, which set up the console it is handed. One with a
    parameter ``context`` is handed typer's.
    """
    signature = inspect.signature(function)
    groups: dict[str, Any] = {
        name: p.annotation for name, p in signature.parameters.items() if is_dataclass(p.annotation)
    }

    def call(ctx: typer.Context, **values: Any) -> Work | None:
        console: Console = ctx.obj
        console.quiet, console.verbosity = values.pop("quiet"), values.pop("verbose")
        console.debug, console.json = values.pop("debug"), values.pop("json")
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        if "context" in signature.parameters:
            values["context"] = ctx
        with stdout_is_for_results():
            return function(console, **values)

    own = [Parameter("ctx", Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    for parameter in list(signature.parameters.values())[1:]:
        if parameter.name in groups:
            own.extend(_parameters(parameter.annotation))
        elif parameter.name != "context":
            own.append(parameter.replace(kind=Parameter.KEYWORD_ONLY))
    for info in itertools.chain.from_iterable(getattr(p.annotation, "__metadata__", ()) for p in own):
        info.readable = False  # a missing permission is no usage error: whoever opens the file tells
    call.__signature__ = signature.replace(parameters=own + _DISPLAY)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in own + _DISPLAY}
    call.__doc__ = function.__doc__
    return call


@contextmanager
def stdout_is_for_results() -> Iterator[None]:
    """The console holds the real stdout; what the user's own code or a library prints is no result."""
    with redirect_stdout(sys.stderr):
        yield


def _parameters(group: type) -> list[Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]


_DISPLAY = [
    Parameter("quiet", Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, QUIET]),
    Parameter("verbose", Parameter.KEYWORD_ONLY, default=0, annotation=Annotated[int, VERBOSE]),
    Parameter("debug", Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, DEBUG]),
    Parameter("json", Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, JSON]),
]


class GroupedCommand(TyperCommand):
    """Prints the options in the groups their ``rich_help_panel`` names, in plain text."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write one section for each group."""
        for title, records in self.sections(ctx).items():
            with formatter.section(title):
                formatter.write_dl(records)

    def sections(self, ctx: Any) -> dict[str, list[tuple[str, str]]]:
        """Each option as it is written and its help, by group, in order of first appearance."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            is_argument = parameter.param_type_name == "argument"
            title = "Arguments" if is_argument else getattr(parameter, "rich_help_panel", None) or "Options"
            if record := parameter.get_help_record(ctx):
                name = record[0].partition(" <")[0] if is_argument else record[0]  # typer appends a type
                sections.setdefault(title, []).append((name, record[1]))
        return sections
