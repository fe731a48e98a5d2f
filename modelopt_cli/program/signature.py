"""Check of the arguments that a network's ``forward`` needs."""

import inspect

from torch import nn

from modelopt_cli.errors import CaptureError


def require_one_input(model: nn.Module) -> None:
    """Refuse a network that cannot be called with one tensor.

    Raises:
        CaptureError: names the inputs that its ``forward`` asks for.
    """
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # not written in Python
        return
    needed = [
        p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if len(needed) > 1:
        raise CaptureError(
            f"its forward needs {len(needed)} inputs ({', '.join(needed)}), and a sample is one",
            hint="wrap it in a module that makes the others",
        )
