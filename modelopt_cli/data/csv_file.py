"""``csv:FILE``: a table of image files and their labels."""

import csv
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path

from modelopt_cli.data.data_spec import DataSpec
from modelopt_cli.data.images import LABEL_DIGITS, FileSource
from modelopt_cli.data.source import Source
from modelopt_cli.errors import DataError
from modelopt_cli.regular import read_regular
from modelopt_cli.text import short

Row = tuple[int, list[str]]
"""A line's number and its cells."""

PATHS = (
    "path",
    "file",
    "filename",
    "filepath",
    "image",
    "imagepath",
    "imagefile",
    "imagename",
    "img",
    "imgpath",
)
LABELS = (
    "label",
    "class",
    "target",
    "category",
    "y",
    "labelid",
    "classid",
    "classindex",
    "classname",
    "labels",
)
"""Usual names of the two columns, without case, spaces, dashes and underscores. The first name of each goes
before the others."""

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_NAME_THEM = "name the columns path and label"


def open_csv(spec: DataSpec) -> Source:
    """Open ``csv:FILE``: columns path,label; paths relative to the file; labels integers or class names."""
    table = Path(spec.target)
    rows = _rows(table)
    if not rows:
        raise DataError("holds no rows", where=str(table), hint="write one line path,label per image")
    names = None
    labels: list[int] | DataError
    try:
        labels, names = whole_labels([(line, label) for line, _, label in rows], table)
    except DataError as error:  # of no concern where labels are not read
        labels = error
    return FileSource.of_table(spec.text, table, [(line, path) for line, path, _ in rows], labels, names)


def read_lines(table: Path, delimiter: str = ",") -> list[Row]:
    """The rows of a table that are not empty, without spaces around their cells.

    Raises:
        DataError: it is no CSV file, or a row has more cells than the first line, which names them.
    """
    try:
        text = read_regular(table, DataError).decode("utf-8-sig")
    except OSError as error:
        raise DataError(error.strerror or "cannot be read", where=str(table)) from None
    except UnicodeDecodeError as error:
        raise DataError(f"is not a UTF-8 CSV file ({error})", where=str(table)) from None
    lines = _parsed(text, delimiter, table)
    if not lines:
        return lines
    if len(lines[0][1]) == 1:
        _require_separator(text.lstrip().splitlines()[0], delimiter, table)
    width = len(lines[0][1])
    for line, row in lines:
        if len(row) > width:
            problem = f"has {len(row)} cells, {len(row) - width} more than the first line"
            hint = f"quote a cell that holds {_SEPARATORS[delimiter]}; write 1.5 for a number"
            raise DataError(problem, where=f"{table} line {line}", hint=hint)
    return lines


def _parsed(text: str, delimiter: str, table: Path) -> list[Row]:
    """The rows of a text, each with the number of its last line."""
    written = list(io.StringIO(text, newline=""))
    reader, rows, first = csv.reader(written, strict=True, delimiter=delimiter), [], 0
    try:
        for row in reader:
            first = reader.line_num
            if any(row):
                rows.append((first, [cell.strip() for cell in row]))
    except csv.Error as error:
        line = first + _lines_before_bad_cell("".join(written[first:]), delimiter) + 1
        unclosed = reader.line_num == len(written) and "end of data" in str(error)
        problem = "has a quote that is not closed" if unclosed else f"is no CSV ({error})"
        hint = "close it, or write a quote inside a quoted cell twice"
        raise DataError(problem, where=f"{table} line {line}", hint=hint) from None
    return rows


def _lines_before_bad_cell(text: str, delimiter: str) -> int:
    """Number of lines of a row before the one on which its first cell begins that cannot be read."""
    edge = re.escape(delimiter)
    cell = re.compile(rf'(?:"[^"]*(?:""[^"]*)*"|[^"{edge}\r\n][^{edge}\r\n]*|){edge}')
    place = 0
    while match := cell.match(text, place):
        place = match.end()
    return len(list(io.StringIO(text[:place] + "-", newline=""))) - 1


def _require_separator(first: str, delimiter: str, table: Path) -> None:
    """Refuse a table whose first line has one cell, and another separator in it."""
    for separator, name in _SEPARATORS.items():
        if separator != delimiter and separator in first:
            problem = f"has {name} between its columns, not {_SEPARATORS[delimiter]}: {short(first)}"
            raise DataError(problem, where=str(table), hint=f"save it with {_SEPARATORS[delimiter]}")


def _rows(table: Path) -> list[tuple[int, str, str]]:
    """Line number, path and label of every row."""
    lines = read_lines(table)
    columns = _header(lines, table)
    if columns is not None:
        lines = lines[1:]
    path, label = columns or (0, 1)
    for line, row in lines:
        if len(row) <= max(path, label) or not row[path] or not row[label]:
            raise DataError("lacks a path or a label", where=f"{table} line {line}", hint="write path,label")
    return [(line, row[path], row[label]) for line, row in lines]


def _header(lines: Sequence[Row], table: Path) -> tuple[int, int] | None:
    """The columns of paths and labels that the first row names; None where it is a sample.

    Raises:
        DataError: it reads like a header, but does not say which columns they are.
    """
    if not lines:
        return None
    line, row = lines[0]
    columns = [usual_column(row, usual, table) for usual in (PATHS, LABELS)]
    if columns[0] is not None and columns[1] is not None:
        return columns[0], columns[1]
    is_file = (table.parent / row[0]).is_file()
    if columns != [None, None] and not is_file:
        missing = "path" if columns[0] is None else "label"
        raise DataError(f"has no column called {missing}", where=str(table), hint=_NAME_THEM)
    # No file is called so, but those of other rows are there.
    if not is_file and len(lines) > 1 and (table.parent / lines[1][1][0]).is_file():
        problem = f"reads like a header: {short(','.join(row))}"
        raise DataError(problem, where=f"{table} line {line}", hint=f"if it is one, {_NAME_THEM}")
    return None


def usual_column(header: Sequence[str], usual: Sequence[str], table: Path) -> int | None:
    """The column with one of the usual names; None where there is none.

    Raises:
        DataError: there are several, and none has the first of those names.
    """
    cells = [re.sub(r"[\s_-]", "", cell.lower()) for cell in header]
    columns = [i for i, cell in enumerate(cells) if cell == usual[0]] or [
        i for i, cell in enumerate(cells) if cell in usual
    ]
    if len(columns) > 1:
        both = " and ".join(cells[i] for i in columns)
        raise DataError(f"may mean the columns {both} by {usual[0]}", where=str(table), hint=_NAME_THEM)
    return columns[0] if columns else None


def whole_labels(cells: Sequence[tuple[int, str]], table: Path) -> tuple[list[int], tuple[str, ...] | None]:
    """Classes by number, or by name and then numbered in the order of the names, which are returned, too.

    Args:
        cells: of the column, each with its line.
        table: for messages.

    Raises:
        DataError: some are numbers and some are not, or a number is none of a class.
    """
    numbers = [cell.isascii() and cell.removeprefix("-").isdecimal() for _, cell in cells]
    if not any(numbers):
        for line, cell in cells:
            if reads_as_number(cell):  # of a table that was written with a column of floats
                hint = "write 3, not 3.0; of numbers, name the column: ?labels="
                if not is_float(cell):
                    hint = "write it with the digits 0 to 9 alone"
                raise DataError(f"label {cell!r} is not an integer", where=f"{table} line {line}", hint=hint)
        names = tuple(sorted({cell for _, cell in cells}))
        order = {name: label for label, name in enumerate(names)}
        return [order[cell] for _, cell in cells], names
    for (line, cell), number in zip(cells, numbers, strict=True):
        if not number or cell.startswith("-") or len(cell) > LABEL_DIGITS:
            raise DataError(
                f"label {cell!r} is not an integer from 0 as others are", where=f"{table} line {line}"
            )
    return [int(cell) for _, cell in cells], None


def is_float(cell: str) -> bool:
    """True of a finite number as files have it, without Python's underscores and digits of other scripts."""
    return _DECIMAL.fullmatch(cell) is not None and math.isfinite(float(cell))


def reads_as_number(cell: str) -> bool:
    """True of what somebody means for a number, and no class's name."""
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False
