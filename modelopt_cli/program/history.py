"""Entries of a Program's history: what was done to it, with nothing that differs from one run to the next."""

from collections.abc import Mapping
from typing import Any

import torch


def history_entry(
    method: str,
    config: Mapping[str, Any],
    *,
    seed: int,
    origin: Mapping[str, Any],
    skipped: Mapping[str, str] | None = None,
    **figures: Any,
) -> dict[str, Any]:
    """One entry, JSON-able.

    Args:
        method: name of the command.
        config: its settings, JSON-able.
        seed: of everything random.
        origin: keys about the source, such as its SHA-256; None values are left out.
        skipped: the reason for every layer that was left as it was, by name.
        figures: more keys.
    """
    return {
        "method": method,
        "config": dict(config),
        "seed": seed,
        "torch": str(torch.__version__),
        "skipped": dict(skipped or {}),
        **figures,
        **origin,
    }
