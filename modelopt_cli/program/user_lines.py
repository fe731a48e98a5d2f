"""Lines of the user's own files, for messages about what their network does."""

import re
import sysconfig
import traceback
from pathlib import Path

import torch
from torch import nn

_LIBRARY = (sysconfig.get_path("stdlib"), str(Path(__file__).parent), str(Path(torch.__file__).parent))
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def line_raised(error: BaseException) -> str:
    """The last line of the user's own code that an error came through: ``net.py:12``; empty if none."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_users(f.filename)]
    return shown_line(frames[-1].filename, frames[-1].lineno) if frames else ""


def line_in(trace: str) -> str:
    """The last line of the user's own code in a printed traceback."""
    frames = [(file, line) for file, line in _FRAME.findall(trace) if is_users(file)]
    return shown_line(*frames[-1]) if frames else ""


def module_raised(error: BaseException, model: nn.Module) -> str:
    """The path of the innermost module of a network whose code an error came through; empty if none."""
    paths = {id(module): path for path, module in model.named_modules()}
    running = [
        paths.get(id(frame.f_locals.get("self")), "") for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    return next((path for path in reversed(running) if path), "")


def shown_line(file: str, line: int | str | None) -> str:
    """A line of a file in a message."""
    return f"{Path(file).name}:{line}"


def is_users(filename: str) -> bool:
    """True if code is neither torch's, nor ours, nor Python's own."""
    if filename.startswith(_LIBRARY[1:]) or filename.startswith("<"):
        return False
    return not filename.startswith(_LIBRARY[0]) or "site-packages" in filename
