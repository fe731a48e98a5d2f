"""JSON with one way to write a value, and no way to read an ambiguous one."""

import json
import math
from typing import Any, NoReturn

from modelopt_cli.errors import InputError, ModeloptError

_MAX_DEPTH = 64
MAX_ITEMS = 1_000_000
"""Commas that a header may have: so many small objects already take 300 MB of memory and a second."""


def canonical(value: Any) -> bytes:
    """Sorted keys, no spaces, UTF-8, finite numbers: equal values give equal bytes.

    Raises:
        ModeloptError: ``value`` is not plain JSON data (a bug of the caller).
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ModeloptError(f"cannot be stored as JSON: {error}") from error


def parse(data: bytes, error: type[InputError], where: str) -> dict[str, Any]:
    """Read one JSON object, strictly.

    Args:
        data: UTF-8 text that starts with ``{`` and may end in spaces.
        error: what to raise.
        where: the file, for the message.

    Raises:
        InputError: of the class ``error``: not UTF-8, not JSON, not an object, a key twice in one
            object at any level, a number that is not finite, nested too deeply, too many values.
    """

    def refuse(problem: str) -> NoReturn:
        raise error(f"the header {problem}", where=where, hint="the file is damaged or forged")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            refuse(f"has the key {twice[:80]!r} twice")
        return mapping

    def finite(text: str) -> float:
        number = float(text)
        return number if math.isfinite(number) else refuse("holds a number that is not finite")

    if not data.startswith(b"{"):
        refuse("does not start with '{'")
    if data.count(b",") > MAX_ITEMS:
        refuse(f"lists more than {MAX_ITEMS:,} things")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        refuse("is not UTF-8")
    try:
        value = json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    except RecursionError:
        refuse("is nested too deeply")
    except ValueError:
        refuse("is not valid JSON")
    if _depth(value) > _MAX_DEPTH:
        refuse("is nested too deeply")
    if "\\ud" in text.lower() and not _is_text(value):
        refuse("holds half a character")
    assert isinstance(value, dict)
    return value


def _is_text(value: Any) -> bool:
    """True if every string can be written as UTF-8: escapes may spell lone surrogates."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _depth(value: Any) -> int:
    deepest, pending = 0, [(value, 1)]
    while pending:
        item, level = pending.pop()
        deepest = max(deepest, level)
        if isinstance(item, dict):
            pending.extend((inner, level + 1) for inner in item.values())
        elif isinstance(item, list):
            pending.extend((inner, level + 1) for inner in item)
    return deepest
