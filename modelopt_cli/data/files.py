"""Sources of image files: a folder of class folders, and a CSV table."""

import csv
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

from modelopt_cli.data.source import Raw, Source
from modelopt_cli.data.spec import DataSpec, check_options
from modelopt_cli.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")

LABEL_DIGITS = 9
"""Most digits that a label in a file has: more are a slip of the finger, and would count as many classes."""


class FileSource(Source):
    """Image files with their labels, decoded one at a time."""

    def __init__(
        self, name: str, paths: Sequence[str], labels: Sequence[int], class_names: tuple[str, ...] | None
    ) -> None:
        self.name = name
        self.paths = paths
        self.labels = labels
        self.class_names = class_names
        self.num_classes = len(class_names) if class_names else max(labels) + 1

    def __len__(self) -> int:
        return len(self.paths)

    def where(self, index: int) -> str:
        """The file's path."""
        return self.paths[index]

    def load(self, index: int) -> tuple[Raw, int]:
        """The decoded image. EXIF orientation is ignored, as torchvision ignores it."""
        return decode(self.paths[index]), self.labels[index]


def decode(file: str | IO[bytes]) -> Image.Image:
    """Decode an image file, or what is open as one, whole.

    Raises:
        DataError: missing, unreadable, truncated, not an image, or too large to be meant. Where what is open
            lies, the caller must say.
    """
    path = file if isinstance(file, str) else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                image.load()
                return image
    except UnidentifiedImageError:
        raise DataError("is not an image", where=path, hint="remove it or fetch it again") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = Image.MAX_IMAGE_PIXELS or 0
        raise DataError(
            f"has more than {limit // 10**6} million pixels", where=path, hint="shrink it"
        ) from None
    except OSError as error:
        reason = error.strerror or "is truncated or damaged"
        raise DataError(reason, where=path, hint="remove it or fetch it again") from None
    except (
        Exception
    ) as error:  # Pillow's decoders raise SyntaxError, ValueError, struct.error, IndexError, ...
        raise DataError(
            f"cannot be decoded ({type(error).__name__})", where=path, hint="remove it or fetch it again"
        ) from None


def open_folder(spec: DataSpec) -> Source:
    """A folder with one folder per class; labels follow the sorted names, as in torchvision's ImageFolder."""
    root = spec.target
    try:
        names = sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        raise DataError(error.strerror or "cannot be read", where=root) from None
    images = {name: list(_images(os.path.join(root, name))) for name in names}
    if not any(images.values()):
        loose = any(entry.lower().endswith(SUFFIXES) for entry in os.listdir(root))
        what = "holds images but no class folders" if loose else "holds no class folders with images"
        raise DataError(
            what, where=root, hint="give one folder per class, or csv:FILE with columns path,label"
        )
    for name in names:
        if not images[name]:
            suffixes = ", ".join(SUFFIXES)
            where = os.path.join(root, name)
            raise DataError(
                f"holds no images ({suffixes})", where=where, hint="add some, or remove the folder"
            )
    paths = [path for name in names for path in images[name]]
    labels = [label for label, name in enumerate(names) for _ in images[name]]
    return FileSource(spec.text, paths, labels, tuple(names))


def _images(folder: str) -> Iterator[str]:
    for parent, _, files in sorted(os.walk(folder, followlinks=True)):
        for name in sorted(files):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield os.path.join(parent, name)


def open_csv(spec: DataSpec) -> Source:
    """``csv:FILE``: columns path,label; paths relative to the file; labels whole numbers or class names."""
    check_options(spec, ())
    table = Path(spec.target)
    rows = _rows(table)
    if not rows:
        raise DataError("holds no rows", where=str(table), hint="write one line path,label per image")
    paths = [str(table.parent / path) for _, path, _ in rows]
    for (line, _, _), path in zip(rows, paths, strict=True):
        if not os.path.isfile(path):
            raise DataError(
                f"no such file: {path}", where=f"{table} line {line}", hint="paths start at the CSV"
            )
    labels, names = _labels([(line, label) for line, _, label in rows], table)
    return FileSource(spec.text, paths, labels, names)


def _rows(table: Path) -> list[tuple[int, str, str]]:
    """Line number, path and label of every row."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream, strict=True)
            lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(row)]
    except OSError as error:
        raise DataError(error.strerror or "cannot be read", where=str(table)) from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"is not a UTF-8 CSV file ({error})", where=str(table)) from None
    if not lines:
        return []
    path_column, label_column = 0, 1
    header = [cell.lower() for cell in lines[0][1]]
    if "path" in header or "label" in header:
        for column in ("path", "label"):
            if column not in header:
                raise DataError(
                    f"has no column called {column}", where=str(table), hint="name them path and label"
                )
        path_column, label_column = header.index("path"), header.index("label")
        lines = lines[1:]
    for line, row in lines:
        if len(row) <= max(path_column, label_column) or not row[path_column] or not row[label_column]:
            raise DataError("lacks a path or a label", where=f"{table} line {line}", hint="write path,label")
    return [(line, row[path_column], row[label_column]) for line, row in lines]


def _labels(cells: list[tuple[int, str]], table: Path) -> tuple[list[int], tuple[str, ...] | None]:
    numbers = [cell.removeprefix("-").isdecimal() for _, cell in cells]
    if not any(numbers):
        for line, cell in cells:
            if _is_float(cell):  # of a table that was written with a column of floats
                where, hint = f"{table} line {line}", "write 3, not 3.0"
                raise DataError(f"label {cell!r} is not a whole number", where=where, hint=hint)
        names = tuple(sorted({cell for _, cell in cells}))
        order = {name: label for label, name in enumerate(names)}
        return [order[cell] for _, cell in cells], names
    for (line, cell), number in zip(cells, numbers, strict=True):
        if not number or cell.startswith("-") or len(cell) > LABEL_DIGITS:
            raise DataError(
                f"label {cell!r} is not a whole number from 0 as others are", where=f"{table} line {line}"
            )
    return [int(cell) for _, cell in cells], None


def _is_float(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False
