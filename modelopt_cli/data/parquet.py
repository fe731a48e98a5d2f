"""Images in Parquet files: a column of encoded images, and one of integer labels.

All labels are read when the data is opened, four bytes each. An image can only be had with its whole row
group, so the groups that were read last are kept.
"""

import contextlib
import io
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelopt_cli.data.data_spec import DataSpec
from modelopt_cli.data.decode import decode
from modelopt_cli.data.images import LABEL_DIGITS
from modelopt_cli.data.shards import find_shards
from modelopt_cli.data.source import Raw, Source
from modelopt_cli.data.targets import RawTarget
from modelopt_cli.errors import DataError, EnvironmentFailure
from modelopt_cli.text import short, typed_line

KEPT = 256 * 2**20
"""Bytes of encoded images that a process keeps; of a larger row group, that group alone."""

LARGEST_GROUP = 2**30
"""Bytes of encoded images, beyond which a row group is refused."""

_ROWS_AT_ONCE = 64


class ParquetSource(Source):
    """Images in Parquet files, a row group at a time."""

    def __init__(self, name: str, paths: Sequence[str], image: str, label: str) -> None:
        self.name = name
        self.paths = paths
        self.image = image
        tables = [_Table(path, image, label) for path in paths]
        self.labels = np.concatenate([table.labels for table in tables])
        if len(self.labels) == 0:
            raise DataError("holds no rows", where=name)
        self.file_ends = np.cumsum([len(table.labels) for table in tables])
        self.groups = [(file, group) for file, table in enumerate(tables) for group in range(len(table.rows))]
        self.group_ends = np.cumsum([rows for table in tables for rows in table.rows])
        self.unusable = next((table.unusable for table in tables if table.unusable), None)
        if self.unusable is None:
            self.class_names = self._names({table.class_names for table in tables})
            self.num_classes = len(self.class_names or ()) or int(self.labels.max()) + 1
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def _names(self, names_of_files: set[tuple[str, ...] | None]) -> tuple[str, ...] | None:
        """The files' names of the classes, where all have the same and every label has one."""
        names = names_of_files.pop()
        return names if not names_of_files and names and int(self.labels.max()) < len(names) else None

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, index: int) -> str:
        """The file, and the row in it."""
        file = int(np.searchsorted(self.file_ends, index, side="right"))
        first = int(self.file_ends[file - 1]) if file else 0
        return f"{self.paths[file]} row {index - first}"

    def load(self, index: int) -> tuple[Raw, RawTarget]:
        """The decoded image. EXIF orientation is ignored, as in a folder."""
        group = int(np.searchsorted(self.group_ends, index, side="right"))
        first = int(self.group_ends[group - 1]) if group else 0
        content = self._group(group, int(self.group_ends[group]) - first)[index - first].as_buffer()
        if content is None:
            raise DataError(f"column {self.image} is null", where=self.where(index), hint="store the image")
        return decode(io.BytesIO(content)), self.unusable or int(self.labels[index])

    def _group(self, number: int, rows: int) -> Any:
        """Read a row group's images, an Arrow array of bytes."""
        if number not in self._kept:
            file, group = self.groups[number]
            images = _read_images(self.paths[file], group, self.image)
            if len(images) != rows:
                raise DataError(
                    f"row group {group} is damaged", where=self.paths[file], hint="fetch it again"
                )
            self._kept[number] = images
            while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(number)
        return self._kept[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": OrderedDict()}


class _Table:
    """Part of a file that is read when it is opened.

    Attributes:
        labels: int32, one for each row; -1 where they cannot be used.
        unusable: why they cannot, or None.
        rows: of each row group.
        class_names: as Hugging Face's datasets writes them, or None.
    """

    def __init__(self, path: str, image: str, label: str) -> None:
        with _opened(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
            _check_images(schema, image, path)
            self.unusable: DataError | None = None
            try:
                _check_labels(schema, label, path)
                self.labels = _labels(file.read(columns=[label], use_threads=False).column(label), path)
            except DataError as error:  # of no concern where labels are not read
                self.unusable, self.labels = error, np.full(metadata.num_rows, -1, np.int32)
            self.rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            self.class_names = _class_names(schema, label)
        if sum(self.rows) != len(self.labels):
            raise DataError("is damaged: its row groups lack labels", where=path, hint="fetch it again")


def open_parquet(spec: DataSpec) -> Source:
    """``parquet:PATTERN``: files in sorted order, rows as they come; ``?image=img&label=fine_label``."""
    columns = (str(spec.option(name)) for name in ("image", "label"))
    return ParquetSource(spec.text, find_shards(spec.target), *columns)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    """Open a file for as long as it is read: a file that stays open would have to survive a fork.

    Raises:
        DataError: it cannot be read, here or in the body.
        EnvironmentFailure: pyarrow is missing.
    """
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise EnvironmentFailure(
            "Parquet files need the optional package pyarrow",
            where=path,
            hint="pip install 'modelopt-cli[parquet]'",
        ) from None
    try:
        with ParquetFile(path, memory_map=True) as file:
            yield file
    except (MemoryError, DataError):
        raise
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reason = (
            getattr(error, "strerror", None) or f"is not Parquet, or damaged ({short(typed_line(error))})"
        )
        raise DataError(reason, where=path, hint="give Parquet files") from None


def _check_images(schema: Any, image: str, path: str) -> None:
    """Refuse a file without the column of images, or with something else in it."""
    _check_column(schema, image, path)
    kind = schema.field(image).type
    if not _is_bytes(_leaf(kind)):
        raise DataError(f"column {image} is {short(str(kind))}, not encoded images", where=path)


def _check_labels(schema: Any, label: str, path: str) -> None:
    """Refuse a file without the column of labels, or with something else in it."""
    import pyarrow

    _check_column(schema, label, path)
    if not pyarrow.types.is_integer(schema.field(label).type):
        kind = short(str(schema.field(label).type))
        raise DataError(f"column {label} is {kind}, not integers", where=path)


def _check_column(schema: Any, column: str, path: str) -> None:
    if schema.names.count(column) != 1:
        columns = short(", ".join(schema.names))
        raise DataError(
            f"has no column {column}, but {columns}",
            where=path,
            hint="name them: ?image=img&label=fine_label",
        )


def _leaf(kind: Any) -> Any:
    """The type of ``bytes`` in Hugging Face's struct of bytes and path, or the column's own type."""
    import pyarrow

    if (
        pyarrow.types.is_struct(kind)
        and [kind.field(i).name for i in range(kind.num_fields)].count("bytes") == 1
    ):
        return kind.field("bytes").type
    return kind


def _is_bytes(kind: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))


def _labels(column: Any, path: str) -> NDArray[np.int32]:
    if column.null_count:
        row = int(np.argmax(column.is_null().to_numpy()))
        raise DataError("label is null", where=f"{path} row {row}")
    labels: NDArray[Any] = column.to_numpy()
    outside = (labels < 0) | (labels >= 10**LABEL_DIGITS)
    if outside.any():
        row = int(np.argmax(outside))
        raise DataError(f"label {labels[row]} is not an integer from 0", where=f"{path} row {row}")
    return labels.astype(np.int32)


def _class_names(schema: Any, label: str) -> tuple[str, ...] | None:
    try:
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if is_list else None


def _read_images(path: str, group: int, image: str) -> Any:
    """The images of a row group, an Arrow array of bytes; by parts, so that its size is known in time."""
    import pyarrow

    parts, size = [], 0
    with _opened(path) as file:
        kind = file.schema_arrow.field(image).type
        columns = [image if _is_bytes(kind) else f"{image}.bytes"]
        for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False):
            column = batch.column(image)
            parts.append(column if _is_bytes(kind) else column.field("bytes"))
            size += parts[-1].nbytes
            if size > LARGEST_GROUP:
                raise DataError(
                    f"row group {group} holds more than {LARGEST_GROUP >> 20} MiB of images",
                    where=path,
                    hint="write it with fewer rows in a group, such as 100",
                )
        return pyarrow.chunked_array(parts, _leaf(kind))
