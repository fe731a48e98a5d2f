"""Entries of a Program's history: what was done to it, with nothing that differs from one run to the next."""

from collections.abc import Mapping
from typing import Any

import torch

from modelopt_cli.program.coverage import Coverage, recorded


def history_entry(
    method: str,
    config: Mapping[str, Any],
    *,
    seed: int,
    origin: Mapping[str, Any],
    skipped: Mapping[str, str] | None = None,
    covered: Coverage | None = None,
    **figures: Any,
) -> dict[str, Any]:
    """One entry, JSON-able.

    Args:
        method: name of the command.
        config: its settings, JSON-able.
        seed: of everything random.
        origin: keys about the source, such as its SHA-256; None values are left out.
        skipped: the reason for every layer that was left as it was, by name.
        covered: which layers are compressed by now.
        figures: more keys.
    """
    entry = {
        "method": method,
        "config": dict(config),
        "seed": seed,
        "torch": str(torch.__version__),
        "skipped": dict(skipped or {}),
        **figures,
        **origin,
    }
    return entry if covered is None else with_coverage(entry, covered)


def with_coverage(entry: Mapping[str, Any], covered: Coverage) -> dict[str, Any]:
    """The entry with the number of compressed layers and of all."""
    return {**entry, **recorded(covered)}
