"""The one output sink: the result on stdout, everything else on stderr.

Whatever is printed passes one gate that escapes control characters and line breaks, because paths and layer
names come from files nobody has vetted: a string is one line, and several lines are a ``Group`` of them.
A stream that is no terminal gets plain text at full width. A result is rendered completely before its first
byte is written, so that an error never leaves half of one.
"""

import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

from modelopt_cli.text import printable

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.console import RenderableType
    from rich.progress import Progress, TaskID

    from modelopt_cli.measure import Evaluation

StageProgress = Callable[[str, int, int | None], None]
"""Called with the name of the stage, how much is done, and the total if it is known."""

_PLAIN_WIDTH = 10_000  # wide enough that no table or line is ever folded


class Console:
    """Writes for one run of the command.

    Attributes:
        quiet: nothing on stderr but errors.
        verbosity: how often ``-v`` was given.
        debug: tracebacks are shown.
        json: the result is one JSON object.
        silent: nothing at all but errors: another process of the same command speaks.
        shown: the JSON objects that were printed, there being no more than one for each run.
        evaluations: the tables.
    """

    def __init__(
        self,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._stdout: TextIO | None = sys.stdout if stdout is None else stdout
        self._stderr: TextIO | None = sys.stderr if stderr is None else stderr
        self._environ = os.environ if environ is None else environ
        self.quiet = False
        self.verbosity = 0
        self.debug = False
        self.json = False
        self.silent = False
        self.shown: list[Mapping[str, Any]] = []
        self.evaluations: list[Evaluation] = []
        self._bars: Progress | None = None

    def flags(self) -> list[str]:
        """The options that make a command as talkative as this one."""
        return ["-q"] * self.quiet + ["-v"] * self.verbosity + ["--debug"] * self.debug

    def result(self, renderable: "RenderableType") -> None:
        """Print what was asked for, on stdout."""
        if not self.silent:
            self._write(self._stdout, self._render(renderable, self._stdout))

    def result_json(self, data: Mapping[str, Any]) -> None:
        """Print what was asked for as one JSON object, on stdout; NaN and infinity are refused."""
        if not self.silent:
            self._write(self._stdout, json.dumps(data, indent=2, allow_nan=False) + "\n")
            self.shown.append(data)

    def note(self, renderable: "RenderableType") -> None:
        """Tell something worth knowing, on stderr, unless quiet."""
        if not (self.quiet or self.silent):
            self._say(renderable)

    def detail(self, renderable: "RenderableType") -> None:
        """Tell something only ``-v`` asks for, on stderr."""
        if self.verbosity and not (self.quiet or self.silent):
            self._say(renderable)

    def error(self, line: str) -> None:
        """Print ``error: LINE`` on stderr, always on one line."""
        from rich.text import Text

        self._say(Text.assemble(("error: ", "bold red"), printable(line)))

    def traceback(self, error: BaseException) -> None:
        """Print the whole traceback, on stderr."""
        import traceback

        from rich.console import Group

        self._say(Group(*"".join(traceback.format_exception(error)).splitlines()))

    def stderr_is_terminal(self) -> bool:
        """True if progress may be drawn."""
        return _is_terminal(self._stderr) and self._environ.get("TERM") != "dumb"

    @contextmanager
    def progress(self) -> Iterator[StageProgress]:
        """Bars on stderr, one for each stage, while the block runs; nothing where nobody watches."""
        if self.quiet or self.silent or not self.stderr_is_terminal():
            yield _no_progress
            return
        with _progress(self._rich(self._stderr)) as self._bars:
            try:
                yield _Stages(self._bars)
            finally:
                self._bars = None

    def _say(self, renderable: "RenderableType") -> None:
        with suppress(OSError):  # where nobody can read a note, losing it must not end the work
            if self._bars:
                self._bars.console.print(_escaped(renderable), soft_wrap=True)
                return
            self._write(self._stderr, self._render(renderable, self._stderr))

    def _rich(self, stream: TextIO | None, file: TextIO | None = None) -> "RichConsole":
        from rich.console import Console as RichConsole

        terminal, colour = _is_terminal(stream), self._colour(stream)
        return RichConsole(
            file=file or stream,
            force_terminal=terminal or colour,
            color_system="auto" if colour else None,
            no_color=not colour,
            width=None if terminal else _PLAIN_WIDTH,
            markup=False,
            emoji=False,
            highlight=False,
            _environ={key: value for key, value in self._environ.items() if key != "FORCE_COLOR"},
        )

    def _colour(self, stream: TextIO | None) -> bool:
        if self._environ.get("NO_COLOR"):
            return False
        if self._environ.get("FORCE_COLOR"):
            return True
        return _is_terminal(stream) and self._environ.get("TERM") != "dumb"

    def _render(self, renderable: "RenderableType", stream: TextIO | None) -> str:
        page = io.TextIOWrapper(io.BytesIO(), _encoding(stream), "backslashreplace", newline="")
        soft_wrap = isinstance(renderable, str) or not _is_terminal(stream)
        self._rich(stream, page).print(_escaped(renderable), soft_wrap=soft_wrap)
        page.seek(0)
        return "".join(line.rstrip(" \n") + "\n" for line in page)

    def _write(self, stream: TextIO | None, text: str) -> None:
        if stream is None:  # closed by the caller: `modelopt ... >&-`
            return
        stream.write(text)
        stream.flush()


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def _encoding(stream: TextIO | None) -> str:
    return getattr(stream, "encoding", None) or "utf-8"


def _escaped(renderable: "RenderableType") -> "RenderableType":
    """The same with every text on one line, before rich breaks it into lines and cells."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    if isinstance(renderable, str):
        return Text(printable(renderable))
    if isinstance(renderable, Text):
        line = printable(renderable.plain)
        return renderable if line == renderable.plain else Text(line, renderable.style)
    if isinstance(renderable, Group):
        return Group(*map(_escaped, renderable.renderables))
    if isinstance(renderable, Table):
        for column in renderable.columns:
            column.header = _escaped(column.header)
            column._cells[:] = map(_escaped, column._cells)
        return renderable
    raise TypeError(f"a {type(renderable).__name__} cannot be printed: its text would not be escaped")


def _no_progress(stage: str, done: int, total: int | None) -> None:
    """Takes the place of the bars."""


def _progress(console: "RichConsole") -> "Progress":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


class _Stages:
    """One bar for each stage name, made when it is first heard of."""

    def __init__(self, bars: "Progress") -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(printable(stage), total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)
