"""Wires the subcommands together, and maps every way a run can end to an exit code."""

import io
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from functools import cache
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup
from typer.main import get_command

from modelopt_cli import __version__
from modelopt_cli.cli import distill, env, eval, inspect, prune, quantize, share, train
from modelopt_cli.cli.completion import join_at_colons
from modelopt_cli.cli.console import Console
from modelopt_cli.cli.failures import Terminated, explain
from modelopt_cli.cli.groups import Command, GroupedCommand, HelpAll, flatten, stdout_is_for_results
from modelopt_cli.cli.run import run as run_recipe
from modelopt_cli.errors import UsageError
from modelopt_cli.settings import did_you_mean, naming_flags

COMMANDS: dict[str, Command] = {
    "train": train.train,
    "prune": prune.prune,
    "quantize": quantize.quantize,
    "share": share.share,
    "distill": distill.distill,
    "eval": eval.evaluate,
    "run": run_recipe,
    "inspect": inspect.inspect,
    "env": env.env,
}
COMPLETE = "_MODELOPT_COMPLETE"
"""Environment variable with which a shell asks for completions."""
_HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}


class CommandGroup(TyperGroup):
    """Says which command was probably meant, and ends as every command does."""

    def make_context(self, *args: Any, **settings: Any) -> Any:
        """Read the command line; raises typer.Exit where an option of typer's own ends the process."""
        try:
            return super().make_context(*args, **settings)
        except SystemExit:  # --show-completion has shown it
            raise typer.Exit from None
        except typer.Exit as ended:  # typer has said why it does not know the shell
            raise typer.Exit(3 if ended.exit_code else 0) from None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command ``args`` begins with; raises UsageError."""
        known = args[0] in self.commands or args[0].startswith("-")
        if not known and not ctx.resilient_parsing:  # a shell completes after "help", too
            hint = did_you_mean(args[0], self.commands) or f"commands are {', '.join(self.commands)}"
            raise UsageError(f"unknown command '{args[0]}'", hint=hint)
        return super().resolve_command(ctx, args)


class BuiltCommands(Mapping[str, Any]):
    """``COMMANDS`` as click commands. Each is built when it is first looked up: one takes 10 ms."""

    def __getitem__(self, name: str) -> Any:
        return _build_command(name, COMMANDS[name])

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


@cache
def _build_command(name: str, function: Command) -> Any:
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(name, cls=GroupedCommand, context_settings=_HELP_OPTIONS)(flatten(name, function))
    return get_command(app)


@cache
def build() -> Any:
    """The whole command line as one click command."""
    app = typer.Typer(
        name="modelopt",
        cls=CommandGroup,
        add_completion=True,
        rich_markup_mode=None,
        context_settings=_HELP_OPTIONS,
        invoke_without_command=True,
    )
    app.callback()(_modelopt)
    group: Any = get_command(app)
    group.commands = BuiltCommands()
    return group


def _show_version(ctx: typer.Context, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        typer.echo(f"modelopt {__version__}")
        raise typer.Exit


def _modelopt(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    help_all: HelpAll = False,
) -> None:
    """Compress trained PyTorch models: one file in, one file out, one honest table."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help(), err=True)
        raise typer.Exit(2)


def main(argv: Sequence[str]) -> int:
    """Run one command line, without the program's name, and return its exit code."""
    with naming_flags():
        return _main(argv)


def _main(argv: Sequence[str]) -> int:
    console = Console()
    # So that they count for what goes wrong while options are read.
    console.debug, console.json = "--debug" in argv, "--json" in argv
    try:
        command = build()
        with command.make_context("modelopt", _asked_for_help(argv), obj=console) as context:
            work = command.invoke(context)
        if work is not None:
            with stdout_is_for_results():
                work()
    except typer.Exit as ended:
        return ended.exit_code
    except BaseException as error:  # the one place where a run ends, Ctrl-C and SIGTERM included
        failure = explain(error)
        if console.debug:
            console.traceback(error)
        if failure.line is not None:
            console.error(failure.line)
            if console.json and not console.shown:  # a result that missed a gate says so itself
                console.result_json(failure.as_json())
        return failure.exit_code
    return 0


def _asked_for_help(argv: Sequence[str]) -> list[str]:
    """``help COMMAND`` as ``COMMAND --help``."""
    return [*argv[1:2], "--help"] if argv[:1] == ["help"] else list(argv)


def run() -> NoReturn:
    """The ``modelopt`` command: prepares the process, runs, exits."""
    if os.environ.get(COMPLETE):
        _complete()
    signal.signal(signal.SIGTERM, _terminate)
    if "--debug" not in sys.argv and not sys.warnoptions:
        warnings.simplefilter("ignore")  # other libraries' advice is not about the user's command
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    code = main(sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _settle(sys.stdout, sys.stderr)
    sys.exit(code)


def _complete() -> NoReturn:
    """Answer a shell; it offers nothing where that fails, since a message would land in the user's line."""
    code: Any = 0
    offered = io.StringIO()
    try:
        kept = join_at_colons(os.environ)
        with redirect_stdout(offered):
            build().main(args=[], prog_name="modelopt", complete_var=COMPLETE)
    except SystemExit as ended:
        code = ended.code
        sys.stdout.write("".join(line.removeprefix(kept) for line in offered.getvalue().splitlines(True)))
    except (Exception, KeyboardInterrupt):
        code = 1
    _settle(sys.stdout, sys.stderr)
    sys.exit(code)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
    raise Terminated


def _settle(*streams: Any) -> None:
    """Flush; a stream nobody reads is pointed at nothing, or Python would complain about it while exiting."""
    for stream in streams:
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
