"""Names that may stand in a Program: node names, layer paths, string literals.

fx turns a graph into Python source and runs it, so these patterns are what keeps names from a file,
or from a user's ``ModuleDict``, from being code.
"""

import builtins
import keyword
import re

from torch import nn
from torch.fx import GraphModule
from torch.fx import graph as fx_graph

from modelopt_cli.errors import a_or_an
from modelopt_cli.program.program import SHARED, Program

_NODE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,200}", re.ASCII)
_PART = re.compile(r"[A-Za-z0-9_-]{1,200}", re.ASCII)
_LITERAL = re.compile(r"[A-Za-z0-9_ .,>-]{0,64}", re.ASCII)
_MARK = "__"
_MAX_PATH = 1000
_MAX_PARTS = 32
_INPUT_WORDS = ("input", "filter", "format", "hash", "id", "iter", "len", "map", "object", "type", "vars")
# What generated code refers to, besides Python's builtins and keywords.
_USED_BY_CODE = frozenset({"self", *fx_graph._custom_builtins})
_USED_BY_PROGRAM = frozenset(
    {"_parted", *Program.__annotations__, *vars(GraphModule(nn.Module(), fx_graph.Graph()))}
)


def is_node_name(name: object) -> bool:
    """True if a node may have this name: an identifier that shadows nothing generated code uses."""
    return (
        isinstance(name, str)
        and _NODE.fullmatch(name) is not None
        and not name.startswith("__")
        and not keyword.iskeyword(name)
        and not hasattr(builtins, name)
        and name not in _USED_BY_CODE
    )


def is_input_name(name: object) -> bool:
    """True if an input may have this name: that of a node, or a word of Python's that no code here calls."""
    return is_node_name(name) or name in _INPUT_WORDS


def is_output_key(key: object) -> bool:
    """True if a dictionary that a network returns may have this key."""
    return isinstance(key, str) and _LITERAL.fullmatch(key) is not None


def is_path(path: object) -> bool:
    """True if a layer or tensor may be at this dotted path below a Program."""
    if not isinstance(path, str) or len(path) > _MAX_PATH:
        return False
    parts = path.split(".")
    return (
        len(parts) <= _MAX_PARTS
        and all(_PART.fullmatch(part) is not None and not part.startswith("__") for part in parts)
        and not is_reserved(parts[0])
    )


def is_reserved(name: str) -> bool:
    """True if a Program needs this name for itself, so that no layer at its top can have it."""
    return name in _USED_BY_PROGRAM or (hasattr(Program, name) and name not in SHARED)


def path_in_program(path: str) -> str:
    """The path at which a Program has a layer or tensor of a network.

    It is the network's own, with ``__`` after a first name that a Program needs for itself. Such a name that
    ends so already gets another, so that no two paths become one.

    Example:
        >>> path_in_program("input.conv"), path_in_program("stem.conv")
        ('input__.conv', 'stem.conv')
    """
    first, dot, below = path.partition(".")
    return f"{first}{_MARK}{dot}{below}" if is_reserved(_unmarked(first)) else path


def path_in_network(path: str) -> str:
    """The path in the network of what a Program has at this path: the inverse of :func:`path_in_program`."""
    first, dot, below = path.partition(".")
    marked = first.endswith(_MARK) and is_reserved(_unmarked(first))
    return f"{first.removesuffix(_MARK)}{dot}{below}" if marked else path


def _unmarked(name: str) -> str:
    while name.endswith(_MARK):
        name = name.removesuffix(_MARK)
    return name


def is_literal(text: object) -> bool:
    """True if a string may stand among a call's arguments."""
    return isinstance(text, str) and _LITERAL.fullmatch(text) is not None


def is_keyword(name: str) -> bool:
    """True if a keyword argument of a call may have this name."""
    return _NODE.fullmatch(name) is not None and not keyword.iskeyword(name)


def shown(value: object) -> str:
    """A value out of a file, for an error message: short, on one line, and safe however deep it is."""
    return repr(value[:60]) if isinstance(value, str) else a_or_an(type(value).__name__)
