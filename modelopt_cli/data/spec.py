"""The grammar of ``--data``: which kind of source, where it is, and its ``?key=value`` options."""

import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl

from modelopt_cli.data.shards import find_shards
from modelopt_cli.data.source import Options, Scalar
from modelopt_cli.errors import DataError

KINDS = ("csv", "tar", "parquet", "idx", "torchvision", "npz", "digits", "synthetic")
FORMS = (
    "a folder with one folder per class, csv:FILE, tar:PATTERN, parquet:PATTERN, idx:DIR, "
    "torchvision:NAME@ROOT, npz:FILE, FILE.py:CALLABLE, digits or synthetic:3x224x224"
)

_SHARDED = ("tar", "parquet")

_CALLABLE = re.compile(r"(?P<module>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*)")


@dataclass(frozen=True)
class DataSpec:
    """A parsed ``--data`` value.

    Attributes:
        text: the value as it was given.
        kind: ``folder``, ``callable`` or one of ``KINDS``.
        target: the path, the pattern of paths, ``NAME@ROOT``, ``FILE.py:CALLABLE`` or shape.
        options: what followed the ``?``.
    """

    text: str
    kind: str
    target: str
    options: Options = field(default_factory=dict)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like ``word``, or None if none is close."""
    found = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def parse_spec(text: str) -> DataSpec:
    """Tell the kinds of ``--data`` apart without opening anything.

    Raises:
        DataError: no kind fits; the message names the nearest one.
    """
    if Path(text).is_dir():
        return DataSpec(text, "folder", text)
    body, _, query = text.partition("?")
    kind, colon, target = body.partition(":")
    if kind in KINDS:
        return DataSpec(text, kind, _target(text, kind, target if colon else ""), _options(text, query))
    # A shard's name has a dot: MODULE:NAME is no slip in tar:, and modules are called target or start.
    short = [known for known in KINDS if known not in _SHARDED]
    if kind.endswith(".py") or (_CALLABLE.fullmatch(body) and nearest(kind, short) is None):
        if not target.isidentifier():
            raise DataError("names no callable", where=text, hint="write FILE.py:CALLABLE")
        return DataSpec(text, "callable", body, _options(text, query))
    raise _unknown(text, kind if colon else body, target if colon else None)


def same_samples(one: str, other: str) -> bool:
    """Whether two values of ``--data`` mean the same samples, however they are written.

    Raises:
        DataError: one of them is malformed, or its pattern matches nothing.
    """
    return _canonical(parse_spec(one)) == _canonical(parse_spec(other))


def _canonical(spec: DataSpec) -> tuple[str, list[str], dict[str, Scalar]]:
    """Kind, targets and options, with patterns and links followed, paths absolute, defaults spelt out."""
    if spec.kind in _SHARDED:
        defaults = {"image": "image", "label": "label"} if spec.kind == "parquet" else {}
        return (
            spec.kind,
            [os.path.realpath(path) for path in find_shards(spec.target)],
            {**defaults, **spec.options},
        )
    name, at, place = spec.target.partition("@") if spec.kind == "torchvision" else ("", "", spec.target)
    if spec.kind in ("folder", "csv", "idx", "npz", "torchvision"):
        place = str(Path(place).resolve())
    return spec.kind, [f"{name}{at}{place}"], {"split": "test", **spec.options}


def _target(text: str, kind: str, target: str) -> str:
    if kind == "digits" and target:
        raise DataError("digits takes no path", where=text, hint="write digits or digits?split=train")
    if not target and kind not in ("digits", "synthetic"):
        raise DataError(f"{kind}: needs something after the colon", where=text, hint=f"give {FORMS}")
    return target


def _unknown(text: str, kind: str, target: str | None) -> DataError:
    path = Path(text)
    if path.is_file():
        schemes = {f".{kind}": f"{kind}:{text}" for kind in ("csv", "npz", *_SHARDED)}
        scheme = {**schemes, ".py": f"{text}:CALLABLE"}.get(path.suffix)
        hint = f"write {scheme}" if scheme else f"give {FORMS}"
        return DataError("is a file, not a folder of class folders", where=text, hint=hint)
    guess = nearest(kind, KINDS)
    if guess is not None:
        return DataError(
            f"no data kind is called {kind!r}",
            where=text,
            hint=f"did you mean {guess}{':' if target else ''}",
        )
    if target is None or "/" in kind:
        return DataError("no such folder", where=text, hint=f"give {FORMS}")
    return DataError(f"no data kind is called {kind!r}", where=text, hint=f"give {FORMS}")


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


def check_options(spec: DataSpec, known: Iterable[str]) -> None:
    """Refuse an option the kind does not have, naming the nearest it has.

    Raises:
        DataError: an option is unknown.
    """
    known = tuple(known)
    for key in spec.options:
        if key not in known:
            guess = nearest(key, known)
            hint = f"did you mean {guess}" if guess else f"it takes {', '.join(known) or 'no options'}"
            raise DataError(f"{spec.kind} data has no option {key!r}", where=spec.text, hint=hint)


def choice(spec: DataSpec, key: str, allowed: tuple[str, ...], default: str) -> str:
    """The value of an option that is one of a few words."""
    value = str(spec.options.get(key, default))
    if value not in allowed:
        guess = nearest(value, allowed)
        hint = f"did you mean {guess}" if guess else f"choose from {', '.join(allowed)}"
        raise DataError(f"{key} is {value!r}", where=spec.text, hint=hint)
    return value
