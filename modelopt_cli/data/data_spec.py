"""Data specs, the values of ``--data``: their parser, and their options."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from modelopt_cli.data.data_kinds import DATA_KINDS, FORMS, DataKind, Options, Scalar
from modelopt_cli.errors import DataError
from modelopt_cli.settings import did_you_mean
from modelopt_cli.user_code import require_file

_NUMBER = re.compile(r"[+-]?((0|[1-9][0-9]{0,99})(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
"""A number as it is written in decimals: 007 is none, nor are 1_000 and nan."""

if TYPE_CHECKING:
    from modelopt_cli.data.source import Samples


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
    def says_task(self) -> bool:
        """True if what is opened may say its task."""
        says = self.row.says_task
        return bool(self.option(says)) if isinstance(says, str) else says

    @property
    def is_missing(self) -> bool:
        """True if the target is a path, and nothing is there."""
        return self.row.is_path and not os.path.exists(self.target)


def parse_spec(text: str) -> DataSpec:
    """Tell the kinds of ``--data`` apart without opening anything.

    Raises:
        DataError: it is of no kind, or has an option that its kind does not have; the nearest is named.
    """
    body, _, query = text.partition("?")
    prefix, _, target = body.partition(":")
    for name, kind in DATA_KINDS.items():
        if kind.target is None:
            parts = (_checked_target(text, name, target), query) if prefix == name else None
        else:
            parts = kind.target(text)
        if parts is not None:
            texts = _option_texts(text, parts[1])
            if not kind.any_option:
                _check_options(text, name, texts)
            options = {key: _read(value, kind.defaults.get(key)) for key, value in texts.items()}
            return DataSpec(text, name, parts[0], options)
    raise _unknown(text, body)


def require_possible(text: str) -> None:
    """Refuse data of which is known before torch is imported that they cannot be opened.

    Raises:
        DataError: as :func:`parse_spec`; or its file, folder or module is not there.
    """
    spec = parse_spec(text)
    require_file(spec.target, DataError)
    if spec.is_missing:
        thing = "file" if os.path.splitext(spec.target)[1] else "folder"
        raise DataError(f"no such {thing}", where=spec.target)


def same_samples(first: "Samples", second: "Samples") -> bool:
    """True if two data specs mean the same samples, however they are written.

    Raises:
        DataError: one of them is malformed, or its pattern matches nothing.
    """
    if not isinstance(first, str) or not isinstance(second, str):
        return first is second
    return parse_spec(first).canonical() == parse_spec(second).canonical()


def shows_inputs(samples: "Samples | None") -> bool:
    """True of samples that say what the network takes, False of those that are made for what it takes.

    Raises:
        DataError: the spec is malformed.
    """
    if not isinstance(samples, str):
        return samples is not None
    return not parse_spec(samples).row.for_network


def _checked_target(text: str, name: str, target: str) -> str:
    kind = DATA_KINDS[name]
    if target and not kind.takes_target:
        raise DataError(f"{name} takes no path", where=text, hint=f"write {name}")
    if not target and kind.needs_target:
        raise DataError(f"{name}: needs something after the colon", where=text, hint=f"give {FORMS}")
    return target


def _unknown(text: str, body: str) -> DataError:
    """The error about a text that is of no kind."""
    path = Path(text)
    if path.is_file():
        meant = next((row for row in DATA_KINDS.values() if row.suffix == path.suffix != ""), None)
        step = f"give {FORMS}"
        if meant is not None:
            step = "write " + re.sub(r"FILE\.py|FILE|PATTERN", lambda _: text, meant.form)
        return DataError("is a file, not a folder of class folders", where=text, hint=step)
    prefix, colon, _ = body.partition(":")
    hint = did_you_mean(prefix, [name for name, kind in DATA_KINDS.items() if kind.target is None])
    if hint is None and (not colon or "/" in prefix):
        return DataError("no such folder", where=text, hint=f"give {FORMS}")
    return DataError(f"no data kind is called {prefix!r}", where=text, hint=hint or f"give {FORMS}")


def option_texts(spec: DataSpec) -> dict[str, str]:
    """The options of a spec as they were written."""
    return _option_texts(spec.text, spec.text.partition("?")[2])


def _option_texts(text: str, query: str) -> dict[str, str]:
    if not query:
        return {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True)
    except ValueError:
        raise DataError("options must read ?key=value&key=value", where=text) from None
    options: dict[str, str] = {}
    for key, value in pairs:
        if key in options:
            raise DataError(f"option {key!r} is given twice", where=text)
        options[key] = value
    return options


def _read(value: str, default: Scalar | None) -> Scalar:
    """The value of an option: where it is a text, such as the name of a column, as it is written."""
    if isinstance(default, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not _NUMBER.fullmatch(value):
        return value
    return float(value) if set(value) & set(".eE") else int(value)


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
        hint = did_you_mean(value, allowed) or f"choose from {', '.join(filter(None, allowed))}"
        raise DataError(f"{key} is {value!r}", where=spec.text, hint=hint)
    return value


def column(spec: DataSpec, key: str) -> str:
    """The column that an option names, or its default; raises DataError where it is given and empty."""
    name = str(spec.option(key))
    if key in spec.options and not name.strip():
        raise DataError(f"{key} is empty", where=spec.text, hint=f"name a column: ?{key}=NAME")
    return name


def columns(spec: DataSpec, key: str) -> list[str]:
    """The columns that an option names, none where it is not given.

    Raises:
        DataError: a name is empty, or there twice.
    """
    text = column(spec, key)
    names = [name.strip() for name in text.split(",")] if text else []
    for place, name in enumerate(names):
        if not name or name in names[:place]:
            problem = f"{key} names {name!r} twice" if name else f"{key} has an empty name: {text!r}"
            raise DataError(problem, where=spec.text, hint="name each column once, with commas between")
    return names


def whole_number(spec: DataSpec, key: str, largest: int = 2**31 - 1) -> int:
    """The value of an option that is an integer above 0, or 0 where it is not given.

    Raises:
        DataError: it is another.
    """
    value = spec.option(key)
    if key not in spec.options:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= largest:
        hint = f"give 1 to {largest}, or leave it out"
        raise DataError(f"{key} is {value!r}, not an integer above 0", where=spec.text, hint=hint)
    return value


def sides(spec: DataSpec) -> tuple[str, str]:
    """Both sides of the ``@`` in a target; raises DataError where one is missing."""
    first, _, second = spec.target.partition("@")
    if not first or not second:
        raise DataError("names one of two places", where=spec.text, hint=f"write {spec.row.form}")
    return first, second
