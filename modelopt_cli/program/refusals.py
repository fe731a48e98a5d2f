"""Reasons why a network cannot be a Program, each with what to write instead."""

from dataclasses import dataclass

from torch import fx

from modelopt_cli.errors import CaptureError
from modelopt_cli.program.allowlist import ATTRIBUTES, METHODS, function_name
from modelopt_cli.program.calls import owner_of
from modelopt_cli.text import is_too_deep


@dataclass(frozen=True)
class Refusal:
    """A reason, in words that do not depend on how it was found.

    Attributes:
        message: what the network does.
        hint: what to write instead.
    """

    message: str
    hint: str

    def error(self, where: str | None = None) -> CaptureError:
        """The error to raise; ``where`` is the layer and line."""
        return CaptureError(self.message, where=where, hint=self.hint)


BATCH = Refusal(
    "the batch size is needed as a number",
    "a Program must work at any batch size: reshape with -1, or treat the batch as a whole",
)
VALUES = Refusal(
    "control flow depends on the values in a tensor",
    "a Program takes the same path for every input; compute both and choose with torch.where",
)
SIZES = Refusal(
    "the size of a tensor depends on the values in another",
    "keep the size and mark what is left out: torch.where(mask, x, 0) in place of x[mask]",
)
CHANCE = Refusal(
    "draws random numbers, which a Program cannot", "make them an input of the network, or switch them off"
)
DEPTH = Refusal(
    "the forward pass is nested too deep to be followed",
    "call fewer modules and functions inside one another",
)
DATA = Refusal(
    "assigns to a tensor's attribute 'data'",
    "compute a new tensor: y = f(x) in place of x.data = f(x)",
)


def not_listed(called: str) -> Refusal:
    """A call of something that is not on the allow-list."""
    return Refusal(
        f"calls {called}, which a Program cannot hold",
        "put it into a form that uses ordinary torch functions",
    )


def refuse_calls_not_listed(graph: fx.Graph) -> None:
    """Raise CaptureError for the first call that is not on the allow-list."""
    for node in graph.nodes:
        if node.op == "call_method" and node.target not in METHODS:
            raise not_listed(f"Tensor.{node.target}").error(owner_of(node))
        if node.op == "call_function" and function_name(node.target) is None:
            module = getattr(node.target, "__module__", None) or ""
            called = f"{module}.{getattr(node.target, '__name__', node.target)}".strip(".")
            raise not_listed(called).error(owner_of(node))
        if node.op == "call_function" and node.target is getattr and node.args[1] not in ATTRIBUTES:
            raise not_listed(f"the attribute {node.args[1]}").error(owner_of(node))


class Unfollowed(CaptureError):
    """A failure that says little of its cause, which another tracer may know better."""


def unfollowed(error: BaseException, where: str | None = None) -> Unfollowed:
    """An exception of the network's own code, or one that it met because it was traced."""
    if is_too_deep(error):
        return Unfollowed(DEPTH.message, where=where, hint=DEPTH.hint)
    line = (str(error).strip().splitlines() or [""])[0][:300]
    return Unfollowed(
        f"{type(error).__name__} while following the forward pass: {line}",
        where=where,
        hint="a Program needs a forward pass whose path depends on sizes only",
    )
