"""A graph of ATen operators, as ``torch.export`` makes it, written with what is on the allow-list.

What depends on neither the input nor a parameter (``torch.arange(77)``, a causal mask) is computed once,
here, and becomes a constant of the Program, as in a graph that fx traces.
"""

import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from modelopt_cli.program.allowlist import ASSIGNING, FUNCTIONS, METHODS
from modelopt_cli.program.aten import NOTHING, REFUSALS, ROWS
from modelopt_cli.program.aten_arguments import named_arguments
from modelopt_cli.program.leaf_calls import OPERATOR, LayerCall, Place, filled
from modelopt_cli.program.refusals import CHANCE, SIZES, Refusal, not_listed
from modelopt_cli.program.spelling import spell
from modelopt_cli.program.user_lines import line_in

_REPEATED = re.compile(r"@\d+$")  # a module's second call, in export's names
_INLINED = ("wrap_with_set_grad_enabled", "wrap_with_autocast")


class ConstantChanged(Exception):
    """A value that depends on the input is written into what looked like a constant."""


class Translation:
    """A graph of allow-listed calls while it is written.

    Args:
        values: what the first graph's placeholders stand for, by name: a constant, or the path of a parameter
            or buffer.
        inputs: names of the network's inputs, by placeholder.
        calls: of leaf layers.
        fold: compute what depends on no input.

    Attributes:
        graph: what is written.
        constants: tensors that it fetches and the network does not have, by name.
    """

    def __init__(
        self,
        values: Mapping[str, str | Tensor],
        inputs: Mapping[str, str],
        calls: Sequence[LayerCall],
        *,
        fold: bool = True,
    ) -> None:
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self._given, self._calls, self._fold = values, calls, fold
        self._values: dict[fx.Node, Any] = {}
        self._fetched: dict[str, fx.Node] = {}
        self._names: dict[tuple[int, int], str] = {}
        self._kept: list[Tensor] = []  # so that no other tensor gets their ids
        self._meta: dict[str, Any] = {}
        self._inputs = {place: self.graph.placeholder(name) for place, name in inputs.items()}

    @property
    def source(self) -> fx.Node:
        """The network's first input."""
        return next(iter(self._inputs.values()))

    def run(self, graph: fx.Graph) -> list[Any]:
        """Write all of a graph that its results need; returns those."""
        graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or _writes(node))
        for node in graph.nodes:
            if node.op not in ("placeholder", "output"):
                with self._made_by(node):
                    self._values[node] = self._value(node)
        (output,) = graph.find_nodes(op="output")
        outputs = self._read(output.args[0])
        return list(outputs) if isinstance(outputs, tuple | list) else [outputs]

    def call(self, name: str, /, **named: Any) -> Any:
        """Write the call of an operation on the allow-list.

        Raises:
            CaptureError: nothing on it takes these arguments.
        """
        written = dict(fx.node.map_aggregate(named, self.fetched))
        if name in ASSIGNING:
            return self._create("call_method", name, tuple(written.values()), {})
        if name.endswith("_"):
            return self._create("call_method", name, (written.pop("input"),), written)
        call = spell(name, written)
        if call is None:
            self._refuse(not_listed(f"torch.{name}"))
        return self._create(*call)

    def _create(self, op: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        node = self.graph.create_node(op, target, args, kwargs)
        node.meta = dict(self._meta)
        return node

    def _read(self, argument: Any) -> Any:
        """An argument with values in place of the first graph's nodes."""
        return fx.node.map_aggregate(argument, lambda a: self._value_of(a) if isinstance(a, fx.Node) else a)

    def _value_of(self, node: fx.Node) -> Any:
        if node not in self._values:
            self._values[node] = self._value(node)
        return self._values[node]

    def fetched(self, value: Any) -> Any:
        """A value as an argument of a node: a constant is fetched."""
        if not isinstance(value, Tensor):
            return value
        key = id(value), value._version
        if key not in self._names:
            self._names[key] = f"constant_{len(self.constants)}"
            self.constants[self._names[key]] = value.detach().clone()
            self._kept.append(value)
        return self._fetch(self._names[key])

    def _fetch(self, path: str) -> fx.Node:
        if path not in self._fetched:
            self._fetched[path] = self._create("get_attr", path, (), {})
        return self._fetched[path]

    def _value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._placed(node)
        if node.op == "get_attr":
            return self._attribute(node)
        if isinstance(node.target, HigherOrderOperator):
            return self._inlined(node)
        if not isinstance(node.target, OpOverload):
            return self._python(node)
        if node.target._schema.name == OPERATOR:
            return self._layer(node)
        return self._operator(node)

    def _placed(self, node: fx.Node) -> Any:
        """The value of a placeholder of the outermost graph."""
        if node.name in self._inputs:
            return self._inputs[node.name]
        return self._given_value(node.name)

    def _attribute(self, node: fx.Node) -> Any:
        """A tensor that is fetched by name, or the graph of a block."""
        if node.target in self._given:
            return self._given_value(str(node.target))
        return getattr(node.graph.owning_module, str(node.target))

    def _given_value(self, name: str) -> Any:
        given = self._given[name]
        return self._fetch(given) if isinstance(given, str) else self._constant(given)

    def _constant(self, tensor: Tensor) -> Any:
        return tensor.detach().clone() if self._fold else self.fetched(tensor)

    def _inlined(self, node: fx.Node) -> Any:
        """The results of a block: ``with torch.no_grad()``, or autocast that is switched off."""
        arguments = self._read(node.args)
        name = node.target.name()  # type: ignore[union-attr]
        if name not in _INLINED:
            self._refuse(not_listed(f"torch.{name}"))
        place = next(i for i, value in enumerate(arguments) if isinstance(value, fx.GraphModule))
        if name == "wrap_with_autocast" and arguments[2]:
            self._refuse(not_listed("torch.autocast"))
        inner = arguments[place].graph
        self._values |= dict(zip(inner.find_nodes(op="placeholder"), arguments[place + 1 :], strict=True))
        return self.run(inner)

    def _python(self, node: fx.Node) -> Any:
        """Arithmetic with sizes, and parts of tuples."""
        args = self._read(node.args)
        if getattr(node.target, "__name__", "") == "_set_grad_enabled":
            return None
        if getattr(node.target, "__module__", "") != "_operator":
            self._refuse(not_listed(f"{getattr(node.target, '__name__', node.target)} of a size"))
        if not any(isinstance(a, fx.Node) for a in args) or isinstance(args[0], tuple | list):
            return node.target(*args)  # type: ignore[operator]
        return self._create("call_function", node.target, args, {})

    def _layer(self, node: fx.Node) -> Any:
        """The tensors that a leaf layer returns."""
        tensors, sizes, number = self._read(node.args)
        call = self._calls[number]
        args, kwargs = filled(call.arguments, [self.fetched(t) for t in tensors], sizes)
        result = self._create("call_module", call.path, args, kwargs)
        return [place for _, place in sorted(self._parts(result, call.results))]

    def _parts(self, node: fx.Node, structure: Any) -> Iterator[tuple[int, fx.Node]]:
        """The tensors of a structure that a node returns, with their numbers."""
        if isinstance(structure, Place):
            yield structure.index, node
        elif isinstance(structure, tuple | list):
            for i, part in enumerate(structure):
                if part is not None:
                    yield from self._parts(
                        self._create("call_function", operator.getitem, (node, i), {}), part
                    )

    def _operator(self, node: fx.Node) -> Any:
        target: Any = node.target
        args, kwargs = self._read(node.args), self._read(dict(node.kwargs))
        name = target._schema.name
        if name.removeprefix("aten::") in NOTHING:
            return None
        symbolic = _holds(fx.Node, (args, kwargs))
        if not symbolic and self._fold:
            return self._computed(target, args, kwargs)
        if _has_unknown_size(node):
            self._refuse(REFUSALS.get(_bare(name), SIZES))
        named = named_arguments(target, args, kwargs)
        if symbolic and target._schema.is_mutable and isinstance(next(iter(named.values()), None), Tensor):
            raise ConstantChanged
        return self._written(name, named)

    def _computed(self, target: Any, args: Any, kwargs: Any) -> Any:
        if torch.Tag.nondeterministic_seeded in target.tags:
            self._refuse(CHANCE)
        return target(*args, **kwargs)

    def _written(self, name: str, named: dict[str, Any]) -> Any:
        bare = _bare(name)
        if bare in REFUSALS or not name.startswith("aten::"):
            self._refuse(REFUSALS.get(bare, not_listed(_shown(name))))
        if bare in ROWS:
            return ROWS[bare](self, named)
        if bare.endswith("_") and bare not in METHODS:
            return self._in_place(name, named)
        space, _, rest = bare.partition("_")
        return self.call(f"{space}.{rest}" if f"{space}.{rest}" in FUNCTIONS else bare, **named)

    def _in_place(self, name: str, named: dict[str, Any]) -> Any:
        """The call of a function that has a switch for working in place."""
        pure = _bare(name).removesuffix("_")
        if f"F.{pure}" not in FUNCTIONS:
            self._refuse(not_listed(_shown(name)))
        named |= {"training": named.pop("train")} if "train" in named else {}
        return self.call(pure, **named, inplace=True)

    @contextmanager
    def _made_by(self, node: fx.Node) -> Iterator[None]:
        """Let what is written know the module and the line that it comes from."""
        before, self._meta = self._meta, _origin(node)
        try:
            yield
        finally:
            self._meta = before

    def _refuse(self, refusal: Refusal) -> NoReturn:
        stack = list(self._meta["nn_module_stack"].values())
        layer = next((path for path, _ in reversed(stack) if path), "")
        line = line_in(self._meta["stack_trace"])
        raise refusal.error(f"{layer} ({line})" if layer and line else layer or line or None)


def _origin(node: fx.Node) -> dict[str, Any]:
    """The module that made a call, in fx's terms, and its line."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    modules = {str(i): (_REPEATED.sub("", path), kind) for i, (path, kind) in enumerate(stack)}
    return {"nn_module_stack": modules, "stack_trace": node.meta.get("stack_trace") or ""}


def _writes(node: fx.Node) -> bool:
    """True if a call changes one of its arguments, as far as can be told."""
    if isinstance(node.target, HigherOrderOperator):
        return True
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _has_unknown_size(node: fx.Node) -> bool:
    """True if the size of a result depends on the values in a tensor."""
    results = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(value, Tensor) and free_unbacked_symbols(value) for value in results)


def _holds(kind: type, value: Any) -> bool:
    """True if there is a value of this type among arguments."""
    matching = []
    fx.node.map_aggregate(value, lambda a: matching.append(a) if isinstance(a, kind) else None)
    return bool(matching)


def _bare(name: str) -> str:
    return name.partition("::")[2]


def _shown(name: str) -> str:
    """An operator as its users know it."""
    space, _, bare = name.partition("::")
    return f"torch.{bare.strip('_')}" if space == "aten" else f"torch.ops.{space}.{bare}"
