"""Architectures in the user's own Python: ``FILE.py:CALLABLE`` and ``package.module:CALLABLE``.

This is the only place where code runs that is not ours or a library's, and only because the user named
it. What it prints goes to stderr, so that stdout stays the result; what it raises becomes one line with
the place in the user's file.
"""

import ast
import contextlib
import copy
import difflib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from modelopt_cli.checkpoint.arch_spec import ArchSpec
from modelopt_cli.checkpoint.text import first_line, listing, printable
from modelopt_cli.errors import ArchitectureError, ModeloptError, a_or_an


def user_builder(spec: ArchSpec) -> Callable[[], nn.Module]:
    """Import what a spec names and return a function that builds the network.

    Raises:
        ArchitectureError: no such file, module or name; or importing it failed.
    """
    directory = str(Path(spec.place).resolve().parent) if spec.source == "file" else os.getcwd()
    with _user_code(spec, directory, "importing it failed"):
        module = _import_file(spec) if spec.source == "file" else _import_module(spec)
        target = _attribute(module, spec)
    return lambda: _build(target, spec, directory)


def _build(target: Any, spec: ArchSpec, directory: str) -> nn.Module:
    with _user_code(spec, directory, "building it failed"):
        built = copy.deepcopy(target) if isinstance(target, nn.Module) else target(**spec.options)
    if not isinstance(built, nn.Module):
        raise ArchitectureError(
            f"{spec.name} returned {a_or_an(type(built).__name__)}, not a torch.nn.Module",
            where=printable(spec.text),
        )
    for name, tensor in (*built.named_parameters(), *built.named_buffers()):
        if is_lazy(tensor):
            raise ArchitectureError(
                f"{spec.name} returned a network whose {printable(name)} has no shape yet",
                where=printable(spec.text),
                hint="run it once on a sample before returning it, or use layers that are not lazy",
            )
    return built


def _import_file(spec: ArchSpec) -> ModuleType:
    path = Path(spec.place)
    if not path.is_file():
        raise ArchitectureError("no such file", where=printable(spec.place), hint="give FILE.py:CALLABLE")
    if not spec.name:
        raise ArchitectureError(
            "does not say which callable", where=printable(spec.place), hint=_suggest_callables(path)
        )
    name = f"modelopt_arch_{path.stem}"
    loader = importlib.util.spec_from_file_location(name, path.resolve())
    if loader is None or loader.loader is None:
        raise ArchitectureError("cannot be imported", where=printable(spec.place))
    module = importlib.util.module_from_spec(loader)
    sys.modules[name] = module  # dataclasses and pickling look their module up by name
    loader.loader.exec_module(module)
    return module


def _suggest_callables(path: Path) -> str:
    """Name the file's own functions and classes, without running it."""
    with contextlib.suppress(SyntaxError, ValueError, OSError):
        nodes = ast.parse(path.read_bytes()).body
        names = [n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        if names:
            return f"write {path}:{names[-1]} (it defines {listing(names, 8)})"
    return f"write {path}:CALLABLE"


def _import_module(spec: ArchSpec) -> ModuleType:
    try:
        return importlib.import_module(spec.place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{spec.place}.".startswith(f"{error.name}."):
            raise  # the user's module exists and itself imports something that is missing
        raise ArchitectureError(
            f"no module '{printable(error.name)}' can be imported from here",
            where=printable(spec.text),
            hint="run where it can be imported, or give the file itself: FILE.py:CALLABLE",
        ) from error


def _attribute(module: ModuleType, spec: ArchSpec) -> Any:
    target: Any = module
    for part in spec.name.split("."):
        if not hasattr(target, part):
            names = [name for name in dir(target) if callable(getattr(target, name)) and name[:1] != "_"]
            near = difflib.get_close_matches(part, names, 1)
            raise ArchitectureError(
                f"has no '{printable(part)}'",
                where=printable(spec.place),
                hint=f"did you mean '{near[0]}'?"
                if near
                else f"it has {listing(names, 5)}"
                if names
                else None,
            )
        target = getattr(target, part)
    if not callable(target):
        raise ArchitectureError(
            f"'{printable(spec.name)}' is {a_or_an(type(target).__name__)}, not callable",
            where=printable(spec.place),
        )
    return target


@contextlib.contextmanager
def _user_code(spec: ArchSpec, directory: str, what: str) -> Iterator[None]:
    """Run the user's code with ``directory`` importable; its exceptions become ours."""
    sys.path.insert(0, directory)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except ModeloptError:
        raise
    except (Exception, SystemExit) as error:
        place = _place(error, directory)
        called = isinstance(error, TypeError) and "argument" in str(error)
        raise ArchitectureError(
            f"{what}: {type(error).__name__}: {first_line(error)}",
            where=place or printable(spec.text),
            hint=f"its arguments are given as {printable(spec.text.partition('?')[0])}?name=value"
            if called
            else None,
        ) from error
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(directory)
        if directory not in sys.path:  # at the end, for imports that its functions make when called
            sys.path.append(directory)


def _place(error: BaseException, directory: str) -> str | None:
    """``file:line`` of the innermost frame in the user's directory, else of the innermost frame at all."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename.startswith(directory + os.sep)]
    outside = [
        frame for frame in frames if not frame.filename.startswith((str(Path(__file__).parent), "<frozen"))
    ]
    frame = own[-1] if own else outside[-1] if outside else None
    return f"{frame.filename}:{frame.lineno}" if frame else None
