"""A recipe run from Python."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from modelopt_cli.cli.console import Console
from modelopt_cli.cli.groups import stdout_is_for_results
from modelopt_cli.cli.main import build
from modelopt_cli.errors import GateNotMet

if TYPE_CHECKING:
    from rich.console import RenderableType

    from modelopt_cli.api import Measured
    from modelopt_cli.measure.evaluated_model import StageProgress


class Listener(Console):
    """Hands notes on, and prints nothing."""

    def __init__(self, on_note: Callable[[str], None] | None, progress: "StageProgress | None") -> None:
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
    def progress(self) -> Iterator["StageProgress"]:
        """Hand progress on."""
        yield self._on_progress or (lambda stage, done, total: None)


def run(
    recipe: str | PathLike[str],
    output: str | PathLike[str] | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    force: bool = False,
    resume: bool = False,
    on_note: Callable[[str], None] | None = None,
    progress: "StageProgress | None" = None,
    **options: Any,
) -> "Measured":
    """Run a recipe: several commands, and one table of all.

    Args:
        recipe: a YAML file; see ``docs/recipes.md``.
        output: the file that the last step writes, in place of what the recipe says.
        settings: options of steps, such as ``{"prune.flops": 0.5}``, in place of what the recipe says.
        force: replace what exists.
        resume: do not repeat the steps that are finished.
        on_note: called with one line for each thing worth knowing.
        progress: called with the stage, what is done and the total.
        options: ``checkpoint``, ``data``, ``seed``, ``threads`` or ``device``, in place of the recipe's.

    Returns:
        The figures of the checkpoint and of every file; gates that are not met are among them.

    Raises:
        InputError: the recipe, a file or an option cannot be used.
        GateNotMet: a step cannot reach its target.

    Example:
        >>> print(mo.run("configs/deep-compression.yaml", "small.safetensors"))  # doctest: +SKIP
    """
    from modelopt_cli.api import Measured, naming_arguments

    words = ["run", fspath(recipe)]
    words += [] if output is None else ["--output", fspath(output)]
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    for name, value in (settings or {}).items():
        words += ["--set", f"{name}={value}"]
    words += ["--force"] * force + ["--resume"] * resume
    console, command = Listener(on_note, progress), build()
    with naming_arguments(), command.make_context("modelopt", words, obj=console) as context:
        work = command.invoke(context)
        with stdout_is_for_results():
            try:
                work()
            except GateNotMet:
                if not console.evaluations:  # of a step
                    raise
    return Measured.of(console.evaluations[-1])
