"""One-line errors for networks that autograd refuses to train."""

import contextlib
import re
from collections.abc import Iterator

from torch import nn

from modelopt_cli.errors import UsageError

_SHOWN = 3
_REFUSALS = {
    ("inplace operation", "in-place operation", "modified inplace"): (
        "a value that its gradient needs is changed in place",
        "compute a new one: inplace=False, x = x + y, x.clone()",
    ),
    ("does not require grad",): (
        "no gradient leads from its outputs to its weights",
        "leave out no_grad() and detach() in its forward pass",
    ),
    ("backward through the graph a second time",): (
        "it keeps a value of one step for the next one",
        "compute it in each forward pass, or detach it",
    ),
}
"""Words of torch's messages, what they mean for the network, and what to do."""
_MADE_BY = re.compile(r"output \d+ of ([A-Za-z]+?)(?:Backward\d*)?\b", re.IGNORECASE)
"""The operation whose result torch says was changed."""


@contextlib.contextmanager
def refusals_in_one_line(network: nn.Module) -> Iterator[None]:
    """Around the forward and the backward pass of a network that is trained.

    Raises:
        UsageError: autograd refuses it; names the layers that work in place, if that is the reason.
    """
    try:
        yield
    except RuntimeError as error:
        for words, (cause, hint) in _REFUSALS.items():
            if any(word in str(error) for word in words):
                layers = _in_place(network) if "in place" in cause else []
                where = f"the network ({_listed(layers)})" if layers else "the network"
                operation = _MADE_BY.search(str(error))
                value = f" (that of {operation[1]})" if operation else ""
                raise UsageError(f"cannot be trained: {cause}{value}", where=where, hint=hint) from error
        raise


def _in_place(network: nn.Module) -> list[str]:
    """Layers that change what they are given, as far as can be seen."""
    return [name for name, module in network.named_modules() if getattr(module, "inplace", False)]


def _listed(layers: list[str]) -> str:
    more = f" and {len(layers) - _SHOWN} more" if len(layers) > _SHOWN else ""
    return f"in place: {', '.join(layers[:_SHOWN])}{more}"
