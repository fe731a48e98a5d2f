"""The order of the package's rooms: imports go down this list, never up and never in a circle."""

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "modelopt_cli"

ORDER = (
    *(
        "errors",
        "option_names",
        "option_values",
        "option_types",
        "settings",
        "lazy_names",
        "text",
        "regular",
        "user_code",
        "_torchvision",
        "torchvision_start",
    ),
    *("program", "artifact", "kernels", "data", "checkpoint", "tasks"),
    *("measure", "training"),
    *("methods", "report"),
    *("api", "modelopt_cli"),
    *("cli", "demo", "__main__"),
)
"""Modules and folders from the bottom up. ``modelopt_cli`` is the package's own ``__init__``."""


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """All statements of a module, of functions and branches, too; nobody imports inside an expression."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        for block in ("body", "orelse", "finalbody", "handlers", "cases"):
            waiting += getattr(node, block, ())


def imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The package's modules that a file imports anywhere, in functions and for type checking, too.

    The package is loaded before all that is in it, so its ``__version__`` may be read anywhere.
    """
    for node in statements(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in known or (node.module in known and full != "modelopt_cli.__version__"):
                    yield full if full in known else str(node.module)


@cache
def graph() -> dict[str, set[str]]:
    """The modules that each module imports."""
    known = modules()
    return {name: set(imported(path, known)) - {name} for name, path in known.items()}


def level(module: str) -> int:
    """Place in the order of the room that a module is in."""
    return ORDER.index(module.split(".")[1] if "." in module else module)


def test_no_module_imports_from_a_room_above_its_own() -> None:
    up = [f"{a} imports {b}" for a, others in graph().items() for b in others if level(b) > level(a)]
    assert up == []


def test_no_module_imports_itself_through_others() -> None:
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        raise AssertionError(" <- ".join(error.args[1])) from None


def test_every_file_has_a_name_of_its_own() -> None:
    """The config and the function of each method are parallel; other files say what is in them alone."""
    parallel = {"__init__", "config", "apply"}
    names = Counter(path.stem for path in PACKAGE.rglob("*.py") if path.stem not in parallel)
    assert [name for name, count in names.items() if count > 1] == []
