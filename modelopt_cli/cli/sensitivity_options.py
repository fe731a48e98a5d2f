"""``--dry-run --sensitivity``: what a method would cost each layer alone, of all commands that can tell."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

from modelopt_cli.artifact import check_output
from modelopt_cli.cli import options
from modelopt_cli.cli.console import Console
from modelopt_cli.cli.groups import Work
from modelopt_cli.cli.results import show_sensitivity
from modelopt_cli.cli.values import Reader
from modelopt_cli.report.formats import PICTURES, file_names
from modelopt_cli.settings import Setting

PruneSensitivity = Annotated[
    bool,
    Setting("With --dry-run: show what pruning each layer alone costs.", title="Pruning", advanced=True),
]
Plot = Annotated[
    Path | None,
    Setting(
        f"With --dry-run --sensitivity: also draw it, to {file_names(PICTURES)} (plots extra).",
        title=options.OUTPUT,
        advanced=True,
    ),
]


def read_sensitivity(reader: Reader, sensitivity: bool, plot: Path | None, dry_run: bool) -> None:
    """Check that the options go together."""
    if plot is not None:
        reader.check(sensitivity, "--plot", "has no meaning without --sensitivity")
        reader.check(dry_run or not sensitivity, "--plot", "has no meaning without --dry-run")
        options.read_ending(reader, "--plot", plot, PICTURES)


def sensitivity_work(
    console: Console, request: options.RequestOptions, plot: Path | None, force: bool, **fields: Any
) -> Work:
    """Work that measures and shows what the method of a command would cost each layer alone.

    Args:
        console: what it prints to.
        request: network, data, measuring and limits.
        plot: the picture to draw, or None.
        force: replace an existing picture.
        fields: the other fields of ``api.Request``.
    """
    return partial(_show, console, request, plot, force, fields)


def _show(
    console: Console, request: options.RequestOptions, plot: Path | None, force: bool, fields: dict[str, Any]
) -> None:
    from modelopt_cli import api, report

    if plot is not None:
        check_output(plot, force)
        report.require_plots(plot)
    with console.progress() as progress:
        asked = api.Request(on_note=console.note, progress=progress, **fields, **request.keywords())
        found = api.sensitivity(asked)
    if plot is not None:
        report.plot_sensitivity(found, plot)
    show_sensitivity(console, found)
    if plot is not None:
        console.note(f"drew {plot}")
