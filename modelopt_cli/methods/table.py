"""Every compression method: one row each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from modelopt_cli.methods.context import Context, Result
from modelopt_cli.methods.distill.apply import apply as distill
from modelopt_cli.methods.distill.config import DistillConfig
from modelopt_cli.methods.prune.apply import apply as prune
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.methods.quantize.apply import apply as quantize
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.share.apply import apply as share
from modelopt_cli.methods.share.config import ShareConfig
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
    "distill": Method(config=DistillConfig, apply=distill),
    "prune": Method(config=PruneConfig, apply=prune),
    "quantize": Method(config=QuantizeConfig, apply=quantize),
    "share": Method(config=ShareConfig, apply=share),
}
"""By the name of the command, of the API function and of the page in ``docs/``."""
