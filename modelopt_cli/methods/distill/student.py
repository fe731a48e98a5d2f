"""Students that are made from their teacher: thinner, or with fewer blocks.

Both keep what matters most to the teacher, by the criteria of ``prune``, and start from its weights.
"""

import re
from dataclasses import replace

from modelopt_cli.errors import UsageError
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.prune.apply import apply as prune
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.program import Program

_DERIVED = re.compile(r"(width|depth):(.*)", re.DOTALL)


def is_derived(spec: str) -> bool:
    """Whether ``--student`` names a part of the teacher."""
    return _DERIVED.fullmatch(spec) is not None


def derived(spec: str, teacher: Program, context: Context) -> Program:
    """The student that a part of the teacher is.

    Args:
        spec: ``width:F`` keeps a fraction F of the channels of every layer, those of the largest weights;
            ``depth:F`` a fraction F of the blocks that a network can do without, those that change their
            input most.
        teacher: it is not changed.
        context: seed, and what else pruning may look at.

    Raises:
        UsageError: no fraction, or a teacher that pruning refuses.
        GateNotMet: nothing can be taken out, or not so much.
    """
    found = _DERIVED.fullmatch(spec)
    assert found is not None
    kind, text = found.groups()
    try:
        left = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        left = 0.0
    if not 0 < left < 1:
        raise UsageError(f"{text!r} is no fraction between 0 and 1", where="--student")
    config = PruneConfig(
        structure="channels" if kind == "width" else "layers",
        sparsity=1 - left,
        allocation="uniform" if kind == "width" else PruneConfig.allocation,
        round_to=1,
    )
    return prune(teacher, config, replace(context, training=None, teachers=())).program
