"""Writing an evaluation to a file, in the format that its suffix names."""

from collections.abc import Callable
from pathlib import Path

from modelopt_cli.artifact.writer import atomic_write
from modelopt_cli.errors import UsageError
from modelopt_cli.measure import Evaluation
from modelopt_cli.report.csv import csv_text
from modelopt_cli.report.json import json_text
from modelopt_cli.report.markdown import markdown_text

FORMATS: dict[str, Callable[[Evaluation], str]] = {
    ".json": json_text,
    ".md": markdown_text,
    ".csv": csv_text,
}


def check_export(path: Path) -> None:
    """Refuse a suffix that names no format, before anything is measured.

    Raises:
        UsageError: naming the suffixes there are.
    """
    if path.suffix.lower() not in FORMATS:
        raise UsageError(
            f"no export format for '{path.suffix}'", where=str(path), hint=f"end it in {', '.join(FORMATS)}"
        )


def export(evaluation: Evaluation, path: Path, *, force: bool = False) -> None:
    """Write the evaluation to ``path`` in one indivisible step.

    Raises:
        UsageError: the suffix names no format.
        OutputError: the file exists and ``force`` is not given, or the path cannot be written to.
        EnvironmentFailure: no space or no permission.
    """
    check_export(path)
    text = FORMATS[path.suffix.lower()](evaluation)
    atomic_write(path, [text.encode("utf-8", "backslashreplace")], force)
