"""Find a callable the user named: ``FILE.py:CALLABLE`` or ``package.module:CALLABLE``.

It runs because they asked for it on the command line; nothing found inside a file ever gets here.
"""

import importlib
import importlib.util
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from modelopt_cli.errors import DataError


def first_line(error: BaseException) -> str:
    """An exception as one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def load_callable(target: str) -> Callable[..., Any]:
    """Import what stands before the last colon and return what stands after it.

    Raises:
        DataError: the module cannot be imported or has no such callable.
    """
    module_name, _, name = target.rpartition(":")
    module = _from_file(Path(module_name)) if module_name.endswith(".py") else _by_name(module_name)
    found = getattr(module, name, None)
    if not callable(found):
        what = f"has no callable {name}" if found is None else f"{name} is not callable"
        raise DataError(what, where=module_name)
    return found  # type: ignore[no-any-return]


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise DataError("no such file", where=str(path))
    path = path.resolve()
    # Named after the path, so that two files of one name do not collide and pickling finds the module again.
    name = f"modelopt_user_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _make_importable(path.parent)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise DataError(f"cannot be imported ({first_line(error)})", where=str(path)) from error
    return module


def _by_name(name: str) -> ModuleType:
    _make_importable(Path.cwd())
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise DataError(f"cannot be imported ({first_line(error)})", where=name) from error


def _make_importable(folder: Path) -> None:
    """Let the file import its neighbours, last on the path so that it shadows nothing."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
