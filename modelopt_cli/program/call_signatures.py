"""Parameter names of every function and tensor method that a Program may call.

Python functions say them themselves; of those written in C++ torch keeps operator schemas (the tables behind
``torch.fx.operator_schemas``). One callable may have several signatures: ``torch.max(input)``,
``torch.max(input, dim)``, ``torch.max(input, other)``.
"""

import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.jit._builtins import _find_builtin

UNARY = (operator.neg, operator.pos, operator.abs, operator.invert)
_OPTIONS = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_REQUIRED = inspect.Parameter.empty
# Keywords that torch takes for compatibility with NumPy, and what they stand for.
_KEYWORDS = {"axis": "dim", "keepdims": "keepdim", "x": "input", "a": "input", "x1": "input", "x2": "other"}
_KEYWORDS |= {"self": "input", "split_size": "split_size_or_sections"}
# Written as (*args, **kwargs), because torch chooses between two functions by ``return_indices``.
_DISPATCHED: dict[Callable[..., Any], Callable[..., Any]] = {
    getattr(F, f"{kind}_pool{d}d"): getattr(F, f"{kind}_pool{d}d_with_indices")
    for kind in ("max", "adaptive_max")
    for d in (1, 2, 3)
}
_METHODS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("float", "double", "half", "bfloat16", "int", "long", "short", "char"), ("input",)),
    **dict.fromkeys(("byte", "bool", "ndimension", "nelement"), ("input",)),
    **{"where": ("input", "condition", "other"), "new_tensor": ("input", "data", "dtype", "device")},
    "to": ("input", "device", "dtype", "non_blocking", "copy"),
}
# Lists of sizes that may be written as several arguments: x.view(2, 3).
_SPREAD = frozenset({"size", "shape", "dims", "repeats", "sizes"})


@dataclass(frozen=True)
class Parameter:
    """One parameter: its name, its type as in a schema ("" for any), and its default."""

    name: str
    type: str = ""
    default: Any = _REQUIRED
    keyword_only: bool = False

    @property
    def required(self) -> bool:
        """True if a call must give it."""
        return self.default is _REQUIRED

    def accepts(self, value: Any) -> bool:
        """True if a value, or a node that stands for one, can be of this type."""
        kind = self.type
        if self.name in ("dtype", "device", "layout", "memory_format"):
            return value is None or isinstance(value, (*_OPTIONS, str, int, fx.Node))
        if isinstance(value, _OPTIONS):
            return not kind
        if kind.startswith("Optional["):
            if value is None:
                return True
            kind = kind[len("Optional[") : -1]
        return not kind or _is_of(kind, value)


Signature = tuple[Parameter, ...]


def bind(
    signatures: tuple[Signature, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The arguments of a call by name, in the signature's order; None where no signature takes them.

    Args:
        signatures: of what is called.
        args: by place; several sizes in a row may stand for one list of them.
        kwargs: by name.
    """
    for signature in signatures:
        ways = [args, *_gathered(signature, args)]
        for places in ways:
            bound = _bind(signature, places, kwargs)
            if bound is not None:
                return bound
    return None


def defaults(signatures: tuple[Signature, ...], named: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of the parameters that a call leaves out, from the first signature that fits it."""
    for signature in signatures:
        if _bind(signature, (), named) is not None:
            return {p.name: p.default for p in signature if not p.required and p.name not in named}
    return {}


@cache
def of_function(function: Callable[..., Any]) -> tuple[Signature, ...]:
    """The signatures of a function; none where nothing is known of it."""
    if function is getattr:
        return ((Parameter("input"), Parameter("name")),)
    if function is operator.getitem:
        return ((Parameter("input"), Parameter("index")),)
    if getattr(operator, getattr(function, "__name__", ""), None) is function:
        operands = ("input",) if function in UNARY else ("input", "other")
        return (tuple(map(Parameter, operands)),)
    try:
        return (_of_python(inspect.signature(_DISPATCHED.get(function, function))),)
    except ValueError:  # written in C++
        return _of_schemas(_find_builtin(function))


@cache
def is_variadic(function: Callable[..., Any]) -> bool:
    """True if a function takes any number of tensors by place, as einsum does."""
    try:
        parameters = inspect.signature(_DISPATCHED.get(function, function)).parameters.values()
    except ValueError:
        return False
    return any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)


@cache
def of_method(name: str) -> tuple[Signature, ...]:
    """The signatures of a tensor method, the tensor among its parameters as ``input``."""
    if name in _METHODS:
        first, *others = _METHODS[name]
        required = name == "where"
        default = _REQUIRED if required else None
        return ((Parameter(first), *(Parameter(p, default=default) for p in others)),)
    method = getattr(torch.Tensor, name, None)
    if inspect.isfunction(method) and name != "unflatten":
        plain = _of_python(inspect.signature(method))
        return (tuple(_renamed(parameter) for parameter in plain),)
    return tuple(s for s in _of_schemas(f"aten::{name}") if s[0].name == "input")


def _renamed(parameter: Parameter) -> Parameter:
    return Parameter(_KEYWORDS.get(parameter.name, parameter.name), "", parameter.default)


def _of_python(signature: inspect.Signature) -> Signature:
    """All named parameters; ``*args`` and ``**kwargs`` have none."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(
        Parameter(p.name, "", p.default, p.kind is inspect.Parameter.KEYWORD_ONLY)
        for p in signature.parameters.values()
        if p.kind not in variable
    )


def _of_schemas(name: str | None) -> tuple[Signature, ...]:
    schemas = torch._C._jit_get_schemas_for_operator(name) if name else []
    signatures = [_of_schema(schema) for schema in schemas if _is_for_tensors(schema)]
    return tuple(dict.fromkeys(signatures))


def _is_for_tensors(schema: Any) -> bool:
    """True if a schema is torch's own, not TorchScript's arithmetic, and allocates its results."""
    types = [str(argument.type) for argument in schema.arguments]
    named = any("Dimname" in kind for kind in types)
    if named or not schema.returns or any(argument.is_out for argument in schema.arguments):
        return False
    return any("Tensor" in kind for kind in types) or str(schema.returns[0].type) == "Tensor"


def _of_schema(schema: Any) -> Signature:
    parameters = []
    for argument in schema.arguments:
        # Where a number may take the tensor's place, torch calls it self.
        name = "input" if argument.name == "self" and "Tensor" in str(argument.type) else argument.name
        default = argument.default_value if argument.has_default_value() else _REQUIRED
        default = tuple(default) if isinstance(default, list) else default
        parameters.append(Parameter(name, str(argument.type), default, argument.kwarg_only))
    return tuple(parameters)


def _gathered(signature: Signature, args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """The places with several sizes in a row as one list, where the signature has one to take them."""
    for place, parameter in enumerate(signature):
        sizes = args[place:]
        if _takes_sizes(parameter):
            if sizes and all(is_number(size) or type(size) is int for size in sizes):
                return [(*args[:place], tuple(sizes))]
            return []
    return []


def _bind(signature: Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    names = [p.name for p in signature if not p.keyword_only]
    if len(args) > len(names):
        return None
    bound = dict(zip(names, args, strict=False))
    known = {p.name: p for p in signature}
    for key, value in kwargs.items():
        name = key if key in known else _KEYWORDS.get(key, key)
        if name not in known or name in bound:
            return None
        bound[name] = value
    missing = any(p.required and p.name not in bound for p in signature)
    if missing or not all(known[name].accepts(value) for name, value in bound.items()):
        return None
    return {name: _listed(known[name], bound[name]) for name in known if name in bound}


def _listed(parameter: Parameter, value: Any) -> Any:
    """A single size as the list that the parameter takes."""
    single = type(value) is int or is_number(value)
    return (value,) if single and _takes_sizes(parameter) else value


def _takes_sizes(parameter: Parameter) -> bool:
    return parameter.name in _SPREAD and parameter.type in ("List[int]", "Optional[List[int]]")


def is_number(value: Any) -> bool:
    """True if a node stands for a number: a size, or arithmetic with nothing but sizes."""
    if not isinstance(value, fx.Node):
        return False
    if value.op == "call_method":
        numbers = ("dim", "ndimension", "numel")
        return value.target in numbers or (value.target == "size" and len(value.args) + len(value.kwargs) > 1)
    if value.op != "call_function":
        return False
    if value.target is getattr:
        return bool(value.args[1] == "ndim")
    if value.target is operator.getitem:
        return is_size(value.args[0]) and not isinstance(value.args[1], slice)
    arithmetic = getattr(value.target, "__module__", "") == "_operator"
    return arithmetic and bool(value.all_input_nodes) and all(map(is_number, value.all_input_nodes))


def is_size(value: Any) -> bool:
    """True if a node stands for the sizes of a tensor, all or some of them."""
    if not isinstance(value, fx.Node):
        return False
    if value.op == "call_method":
        return value.target == "size" and len(value.args) + len(value.kwargs) == 1
    if value.op != "call_function":
        return False
    if value.target is getattr:
        return bool(value.args[1] == "shape")
    if value.target is operator.getitem:
        return is_size(value.args[0]) and isinstance(value.args[1], slice)
    return value.target is operator.add and any(map(is_size, value.args))


def _is_of(kind: str, value: Any) -> bool:
    if kind.startswith("List["):
        inner = kind[len("List[") : -1]
        if isinstance(value, list | tuple):
            return all(_is_of(inner, item) for item in value)
        if inner == "Tensor":
            return isinstance(value, fx.Node) and not is_number(value) and not is_size(value)
        return is_size(value) or is_number(value) or type(value) is int or type(value) is float
    if isinstance(value, fx.Node):
        number = is_number(value)
        return (
            kind in ("int", "float", "number", "bool") if number else kind == "Tensor" and not is_size(value)
        )
    if isinstance(value, torch.Tensor):
        return kind == "Tensor"
    if type(value) is bool:
        return kind in ("bool", "number")
    if type(value) is int:
        return kind in ("int", "float", "number")
    if type(value) is float:
        return kind in ("float", "number")
    return kind == "str" if isinstance(value, str) else False
