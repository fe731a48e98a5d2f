"""Endings of the files that results are written to, one row each. Imports no torch."""

from collections.abc import Callable, Iterable
from typing import Any

from modelopt_cli.lazy_names import deferred

_EXPORTS = "modelopt_cli.report.exports"
TABLES: dict[str, Callable[..., str]] = {
    ".json": deferred(_EXPORTS, "json_text"),
    ".md": deferred(_EXPORTS, "markdown_text"),
    ".csv": deferred(_EXPORTS, "csv_text"),
}
"""Ending to the text of an ``Evaluation``."""

PICTURES: dict[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None},
}
"""Ending to the metadata with which matplotlib writes the same bytes again."""


def file_names(endings: Iterable[str]) -> str:
    """The names that a file may have, for help texts: ``FILE.png, FILE.svg or FILE.pdf``."""
    *others, last = (f"FILE{ending}" for ending in endings)
    return f"{', '.join(others)} or {last}"
