"""Names that load on first use, so that a config or a table next to them costs no import of torch."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A ``__getattr__`` for a package.

    Args:
        package: its ``__name__``.
        homes: the module of the package that each name is found in; no name may be that of a module.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return find


def deferred(module: str, name: str) -> Callable[..., Any]:
    """A function or class whose module is imported when it is first called.

    Args:
        module: its full name.
        name: of the function or class.
    """

    def call(*args: Any, **options: Any) -> Any:
        return getattr(import_module(module), name)(*args, **options)

    return call
