"""The form of a command: its parameters, and the work that it returns.

It takes a console, single options and whole configs, each option declared once by ``settings.Setting``. Their
texts, from the command line or the environment, are read and checked together before the command is called.
It returns the work that is then to be done, so that a command line can be checked without doing anything, as
a recipe's are.
"""

import dataclasses
import inspect
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from inspect import Parameter
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from modelopt_cli.cli.console import Console
from modelopt_cli.cli.typer_options import VERBOSE, key_of, parameter_of
from modelopt_cli.cli.values import Reader
from modelopt_cli.errors import UsageError
from modelopt_cli.settings import Config, Field, Setting, field_of, fields_of, nearest

Work = Callable[[], None]
"""The rest of a command, once its options are known to be good."""
Command = Callable[..., Work | None]
"""``function(console, ..., config: SomeConfig, single: Annotated[T, Setting(...)])``; None if it is done."""

PREFIX = "MODELOPT"
"""Environment variables are ``MODELOPT_COMMAND_OPTION``."""
_OLDER = "_older"  # ends the name of the hidden parameter with an option's older spellings


@dataclass(frozen=True)
class Display(Config, title="Output"):
    """Options on what a command prints, which all commands have."""

    quiet: Annotated[bool, Setting("Say nothing on stderr but errors.", flags=("-q", "--quiet"))] = False
    debug: Annotated[bool, Setting("Show the traceback of an error.")] = False
    json: Annotated[bool, Setting("Print the result as one JSON object.")] = False


class Signature:
    """The options of a command, and the arguments that they become.

    Attributes:
        verb: the command's name.
        fields: the options by the name of the parameter that typer knows them by.
    """

    def __init__(self, verb: str, function: Command) -> None:
        self.verb = verb
        self.fields: dict[str, Field] = {}
        self._configs: dict[str, type[Any]] = {}
        self._singles: dict[str, str] = {}
        self._others: list[Parameter] = []
        self._order: list[Parameter | str] = []
        for parameter in list(inspect.signature(function).parameters.values())[1:]:
            self._add(parameter)
        self._add(Parameter("display", Parameter.KEYWORD_ONLY, annotation=Display))

    @property
    def budgets(self) -> set[str]:
        """Names of options of other configs that a config holds, too: limits that are a method's budget."""
        return {
            field.name
            for config in self._configs.values()
            for field in dataclasses.fields(config)
            if field.name in self.fields and field.name not in map(key_of, fields_of(config))
        }

    def _add(self, parameter: Parameter) -> None:
        annotation = parameter.annotation
        if isinstance(annotation, type) and issubclass(annotation, Config):
            self._configs[parameter.name] = annotation
            for field in fields_of(annotation):
                self._add_field(field)
        elif (single := field_of(parameter.name, annotation, parameter.default)) is not None:
            self._singles[parameter.name] = key_of(single)
            self._add_field(single)
        elif parameter.name != "context":
            self._add_other(parameter.replace(kind=Parameter.KEYWORD_ONLY))

    def _add_field(self, field: Field) -> None:
        self.fields[key_of(field)] = field
        self._order.append(key_of(field))

    def _add_other(self, parameter: Parameter) -> None:
        self._others.append(parameter)
        self._order.append(parameter)

    def spellings(self) -> dict[str, Field]:
        """The options by everything that they may be called; what is current goes before what is older."""
        fields = self.fields.values()
        current = {flag: field for field in fields for flag in field.spellings}
        return {flag: field for field in fields for flag in field.older} | current

    def parameters(self) -> list[Parameter]:
        """Arguments and options as typer takes them, with hidden ones for older spellings."""
        options: list[Parameter] = []
        known = self.spellings()
        for each in self._order:
            if isinstance(each, Parameter):
                options.append(each)
                continue
            field = self.fields[each]
            options.append(parameter_of(each, field, field.spellings))
            if older := tuple(flag for flag in field.setting.older if known[flag.partition("/")[0]] is field):
                options.append(parameter_of(each + _OLDER, field, older, hidden=True))
        everything = Parameter("help_all", Parameter.KEYWORD_ONLY, default=False, annotation=HelpAll)
        return [*options, VERBOSE, everything]

    def arguments(self, texts: dict[str, Any], *, environment: bool, notes: list[str]) -> dict[str, Any]:
        """The function's arguments, made of the texts of its options.

        Args:
            texts: as typer has found them; None where an option was not given.
            environment: look there for options that were not given.
            notes: older spellings are noted there.

        Raises:
            UsageError: with all that is wrong.
        """
        reader, values = Reader(), dict(texts)
        for key, field in self.fields.items():
            text, older = texts.get(key), texts.get(key + _OLDER)
            if not _missing(older):
                former = field.setting.older[0]
                reader.check(
                    _missing(text), former, f"is the older name of {field.flag}; give one of the two"
                )
                notes.append(f"{former} is now {field.flag}; the next version takes only that")
            values[key] = self._value(reader, field, older if _missing(text) else text, environment)
        reader.finish()
        arguments = {parameter.name: values[parameter.name] for parameter in self._others}
        arguments |= {name: values[key] for name, key in self._singles.items()}
        for name, config in self._configs.items():
            try:
                arguments[name] = config(**{field.name: values[key_of(field)] for field in fields_of(config)})
            except UsageError as error:
                reader.note(str(error))
        reader.finish()
        return arguments

    def _value(self, reader: Reader, field: Field, text: Any, environment: bool) -> Any:
        where = field.flag
        if _missing(text) and environment:
            where = next((name for name in self.variables(field) if os.environ.get(name)), where)
            text = os.environ.get(where)
            text = shlex.split(text) if text and field.several else text
        if _missing(text):
            return field.initial
        if isinstance(text, bool):
            return text
        if field.several:
            return tuple(reader.read(where, part, field.read) for part in text)
        return reader.read(where, text, field.read)

    def variables(self, field: Field) -> list[str]:
        """The environment variables of an option; the first one counts."""
        name = key_of(field).upper()
        return [f"{PREFIX}_{self.verb.upper()}_{name}", *([f"{PREFIX}_{name}"] * field.setting.shared)]


def flatten(verb: str, function: Command) -> Command:
    """Make ``function`` a command with one option for each field of its configs.

    Every command also gets ``-q -v --debug --json``, which set up the console it is handed. One with a
    parameter ``context`` is handed typer's.
    """
    own = Signature(verb, function)
    given_context = "context" in inspect.signature(function).parameters

    def call(ctx: typer.Context, **values: Any) -> Work | None:
        console: Console = ctx.obj
        console.verbosity, notes = values.pop("verbose"), list[str]()
        del values["help_all"]
        # A step of a recipe, which has no parent here, is what the recipe says.
        arguments = own.arguments(values, environment=ctx.parent is not None, notes=notes)
        display: Display = arguments.pop("display")
        console.quiet, console.debug, console.json = display.quiet, display.debug, display.json
        for note in notes:
            console.note(note)
        if given_context:
            arguments["context"] = ctx
        with stdout_is_for_results():
            return function(console, **arguments)

    context = Parameter("ctx", Parameter.KEYWORD_ONLY, annotation=typer.Context)
    parameters = [context, *own.parameters()]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    call.__doc__ = function.__doc__
    call.signature = own  # type: ignore[attr-defined]
    return call


def signature_of(command: Any) -> Signature:
    """The signature of a command of typer's."""
    signature: Signature = command.callback.signature
    return signature


def nearest_option(command: Any, word: str) -> str | None:
    """The option of a command of typer's that is most like a word, as it is spelled today."""
    known = {
        flag: flag
        for parameter in command.params
        if not getattr(parameter, "hidden", False)
        for flag in (*parameter.opts, *parameter.secondary_opts)
    }
    if (signature := getattr(command.callback, "signature", None)) is not None:
        known = {flag: field.current(flag) for flag, field in signature.spellings().items()} | known
    near = nearest(word, known)
    return None if near is None else known[near]


@contextmanager
def stdout_is_for_results() -> Iterator[None]:
    """The console holds the real stdout; what the user's own code or a library prints is no result."""
    with redirect_stdout(sys.stderr):
        yield


def _missing(text: Any) -> bool:
    return text is None or text == [] or text == ()


def _show_all(ctx: typer.Context, wanted: bool) -> None:
    """Print the help of a command with its advanced options; of the root, that of all commands."""
    if not wanted or ctx.resilient_parsing:
        return
    ctx.meta[_ALL] = True
    commands = getattr(ctx.command, "commands", {}).items()
    below = [each.make_context(name, [], parent=ctx, resilient_parsing=True) for name, each in commands]
    typer.echo("\n\n".join(each.get_help() for each in (ctx, *below)))
    raise typer.Exit


_ALL = "modelopt.all"  # in a context's meta: show the advanced options, too
HelpAll = Annotated[
    bool, typer.Option("--help-all", callback=_show_all, is_eager=True, help="Show all options and exit.")
]
"""The parameter of a command, or of the root, that shows all help there is."""


class GroupedCommand(TyperCommand):
    """Prints the options in the groups their ``rich_help_panel`` names, in plain text."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write one section for each group."""
        everything = ctx.meta.get(_ALL, False)
        for title, records in self.sections(ctx, everything=everything).items():
            with formatter.section(title):
                formatter.write_dl(records)
        more = sum(field.setting.advanced for field in signature_of(self).fields.values())
        if more and not everything:
            formatter.write_paragraph()
            formatter.write_text(f"{more} more options: {ctx.command_path} --help-all")

    def sections(self, ctx: Any, *, everything: bool) -> dict[str, list[tuple[str, str]]]:
        """Each option as it is written and its help, by group, in order of first appearance.

        Args:
            ctx: of the command.
            everything: with the advanced options.
        """
        sections: dict[str, list[tuple[str, str]]] = {}
        fields = signature_of(self).fields
        for parameter in self.get_params(ctx):
            is_argument = parameter.param_type_name == "argument"
            title = "Arguments" if is_argument else getattr(parameter, "rich_help_panel", None) or "Options"
            hidden = parameter.name in fields and fields[parameter.name].setting.advanced and not everything
            if not hidden and (record := parameter.get_help_record(ctx)):
                name = record[0].partition(" <")[0] if is_argument else record[0]  # typer appends a type
                sections.setdefault(title, []).append((name, record[1]))
        return sections
