"""Every compression method: one row each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from modelopt_cli.methods import distill, prune, quantize, share
from modelopt_cli.methods.context import Context, Result
from modelopt_cli.methods.prune.apply import apply as apply_prune
from modelopt_cli.program import Program


@dataclass(frozen=True)
class Method:
    """One way to compress a Program.

    Attributes:
        config: frozen dataclass that says what to do; its fields are the command's options.
        apply: does it: ``apply(program, config, context)`` with an instance of ``config``. The
            Program given is left as it is; the new one's history is one entry longer, and that
            entry's ``method`` is the row's name.
    """

    config: type[Any]
    apply: Callable[[Program, Any, Context], Result]


METHODS: dict[str, Method] = {
    "distill": Method(config=distill.DistillConfig, apply=distill.apply),
    "prune": Method(config=prune.PruneConfig, apply=apply_prune),
    "quantize": Method(config=quantize.QuantizeConfig, apply=quantize.apply),
    "share": Method(config=share.ShareConfig, apply=share.apply),
}
"""By the name of the command, of the API function and of the page in ``docs/``."""
