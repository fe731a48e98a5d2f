"""``csv:FILE?labels=a,b``: columns by name, for several labels or numbers, and inputs that are numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from modelopt_cli.data.csv_file import (
    LABELS,
    PATHS,
    Row,
    is_float,
    open_csv,
    read_lines,
    reads_as_number,
    usual_column,
    whole_labels,
)
from modelopt_cli.data.data_spec import DataSpec, columns
from modelopt_cli.data.images import FileSource
from modelopt_cli.data.source import Raw, Source
from modelopt_cli.data.targets import RawTarget
from modelopt_cli.errors import DataError
from modelopt_cli.settings import did_you_mean


@dataclass(frozen=True)
class Labels:
    """Labels of a table.

    Attributes:
        values: one for each row, or the reason why there are none.
        names: of the classes.
        count: number of classes.
        task: what they are for, where they tell.
    """

    values: Sequence[RawTarget] | DataError
    names: tuple[str, ...] | None = None
    count: int | None = None
    task: str | None = None


class NumbersSource(Source):
    """Rows of numbers, each the input ``(D,)`` of a sample."""

    ready = True

    def __init__(
        self, name: str, inputs: Tensor, labels: Sequence[RawTarget] | DataError, rows: Sequence[str]
    ) -> None:
        self.name, self.inputs, self.labels, self.rows = name, inputs, labels, rows

    def __len__(self) -> int:
        return len(self.inputs)

    def where(self, index: int) -> str:
        """The table and the line."""
        return self.rows[index]

    def load(self, index: int) -> tuple[Raw, RawTarget]:
        """The numbers of a row, and its label."""
        labels = self.labels
        return self.inputs[index], labels if isinstance(labels, DataError) else labels[index]


class Table:
    """Named columns of a file.

    Args:
        path: of the file.
        rows: with the names first; by default those of a CSV file.
        unusable: why a cell is empty that the file has a value for, by its line and column.
    """

    def __init__(
        self,
        path: Path,
        rows: Sequence[Row] | None = None,
        unusable: Mapping[tuple[int, str], str] = MappingProxyType({}),
    ) -> None:
        self.path, self.unusable = path, unusable
        (_, self.names), *self.lines = (read_lines(path) if rows is None else rows) or [(0, [])]
        if not self.lines:
            raise DataError("holds no rows", where=str(path), hint="name the columns in its first line")

    def where(self, line: int) -> str:
        return f"{self.path} line {line}"

    def cells(self, name: str) -> list[tuple[int, str]]:
        """The column of this name, each cell with its line."""
        if self.names.count(name) != 1:
            problem = f"has {self.names.count(name) or 'no'} columns called {name!r}"
            hint = did_you_mean(name, self.names) or f"it has {', '.join(self.names)}"
            if name in self.names:
                hint = "give each its own name"
            raise DataError(problem, where=str(self.path), hint=hint)
        place = self.names.index(name)
        for line, row in self.lines:
            if len(row) <= place or not row[place]:
                problem = self.unusable.get((line, name), "empty")
                raise DataError(f"{name} is {problem}", where=self.where(line))
        return [(line, row[place]) for line, row in self.lines]

    def usual(self, names: Sequence[str], taken: Sequence[str] = ()) -> str | None:
        """The column that has one of these names and is not taken; None where there is none."""
        free = ["" if name in taken else name for name in self.names]
        place = usual_column(free, names, self.path)
        return None if place is None else self.names[place]

    def numbers(self, names: Sequence[str]) -> Tensor:
        """Columns of numbers, float32 ``(N, D)``."""
        return torch.tensor([self._numbers(name) for name in names]).T.contiguous()

    def _numbers(self, name: str) -> list[float]:
        for line, cell in (cells := self.cells(name)):
            if not is_float(cell):
                problem = f"{name} is {cell!r}, not a finite number"
                raise DataError(problem, where=self.where(line), hint="write it as 1000, -1.5 or 2e3")
        return [float(cell) for _, cell in cells]


def open_columns(spec: DataSpec) -> Source:
    """Open ``csv:FILE``, with columns that options name, or else as :func:`csv_file.open_csv`.

    ``labels`` names one or several columns of labels, ``path`` that of the images, and ``inputs`` columns of
    numbers in place of images. What is not named has its usual name.

    Raises:
        DataError: a column is missing, or a cell is not what it should be.
    """
    if not spec.options:
        return open_csv(spec)
    table = Table(Path(spec.target))
    path, inputs, wanted = (columns(spec, option) for option in ("path", "inputs", "labels"))
    if len(path) + bool(inputs) > 1:
        raise DataError("has more than one input", where=spec.text, hint="name a path, or inputs")
    rows = [table.where(line) for line, _ in table.lines]
    usual = table.usual(LABELS, taken=(*path, *inputs))
    labels = labels_of(table, wanted or [usual or "label"])
    source: Source
    if inputs:
        source = NumbersSource(spec.text, table.numbers(inputs), labels.values, rows)
    else:
        files = table.cells(path[0] if path else table.usual(PATHS) or "path")
        source = FileSource.of_table(spec.text, table.path, files, labels.values)
    source.labelled = bool(wanted) or usual is not None
    source.task, source.class_names, source.num_classes = labels.task, labels.names, labels.count
    return source


def labels_of(table: Table, names: Sequence[str]) -> Labels:
    """The labels in these columns of a table: classes, several of them, or numbers."""
    try:
        if len(names) == 1 and not _are_numbers(cells := table.cells(names[0])):
            classes, class_names = whole_labels(cells, table.path)
            return Labels(classes, class_names, len(class_names or ()) or max(classes) + 1)
        values = table.numbers(names)
    except DataError as error:  # of no concern where labels are not read
        return Labels(error)
    if len(names) > 1 and bool(((values == 0) | (values == 1)).all()):
        return Labels(list(values), tuple(names), len(names), "multilabel")
    return Labels(list(values), task="regress")


def _are_numbers(cells: Sequence[tuple[int, str]]) -> bool:
    """True of numbers that are no classes: not all of them are whole."""
    texts = [cell for _, cell in cells]
    return any(map(reads_as_number, texts)) and not all(cell.isdecimal() for cell in texts)
