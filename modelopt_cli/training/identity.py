"""Identity of a result that is kept on disk, as a JSON object, compared with the one of today."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

_NONE = object()
_SHOWN = 40


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Every entry of two JSON objects that differs, with both values, shortened; empty if none does."""
    old, new = dict(_flat(before)), dict(_flat(now))
    names = [name for name in (*old, *new) if old.get(name, _NONE) != new.get(name, _NONE)]
    return ", ".join(
        f"{name} ({_shown(old.get(name, _NONE))}, now {_shown(new.get(name, _NONE))})"
        for name in dict.fromkeys(names)
    )


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield prefix + key, inner


def _shown(value: Any) -> str:
    text = "nothing" if value is _NONE else json.dumps(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
