"""Python that the user named: ``FILE.py:CALLABLE`` and ``package.module:CALLABLE``.

This is the only place where code is loaded that is not ours or a library's, and only because the user named
it; code found inside a file never gets here. What it prints goes to stderr, so that stdout stays the result,
and what it raises becomes one line with the place in the user's file.
"""

import ast
import contextlib
import difflib
import importlib
import importlib.util
import os
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from modelopt_cli.errors import InputError, ModeloptError, a_or_an
from modelopt_cli.text import listing, printable, short, typed_line

_USUAL = ("make", "build", "create", "model", "net")
"""Usual names of what makes a network, the likeliest first."""
_OURS = (str(Path(__file__).parent) + os.sep, "<frozen")
_folders: set[str] = set()  # that code was loaded from
_loaded: dict[str, tuple[int, int]] = {}  # time and size of each file whose module is loaded, by its name

Failure = type[InputError]


def load_callable(place: str, name: str, error: Failure) -> Any:
    """The callable that the user named.

    Args:
        place: a file ``FILE.py``, or a module that can be imported from the current directory.
        name: of the callable in it; dots lead to attributes of attributes.
        error: raised where it cannot be had.

    Raises:
        InputError: of the class ``error``: no such file, module or name, or importing it failed.
    """
    target: Any = _from_file(place, name, error) if place.endswith(".py") else _by_name(place, error)
    for part in name.split("."):
        if not hasattr(target, part):
            raise error(f"has no '{short(part)}'", where=short(place), hint=_nearest(part, target))
        target = getattr(target, part)
    if not callable(target):
        kind = a_or_an(type(target).__name__)
        raise error(f"'{short(name)}' is {kind}, not callable", where=short(place))
    return target


def call(
    function: Callable[..., Any], options: Mapping[str, Any], where: str, error: Failure, action: str
) -> Any:
    """The result of a callable with these keyword arguments; failures as in :func:`user_code`."""
    with user_code(action, where, error):
        return function(**options)


@contextlib.contextmanager
def user_code(action: str, where: str, error: Failure) -> Iterator[None]:
    """Run code that is not ours.

    Args:
        action: in words what failed, if it fails.
        where: the spec, sample or file that it is about.
        error: raised for whatever the code raises.

    Raises:
        InputError: of the class ``error``; it names the place in the user's file.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (ModeloptError, GeneratorExit):
        raise
    except (Exception, SystemExit) as cause:
        place = _place(cause)
        line = f"{action} ({typed_line(cause)}{f' at {place}' if place else ''})"
        raise error(line, where=printable(where), hint=_argument_hint(cause, where)) from cause


def require_file(text: str, error: Failure) -> None:
    """Refuse ``FILE.py:CALLABLE`` where there is no such file, without importing anything.

    Args:
        text: of any form, options included; others pass.
        error: raised where the file is not there.
    """
    place = text.partition("?")[0].rpartition(":")[0]
    if place.endswith(".py") and not Path(place).is_file():
        raise error("no such file", where=short(place), hint="give FILE.py:CALLABLE")


def _from_file(place: str, name: str, error: Failure) -> ModuleType:
    require_file(f"{place}:{name}", error)
    path = Path(place)
    if not name:
        raise error("does not say which callable", where=short(place), hint=_suggest_callables(path))
    path = path.resolve()
    # Named after the whole path: two files of one name do not collide, and every process finds the same name.
    module_name = f"modelopt_user_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    state = path.stat().st_mtime_ns, path.stat().st_size
    if module_name in sys.modules and _loaded.get(module_name) == state:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise error("cannot be imported", where=short(place))
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickling look their module up by name
    try:
        with _importable(str(path.parent)), user_code("importing it failed", place, error):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    _loaded[module_name] = state
    return module


def _by_name(place: str, error: Failure) -> ModuleType:
    with _importable(os.getcwd()), user_code("importing it failed", place, error):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as cause:
            if cause.name is None or not f"{place}.".startswith(f"{cause.name}."):
                raise  # the user's module exists and itself imports something that is missing
            raise error(
                f"no module '{short(cause.name)}' can be imported from here",
                where=short(place),
                hint="run where it can be imported, or give the file itself: FILE.py:CALLABLE",
            ) from cause


@contextlib.contextmanager
def _importable(folder: str) -> Iterator[None]:
    """Let code import its neighbours: first while it is loaded, last when its functions run later on."""
    _folders.add(folder + os.sep)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)


def _suggest_callables(path: Path) -> str:
    """A hint that names the file's own functions and classes, without running it."""
    with contextlib.suppress(SyntaxError, ValueError, OSError):
        nodes = ast.parse(path.read_bytes()).body
        names = [n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        if names:
            cased = {name.lower(): name for name in reversed(names)}
            likely = next((cased[usual] for usual in _USUAL if usual in cased), names[0])
            return f"write {path}:{likely} (it defines {listing(names, 8)})"
    return f"write {path}:CALLABLE"


def _nearest(name: str, target: Any) -> str | None:
    names = [each for each in dir(target) if callable(getattr(target, each)) and each[:1] != "_"]
    close = difflib.get_close_matches(name, names, 1)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"it has {listing(names, 5)}" if names else None


def _argument_hint(cause: BaseException, where: str) -> str | None:
    wrong = isinstance(cause, TypeError) and "argument" in str(cause) and ":" in where
    return f"its arguments are given as {short(where.partition('?')[0])}?name=value" if wrong else None


def _place(cause: BaseException) -> str | None:
    """``file:line`` of the innermost frame in the user's folders, else of the innermost that is not ours."""
    if isinstance(cause, SyntaxError) and cause.filename:
        return f"{Path(cause.filename).name}:{cause.lineno}"
    frames = [f for f in traceback.extract_tb(cause.__traceback__) if not f.filename.startswith(_OURS)]
    own = [f for f in frames if f.filename.startswith(tuple(_folders)) and "site-packages" not in f.filename]
    frame = next(reversed(own or frames), None)
    return f"{Path(frame.filename).name}:{frame.lineno}" if frame else None
