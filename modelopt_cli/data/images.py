"""Image files, and the source that is a folder of class folders."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from modelopt_cli.data.data_spec import DataSpec
from modelopt_cli.data.decode import decode
from modelopt_cli.data.source import Raw, Source
from modelopt_cli.data.targets import RawTarget
from modelopt_cli.errors import DataError
from modelopt_cli.text import short

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Those of torchvision's ``ImageFolder``."""

LABEL_DIGITS = 9
"""Most digits that a label in a file has: more are a slip of the finger, and would count as many classes."""


@dataclass(frozen=True)
class Files:
    """Files with their labels.

    Attributes:
        paths: in order.
        labels: of each, or the reason why there are none.
        class_names: in label order, where labels have names.
        notes: see :class:`Source`.
        rows: what a table calls each, e.g. ``labels.csv line 3``.
        labelled: there are labels.
    """

    paths: Sequence[str]
    labels: Sequence[RawTarget] | DataError
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    rows: Sequence[str] | None = None
    labelled: bool = True

    @classmethod
    def of_table(cls, table: Path, cells: Sequence[tuple[int, str]]) -> "Files":
        """Files that a table names, with the line of each, and no labels; their paths start at the table.

        Raises:
            DataError: there is no such file.
        """
        paths = [str(table.parent / path) for _, path in cells]
        rows = [f"{table} line {line}" for line, _ in cells]
        for row, path in zip(rows, paths, strict=True):
            if not os.path.isfile(path):
                problem = "is not a regular file" if os.path.exists(path) else "no such file"
                raise DataError(f"{problem}: {path}", where=row, hint="paths start at the CSV")
        return cls(paths, [None] * len(paths), rows=rows)


class FileSource(Source):
    """Image files with their labels, decoded one at a time.

    Args:
        name: the spec.
        paths: of the files.
        labels: of each, or the reason why there are none.
        class_names: in label order, where labels have names.
        rows: what a table calls each sample, e.g. ``labels.csv line 3``.
        notes: see :class:`Source`.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[str],
        labels: Sequence[RawTarget] | DataError,
        class_names: tuple[str, ...] | None,
        *,
        rows: Sequence[str] | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.paths = paths
        self.labels = labels
        self.class_names = class_names
        if class_names:
            self.num_classes = len(class_names)
        elif not isinstance(labels, DataError):
            numbers = [label for label in labels if isinstance(label, int)]
            self.num_classes = max(numbers) + 1 if len(numbers) == len(labels) else None
        self.rows = rows
        self.notes = notes

    @classmethod
    def of_table(
        cls,
        name: str,
        table: Path,
        files: Sequence[tuple[int, str]],
        labels: Sequence[RawTarget] | DataError,
        class_names: tuple[str, ...] | None = None,
    ) -> "FileSource":
        """Files that a table names, with the line of each; their paths start at the table.

        Raises:
            DataError: there is no such file.
        """
        found = Files.of_table(table, files)
        return cls(name, found.paths, labels, class_names, rows=found.rows)

    def __len__(self) -> int:
        return len(self.paths)

    def where(self, index: int) -> str:
        """The file's path, and the row that names it."""
        return self.paths[index] if self.rows is None else f"{self.paths[index]} ({self.rows[index]})"

    def load(self, index: int) -> tuple[Raw, RawTarget]:
        """The decoded image. EXIF orientation is ignored, as torchvision ignores it."""
        labels = self.labels
        return decode(self.paths[index]), labels if isinstance(labels, DataError) else labels[index]


def open_folder(spec: DataSpec) -> Source:
    """Open a folder of class folders; labels follow the sorted names, as in torchvision's ImageFolder."""
    files = folder_of_classes(spec.target, SUFFIXES, "images", "csv:FILE")
    return FileSource(spec.text, files.paths, files.labels, files.class_names, notes=files.notes)


def folder_of_classes(root: str, suffixes: tuple[str, ...], plural: str, table: str) -> Files:
    """The files of a folder with a folder for each class; without any, loose files that have no labels.

    Args:
        root: the folder.
        suffixes: of the files that are meant.
        plural: they are, in the plural, for messages.
        table: the form of data that names them in a table, for a hint.

    Raises:
        DataError: there are none, or none of some class.
    """
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(error.strerror or "cannot be read", where=root) from None
    names = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    files_of_class = {name: list(files_in(os.path.join(root, name))) for name in names}
    meant = {
        name: [path for path in files if is_one(path, suffixes)] for name, files in files_of_class.items()
    }
    loose = [entry.path for entry in entries if not entry.is_dir()]
    reading = f"{plural} of a class"
    if not any(meant.values()):
        hint = f"give one folder per class, or {table} with columns path,label"
        some = [path for path in loose if is_one(path, suffixes)]
        if not some:
            raise DataError(f"holds no class folders with {plural}", where=root, hint=hint)
        unlabelled = DataError(f"holds {plural} but no class folders", where=root, hint=hint)
        others = [path for path in loose if not is_one(path, suffixes)]
        note = left_out(root, others, set(), reading, suffixes)
        return Files(some, unlabelled, notes=(note,) if note else ())
    for name in names:
        if not meant[name]:
            raise DataError(
                f"holds no {plural} ({', '.join(suffixes)})",
                where=os.path.join(root, name),
                hint="add some, or remove the folder",
            )
    paths = [path for name in names for path in meant[name]]
    labels = [label for label, name in enumerate(names) for _ in meant[name]]
    all_files = [path for files in (loose, *files_of_class.values()) for path in files]
    others_note = left_out(root, all_files, set(paths), reading, suffixes)
    notes = tuple(filter(None, (others_note, _sorted_as_text(root, names))))
    return Files(paths, labels, tuple(names), notes)


def files_in(folder: str) -> Iterator[str]:
    """The files of a folder and of those in it, sorted."""
    for parent, _, names in sorted(os.walk(folder, followlinks=True)):
        yield from (os.path.join(parent, name) for name in sorted(names))


def is_image(path: str) -> bool:
    """True of a file that is no hidden one and has the suffix of an image."""
    return is_one(path, SUFFIXES)


def is_one(path: str, suffixes: tuple[str, ...]) -> bool:
    """True of a file that is no hidden one and has one of these suffixes."""
    name = os.path.basename(path)
    return name.lower().endswith(suffixes) and not name.startswith(".")


def left_out(
    root: str,
    files: Sequence[str],
    used: set[str],
    meant: str = "images of a class",
    suffixes: tuple[str, ...] = SUFFIXES,
) -> str | None:
    """Count the files that are not read, by suffix; hidden ones only where they are of those meant."""
    kinds: Counter[str] = Counter()
    for path in files:
        name = os.path.basename(path)
        suffix = os.path.splitext(name)[1].lower()
        if path in used or (name.startswith(".") and suffix not in suffixes):
            continue
        where = "hidden " if name.startswith(".") else "loose " if suffix in suffixes else ""
        kinds[f"{where}{short(suffix) or 'without suffix'}"] += 1
    if not kinds:
        return None
    counts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
    return f"{root}: left out files that are not read as {meant}: {counts}"


def _sorted_as_text(root: str, names: Sequence[str]) -> str | None:
    """Warn where folders named by numbers do not have those numbers' order."""
    if not all(name.isdecimal() for name in names):
        return None
    numbers = [int(name) for name in names]
    if numbers == sorted(numbers):
        return None
    at = next(i for i in range(1, len(names)) if numbers[i] < numbers[i - 1])
    return (
        f"{root}: class folders are sorted as text: '{names[at - 1]}' is class {at - 1}, '{names[at]}' class "
        f"{at}; pad the numbers with zeros, or number the classes with csv:"
    )
