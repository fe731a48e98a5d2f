"""Students that are made from their teacher: thinner, or with fewer blocks.

Both keep what matters most to the teacher, by the criteria of ``prune``, and start from its weights.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from modelopt_cli.errors import UsageError
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.prune.apply import apply as prune
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.program import Program
from modelopt_cli.settings import fraction, option


@dataclass(frozen=True)
class Derivation:
    """Part of a teacher that can be its student.

    Attributes:
        help: the part, of which ``--student NAME:F`` keeps a fraction F.
        prune: settings of ``prune``, next to the fraction to remove.
    """

    help: str
    prune: Mapping[str, str]


DERIVATIONS: dict[str, Derivation] = {
    "width": Derivation(
        "channels of every layer, those of the largest weights",
        {"structure": "channels", "allocation": "uniform"},
    ),
    "depth": Derivation(
        "blocks that a network can do without, those that change their input most", {"structure": "layers"}
    ),
}
_DERIVED = re.compile(f"({'|'.join(DERIVATIONS)}):(.*)", re.DOTALL)


def is_derived(spec: str) -> bool:
    """True if ``--student`` names a part of the teacher."""
    return _DERIVED.fullmatch(spec) is not None


def derived(spec: str, teacher: Program, context: Context) -> Program:
    """Student that is a part of the teacher.

    Args:
        spec: ``NAME:F`` with a key of ``DERIVATIONS`` and the fraction to keep.
        teacher: it is not changed.
        context: seed, and what else pruning may look at.

    Raises:
        UsageError: no fraction, or a teacher that pruning refuses.
        GateNotMet: nothing can be taken out, or not so much.
    """
    match = _DERIVED.fullmatch(spec)
    assert match is not None
    name, text = match.groups()
    try:
        kept = fraction(text)
    except ValueError:
        kept = 0.0
    if not 0 < kept < 1:
        raise UsageError(f"{text!r} is no fraction between 0 and 1", where=option("student"))
    settings: dict[str, Any] = dict(DERIVATIONS[name].prune)
    config = PruneConfig(sparsity=1 - kept, round_to=1, **settings)
    return prune(teacher, config, replace(context, training=None)).program
