"""Data specs, the values of ``--data``: kinds of data, one row each, and the parser of their options."""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import parse_qsl

from modelopt_cli.data.shards import find_shards
from modelopt_cli.errors import DataError
from modelopt_cli.lazy_names import deferred
from modelopt_cli.settings import did_you_mean

if TYPE_CHECKING:
    from modelopt_cli.data.source import Samples

Scalar: TypeAlias = bool | int | float | str
Options: TypeAlias = Mapping[str, Scalar]

_CALLABLE = re.compile(r"(?P<module>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*)")


@dataclass(frozen=True)
class DataKind:
    """Kind of data that ``--data`` can name.

    Attributes:
        help: one line for the documentation.
        form: how it is written.
        open: makes a ``Source`` or a ``Stream`` of a :class:`DataSpec`.
        defaults: its options.
        any_option: options are the dataset's own; ``defaults`` are then only those that it is known to have.
        is_path: the target is the path of a file or a folder.
        canonical: the target in one spelling for all that mean the same; by default as it is written, or a
            path with its links followed.
        needs_target: something must follow the colon.
        takes_target: something may follow the colon.
        sharded: the target is a pattern, which may match several files.
        suffix: of a file that is likely to be meant by it.
        target: the target in a text, and the options after it, where the text is no ``NAME:TARGET``; or None.
        follows_network: ``open`` takes the shape of the network's input, a seed and its type, too.
        labelled: there may be labels.
    """

    help: str
    form: str
    open: Callable[..., Any]
    defaults: Options = field(default_factory=dict)
    any_option: bool = False
    is_path: bool = False
    canonical: Callable[[str], list[str]] | None = None
    needs_target: bool = True
    takes_target: bool = True
    sharded: bool = False
    suffix: str = ""
    target: Callable[[str], tuple[str, str] | None] | None = None
    follows_network: bool = False
    labelled: bool = True


@dataclass(frozen=True)
class DataSpec:
    """Parsed value of ``--data``.

    Attributes:
        text: the value as it was given.
        kind: one of ``DATA_KINDS``.
        target: the path, the pattern of paths, ``NAME@ROOT``, ``FILE.py:CALLABLE`` or shape.
        options: those after the ``?``.
    """

    text: str
    kind: str
    target: str
    options: Options = field(default_factory=dict)

    @property
    def row(self) -> DataKind:
        """The row of its kind."""
        return DATA_KINDS[self.kind]

    def option(self, name: str) -> Scalar:
        """The value of an option, or its default."""
        return self.options.get(name, self.row.defaults[name])

    def canonical(self) -> tuple[str, list[str], Options]:
        """Kind, target and options in one spelling, with defaults spelt out."""
        targets = [str(Path(self.target).resolve())] if self.row.is_path else [self.target]
        if self.row.canonical is not None:
            targets = self.row.canonical(self.target)
        return self.kind, targets, {**self.row.defaults, **self.options}

    @property
    def is_missing(self) -> bool:
        """True if the target is a path, and nothing is there."""
        return self.row.is_path and not os.path.exists(self.target)


def _folder(text: str) -> tuple[str, str] | None:
    return (text, "") if Path(text).is_dir() else None


def _callable(text: str) -> tuple[str, str] | None:
    """``FILE.py:NAME`` or ``package.module:NAME``, where that is no slip in the name of a kind."""
    body, _, query = text.partition("?")
    place, _, name = body.partition(":")
    # A shard's name has a dot: MODULE:NAME is no slip in tar:, and modules are called target or start.
    kinds = [known for known, kind in DATA_KINDS.items() if kind.target is None and not kind.sharded]
    if not place.endswith(".py") and (not _CALLABLE.fullmatch(body) or did_you_mean(place, kinds)):
        return None
    if not name.isidentifier():
        raise DataError("names no callable", where=text, hint="write FILE.py:CALLABLE")
    return body, query


def _at_root(target: str) -> list[str]:
    name, at, root = target.partition("@")
    return [f"{name}{at}{Path(root).resolve()}"]


def _shards(target: str) -> list[str]:
    return [os.path.realpath(path) for path in find_shards(target)]


_ROOM = "modelopt_cli.data"

DATA_KINDS: dict[str, DataKind] = {
    "folder": DataKind(
        "images in one folder for each class; labels follow the names of the folders sorted as text, as in "
        "torchvision's `ImageFolder`",
        "DIR",
        deferred(f"{_ROOM}.images", "open_folder"),
        is_path=True,
        target=_folder,
    ),
    "csv": DataKind(
        "table with columns `path,label`; paths start at the file; labels are integers from 0, or class "
        "names, which are numbered in sorted order",
        "csv:FILE",
        deferred(f"{_ROOM}.csv_file", "open_csv"),
        is_path=True,
        suffix=".csv",
    ),
    "tar": DataKind(
        "tar shards as WebDataset writes them: `0001.jpg` and `0001.cls` are one sample",
        "tar:PATTERN",
        deferred(f"{_ROOM}.tar", "open_tar"),
        canonical=_shards,
        sharded=True,
        suffix=".tar",
    ),
    "parquet": DataKind(
        "Parquet files with a column of encoded images, or Hugging Face's struct of `bytes` and `path`, and "
        "one of labels, integers from 0; needs `pip install 'modelopt-cli[parquet]'`",
        "parquet:PATTERN",
        deferred(f"{_ROOM}.parquet", "open_parquet"),
        {"image": "image", "label": "label"},
        canonical=_shards,
        sharded=True,
        suffix=".parquet",
    ),
    "idx": DataKind(
        "IDX files of the MNIST family, plain or `.gz`; also `?split=train`",
        "idx:DIR",
        deferred(f"{_ROOM}.arrays", "open_idx"),
        {"split": "test"},
        is_path=True,
    ),
    "npz": DataKind(
        "NumPy arrays: images in `x`, `images` or `data`, labels in `y` or `labels`; never pickled objects",
        "npz:FILE",
        deferred(f"{_ROOM}.arrays", "open_npz"),
        is_path=True,
        suffix=".npz",
    ),
    "torchvision": DataKind(
        "a class of `torchvision.datasets` with its own options, such as `?train=true`; by default the test "
        "split, or the validation split where no test labels are published",
        "torchvision:NAME@ROOT",
        deferred(f"{_ROOM}.dataset_sources", "open_torchvision"),
        {"split": "test"},
        any_option=True,
        canonical=_at_root,
    ),
    "callable": DataKind(
        "a function or class of yours, called with the options as arguments, that returns a map- or "
        "iterable-style Dataset of (float tensor already preprocessed, integer label), or of tensors alone; "
        "also `package.module:CALLABLE`",
        "FILE.py:CALLABLE",
        deferred(f"{_ROOM}.dataset_sources", "open_callable"),
        any_option=True,
        suffix=".py",
        target=_callable,
    ),
    "digits": DataKind(
        "1,797 bundled 8x8 digits; also `?split=train` and `?split=all`",
        "digits",
        deferred(f"{_ROOM}.arrays", "open_digits"),
        {"split": "test"},
        needs_target=False,
        takes_target=False,
    ),
    "synthetic": DataKind(
        "seeded noise without labels, `n` samples; `synthetic:128:int64?below=30000` gives integers from 0 "
        "to 29,999; without a shape, that of the network's input",
        "synthetic:3x224x224",
        deferred(f"{_ROOM}.synthetic", "open_synthetic"),
        {"n": 256, "below": 2},
        needs_target=False,
        follows_network=True,
        labelled=False,
    ),
}
"""Every kind by its name, in the order in which a text is compared with them."""

_FORMS = "a folder of class folders, " + ", ".join(kind.form for kind in list(DATA_KINDS.values())[1:])


def parse_spec(text: str) -> DataSpec:
    """Tell the kinds of ``--data`` apart without opening anything.

    Raises:
        DataError: it is of no kind, or has an option that its kind does not have; the nearest is named.
    """
    body, _, query = text.partition("?")
    prefix, _, rest = body.partition(":")
    for name, kind in DATA_KINDS.items():
        if kind.target is None:
            parts = (_checked_target(text, name, rest), query) if prefix == name else None
        else:
            parts = kind.target(text)
        if parts is not None:
            options = _options(text, parts[1])
            if not kind.any_option:
                _check_options(text, name, options)
            return DataSpec(text, name, parts[0], options)
    raise _unknown(text, body)


def same_samples(one: "Samples", other: "Samples") -> bool:
    """True if two data specs mean the same samples, however they are written.

    Raises:
        DataError: one of them is malformed, or its pattern matches nothing.
    """
    if not isinstance(one, str) or not isinstance(other, str):
        return one is other
    return parse_spec(one).canonical() == parse_spec(other).canonical()


def _checked_target(text: str, name: str, target: str) -> str:
    kind = DATA_KINDS[name]
    if target and not kind.takes_target:
        raise DataError(f"{name} takes no path", where=text, hint=f"write {name}")
    if not target and kind.needs_target:
        raise DataError(f"{name}: needs something after the colon", where=text, hint=f"give {_FORMS}")
    return target


def _unknown(text: str, body: str) -> DataError:
    """The error about a text that is of no kind."""
    path = Path(text)
    if path.is_file():
        meant = next((row for row in DATA_KINDS.values() if row.suffix == path.suffix != ""), None)
        step = f"give {_FORMS}"
        if meant is not None:
            step = "write " + re.sub(r"FILE\.py|FILE|PATTERN", lambda _: text, meant.form)
        return DataError("is a file, not a folder of class folders", where=text, hint=step)
    prefix, colon, _ = body.partition(":")
    hint = did_you_mean(prefix, [name for name, kind in DATA_KINDS.items() if kind.target is None])
    if hint is None and (not colon or "/" in prefix):
        return DataError("no such folder", where=text, hint=f"give {_FORMS}")
    return DataError(f"no data kind is called {prefix!r}", where=text, hint=hint or f"give {_FORMS}")


def _options(text: str, query: str) -> dict[str, Scalar]:
    if not query:
        return {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True)
    except ValueError:
        raise DataError("options must read ?key=value&key=value", where=text) from None
    options: dict[str, Scalar] = {}
    for key, value in pairs:
        if key in options:
            raise DataError(f"option {key!r} is given twice", where=text)
        options[key] = _literal(value)
    return options


def _literal(value: str) -> Scalar:
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for number in (int, float):
        try:
            return number(value)
        except ValueError:
            continue
    return value


def _check_options(text: str, name: str, options: Iterable[str]) -> None:
    known = DATA_KINDS[name].defaults
    for key in options:
        if key not in known:
            hint = did_you_mean(key, known) or f"it takes {', '.join(known) or 'no options'}"
            raise DataError(f"{name} data has no option {key!r}", where=text, hint=hint)


def choice(spec: DataSpec, key: str, allowed: tuple[str, ...]) -> str:
    """The value of an option that is one of a few words.

    Raises:
        DataError: it is another.
    """
    value = str(spec.option(key))
    if value not in allowed:
        hint = did_you_mean(value, allowed) or f"choose from {', '.join(allowed)}"
        raise DataError(f"{key} is {value!r}", where=spec.text, hint=hint)
    return value
