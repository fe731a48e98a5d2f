"""Find and call what the user named: ``FILE.py:CALLABLE`` or ``package.module:CALLABLE``.

It runs because they asked for it on the command line; nothing found inside a file ever gets here. What it
prints goes to stderr, so that stdout stays the result, and what it raises becomes one line.
"""

import contextlib
import importlib
import importlib.util
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from modelopt_cli.data.spec import nearest
from modelopt_cli.errors import DataError, ModeloptError


def first_line(error: BaseException) -> str:
    """An exception as one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextlib.contextmanager
def user_code(what: str, where: str) -> Iterator[None]:
    """Run code that is not ours.

    Raises:
        DataError: it raised something; the line says ``what`` failed and names the place in the user's file.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (ModeloptError, GeneratorExit):
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)[1:]
        place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        raise DataError(f"{what} ({first_line(error)}{place})", where=where) from error


def load_callable(target: str) -> Callable[..., Any]:
    """Import what stands before the last colon and return what stands after it.

    Raises:
        DataError: the module cannot be imported or has no such callable.
    """
    module_name, _, name = target.rpartition(":")
    module = _from_file(Path(module_name)) if module_name.endswith(".py") else _by_name(module_name)
    found = getattr(module, name, None)
    if found is None:
        guess = nearest(name, [n for n in dir(module) if not n.startswith("_")])
        raise DataError(
            f"has no callable {name}", where=module_name, hint=f"did you mean {guess}" if guess else None
        )
    if not callable(found):
        raise DataError(f"{name} is not callable", where=module_name)
    return found  # type: ignore[no-any-return]


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise DataError("no such file", where=str(path), hint="give FILE.py:CALLABLE")
    path = path.resolve()
    # Named after the whole path: two files of one name do not collide, and every process finds the same name.
    name = f"modelopt_data_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _make_importable(path.parent)
    sys.modules[name] = module
    try:
        with user_code("cannot be imported", str(path)):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _by_name(name: str) -> ModuleType:
    _make_importable(Path.cwd())
    with user_code("cannot be imported", name):
        return importlib.import_module(name)


def _make_importable(folder: Path) -> None:
    """Let the file import its neighbours, now and when its functions run; last, to shadow nothing."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
