"""A recipe run from Python."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from typer.exceptions import TyperException

from modelopt_cli.api import Measured
from modelopt_cli.api.keywords import AnyDevice, AnyPath
from modelopt_cli.api.request import Note
from modelopt_cli.api.signatures import public
from modelopt_cli.cli.console import Console, StageProgress
from modelopt_cli.cli.failures import explain
from modelopt_cli.cli.groups import stdout_is_for_results
from modelopt_cli.cli.main import build
from modelopt_cli.errors import GateNotMet, UsageError
from modelopt_cli.option_types import as_python, not_of_type

if TYPE_CHECKING:
    from rich.console import RenderableType


class Listener(Console):
    """Hands notes on, and prints nothing."""

    def __init__(self, on_note: Note | None, progress: StageProgress | None) -> None:
        super().__init__()
        self._on_note, self._on_progress = on_note, progress

    def note(self, renderable: "RenderableType") -> None:
        """Hand a line on."""
        if self._on_note is not None:
            self._on_note(str(renderable))

    def result(self, renderable: "RenderableType") -> None:
        """Print no table: it is returned."""

    def result_json(self, data: Mapping[str, Any]) -> None:
        """Print nothing."""

    def detail(self, renderable: "RenderableType") -> None:
        """Print no layers."""

    @contextmanager
    def progress(self) -> Iterator[StageProgress]:
        """Hand progress on."""
        yield self._on_progress or (lambda stage, done, total: None)


@public(unknown="options of the recipe stand in settings={{{!r}: ...}}")
def run(
    recipe: AnyPath,
    output: AnyPath | None = None,
    *,
    checkpoint: AnyPath | None = None,
    data: AnyPath | None = None,
    seed: int | None = None,
    threads: int | None = None,
    device: AnyDevice | None = None,
    settings: Mapping[str, Any] | None = None,
    force: bool = False,
    resume: bool = False,
    on_note: Note | None = None,
    progress: StageProgress | None = None,
) -> Measured:
    """Run a recipe: several commands, and one table of all.

    Args:
        recipe: a YAML file; see ``docs/recipes.md``.
        output: the file that the last step writes.
        checkpoint: the file that the first step starts from.
        data: spec of the data to evaluate on, such as ``"val/"``.
        seed: of everything random.
        threads: of the CPU.
        device: to run on, such as ``"cuda"``. All of these stand in place of what the recipe says.
        settings: any other option, such as ``{"latency_runs": 0}``, and those of steps, such as
            ``{"prune.flops": 0.5}``, in place of what the recipe says.
        force: replace what exists.
        resume: do not repeat the steps that are finished.
        on_note: called with one line for each thing worth knowing.
        progress: called with the stage, what is done and the total.

    Returns:
        The figures of the checkpoint and of every file; gates that are not met are among them.

    Raises:
        InputError: the recipe, a file or an option cannot be used.
        GateNotMet: a step cannot reach its target.

    Example:
        >>> table = mo.run("recipe.yaml", "small.safetensors", seed=1)
        >>> len(table.models)
        2
    """
    shared = {"checkpoint": checkpoint, "data": data, "seed": seed, "threads": threads, "device": device}
    words = [
        f"--{name}={value}" for name, value in (shared | {"output": output}).items() if value is not None
    ]
    words += [f"--set={setting}" for name, value in (settings or {}).items() for setting in _set(name, value)]
    words += ["--force"] * force + ["--resume"] * resume
    console = Listener(on_note, progress)
    _work(["run", *words, "--", fspath(recipe)], console)
    return Measured.of(console.evaluations[-1])


def _work(words: list[str], console: Console) -> None:
    """Run a command line that prints nothing."""
    try:
        with build().make_context("modelopt", words, obj=console) as context:
            work = context.command.invoke(context)
    except TyperException as error:
        raise UsageError(explain(error).line or "") from error
    with stdout_is_for_results():
        try:
            work()
        except GateNotMet:
            if not console.evaluations:  # of a step
                raise


def _set(name: Any, value: Any) -> Iterator[str]:
    """``NAME=VALUE`` as on the command line; several for a list.

    Raises:
        UsageError: it is no option, or what no text stands for.
    """
    if not isinstance(name, str):
        raise UsageError(f"{name!r} is no name of an option", where="settings")
    value = as_python(value)
    values = value if isinstance(value, list | tuple) else [value]
    if not values:
        raise UsageError(f"{name!r} has no value", where="settings", hint="leave it out")
    for each in (fspath(each) if isinstance(each, PathLike) else as_python(each) for each in values):
        if (problem := not_of_type(each, bool | int | float | str)) is not None:
            raise UsageError(f"{name!r}: {problem}", where="settings")
        yield f"{name}={str(each).lower() if isinstance(each, bool) else each}"
