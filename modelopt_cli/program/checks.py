"""Use of values that computes nothing: checks and messages, which a Program leaves out.

A check is an ``assert``, or an ``if`` one side of which only raises. It decides nothing but whether there is
a result at all.
"""

import dis
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import Any

import torch

_RAISING = "RAISE_VARARGS"


@contextmanager
def without_values() -> Iterator[None]:
    """Let checks pass, and messages be written, though nothing is known of what is in a tensor."""
    patches: dict[tuple[type, str], Any] = {(torch.Tensor, "__format__"): _formatted}
    for kind in (torch.Tensor, torch.SymBool):
        patches[kind, "__bool__"] = _deciding(kind.__bool__)
    before = {(kind, name): vars(kind).get(name) for kind, name in patches}
    for (changed, name), function in patches.items():
        setattr(changed, name, function)
    try:
        yield
    finally:
        for (changed, name), function in before.items():
            if function is None:  # inherited
                delattr(changed, name)
            else:
                setattr(changed, name, function)


def _formatted(self: torch.Tensor, format_spec: str) -> str:
    return f"tensor of shape {tuple(self.shape)}"


def _deciding(original: Any) -> Any:
    def decide(self: Any) -> bool:
        try:
            return bool(original(self))
        except Exception:  # whatever export raises for want of a value
            outcome = outcome_of_check(inspect.currentframe())
            if outcome is None:
                raise
            return outcome

    # Torch notes the line that decides on a size, and skips lines of its own.
    torchs = str(import_module("torch.fx.experimental.symbolic_shapes").__file__)
    decide.__code__ = decide.__code__.replace(co_filename=torchs)
    return decide


def outcome_of_check(frame: FrameType | None) -> bool | None:
    """The truth value with which a check passes; None where what asks for one is no check.

    Args:
        frame: of the ``__bool__`` that was called.
    """
    caller = frame.f_back if frame is not None else None
    if caller is None:
        return None
    code = list(dis.get_instructions(caller.f_code))
    at = next(i for i, each in enumerate(code) if each.offset == caller.f_lasti)
    jump = next((i for i in range(at, min(at + 3, len(code))) if _jumps_on_truth(code[i].opname)), None)
    if jump is None:
        return None
    target = next(i for i, each in enumerate(code) if each.offset == code[jump].argval)
    raises = [_only_raises(code, start) for start in (jump + 1, target)]
    if raises[0] == raises[1]:
        return None
    return ("TRUE" in code[jump].opname) == raises[0]


def _jumps_on_truth(name: str) -> bool:
    return name.endswith(("IF_TRUE", "IF_FALSE"))


def _only_raises(code: list[dis.Instruction], start: int) -> bool:
    """True if what runs from here comes to a ``raise`` before any jump or return."""
    for each in code[start:]:
        if each.opname == _RAISING:
            return True
        if "JUMP" in each.opname or "RETURN" in each.opname:
            return False
    return False
