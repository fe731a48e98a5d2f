"""The second of the two tracers behind ``capture``: it runs the network on examples while it traces.

Two example inputs of different batch sizes go through. A number that is the same for both cannot depend
on the batch: it is a fact about the network at this input shape and becomes a literal. One that differs
stays symbolic, and code that insists on knowing it (``int(x.shape[0])``, ``for image in x``) is an error
that names the line, as is code that looks at the values in a tensor.

Assignments are made pure: after ``x[:, 0] = y`` the variable ``x`` stands for a new value, the old one
with ``y`` in its place. What shared the old one's memory and is read later is refused.
"""

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx, nn

from modelopt_cli.errors import CaptureError
from modelopt_cli.program.allowlist import set_item
from modelopt_cli.program.checks import outcome_of_check
from modelopt_cli.program.refusals import BATCH, VALUES
from modelopt_cli.program.tracer import ProgramProxy, ProgramTracer, recorded

# Methods that take a tensor's contents out of torch's sight.
_READERS = frozenset({"item", "tolist", "numpy", "equal", "is_nonzero", "allclose", "__array__", "nonzero"})
_READER_FUNCTIONS = (torch.equal, torch.allclose, torch.is_nonzero)
# Changes of a whole tensor, as assignments: the value, by the method's arguments.
_ASSIGNING: dict[str, Callable[..., Any]] = {
    "fill_": lambda value: value,
    "copy_": lambda src, non_blocking=False: src,
    "zero_": lambda: 0,
}
_PLAIN = (bool, int, float, str, type(None), torch.Size, torch.dtype, torch.device, torch.layout)


class ExampleTracer(ProgramTracer):
    """Traces with the values that two example inputs give to every node.

    Args:
        examples: batches of the network's inputs by name, of different sizes.
    """

    def __init__(self, examples: Sequence[Mapping[str, Tensor]]) -> None:
        super().__init__(examples[0])
        self.examples = tuple(examples)
        self._running = False
        self._alive: WeakValueDictionary[int, ExampleProxy] = WeakValueDictionary()
        self._numbers = count()

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
        proxy_factory_fn: Callable[[fx.Node], fx.Proxy] | None = None,
    ) -> Any:
        """Record the node and run it. The result is a proxy, or a plain value the batch has no part in."""
        if _reads_contents(kind, target, args):
            raise VALUES.error()
        kind, target = recorded(kind, target)
        proxy: Any = super().create_proxy(kind, target, args, kwargs, name, type_expr)
        proxy.known = tuple(self._run(kind, target, args, kwargs, i) for i in range(len(self.examples)))
        if kind != "placeholder" and isinstance(proxy.known[0], _PLAIN) and _agree(proxy.known):
            return proxy.known[0]
        proxy.memory = next(
            (a.memory for a in _proxies((args, kwargs)) if _shares_memory(a, proxy)), object()
        )
        self._alive[next(self._numbers)] = proxy
        return self._parts(proxy) if type(proxy.known[0]) in (tuple, list) else proxy

    def _parts(self, proxy: "ExampleProxy") -> Any:
        """A tuple or list of proxies in place of one for all, if every batch size gives as many."""
        if len({len(value) for value in proxy.known}) > 1:
            return proxy
        return type(proxy.known[0])(proxy)

    def create_arg(self, a: Any) -> Any:
        """Record a use as in fx, unless an assignment to another value changed this one's memory."""
        if isinstance(a, ExampleProxy) and a.stale:
            raise CaptureError(
                "reads a view of what an assignment changed, or what a changed view was taken from",
                hint="take views after the assignment, or build the value with torch.cat or torch.where",
            )
        return super().create_arg(a)

    def assign(self, proxy: "ExampleProxy", index: Any, value: Any) -> None:
        """``proxy[index] = value``: the proxy stands for a new value from now on."""
        changed = self.create_proxy("call_function", set_item, (proxy, index, value), {})
        for alive in list(self._alive.values()):
            if alive is not proxy and alive.memory is proxy.memory:
                alive.stale = True
        proxy.node, proxy.known = changed.node, changed.known

    def proxy(self, node: fx.Node) -> "ExampleProxy":
        """A proxy that can hold values."""
        return ExampleProxy(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Parameters and buffers as proxies, except while a node runs on the examples."""
        return attr_val if self._running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record, or simply call while a node runs on the examples."""
        return forward(*args, **kwargs) if self._running else super().call_module(m, forward, args, kwargs)

    def _run(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], i: int) -> Any:
        if kind == "placeholder":
            return self.examples[i][target]
        values, keywords = _values(args, i), _values(kwargs, i)
        self._running = True
        try:
            if kind == "get_attr":
                return operator.attrgetter(target)(self.root)
            if kind == "call_module":
                return self.root.get_submodule(target)(*values, **keywords)
            function = getattr(values[0], target) if kind == "call_method" else target
            return function(*(values[1:] if kind == "call_method" else values), **keywords)
        finally:
            self._running = False


class ExampleProxy(ProgramProxy):
    """A node together with its value for each example."""

    known: tuple[Any, ...] = ()
    memory: object = None
    stale: bool = False

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.assign(self, index, value)  # type: ignore[attr-defined]

    def __getattr__(self, k: str) -> Any:
        if k.startswith("__"):
            raise AttributeError(k)
        if callable(getattr(self.known[0], k)):
            return _Method(self, k)
        return self.tracer.create_proxy("call_function", getattr, (self, k), {})

    @property
    def of_tensor(self) -> bool:
        """True if the node's value is a tensor rather than a number or a tuple."""
        return isinstance(self.known[0], Tensor)

    def plain(self, function: Callable[[Any], Any]) -> Any:
        """``function`` of the value, as Python needs it: the same for every batch size, or an error."""
        if self.of_tensor:
            raise VALUES.error()
        return _agreed([function(value) for value in self.known])

    def __bool__(self) -> bool:
        outcome = outcome_of_check(inspect.currentframe()) if self.of_tensor else None
        return bool(self.plain(bool)) if outcome is None else outcome

    def __int__(self) -> int:
        return int(self.plain(int))

    def __index__(self) -> int:
        return int(self.plain(operator.index))

    def __float__(self) -> float:
        return float(self.plain(float))

    def __ceil__(self) -> int:
        return int(self.plain(lambda value: -(-value // 1)))

    def __floor__(self) -> int:
        return int(self.plain(lambda value: value // 1))

    def __trunc__(self) -> int:
        return int(self.plain(int))

    def __round__(self, ndigits: int | None = None) -> Any:
        return self.plain(lambda value: round(value, ndigits))

    def __len__(self) -> int:
        return int(_agreed([len(value) for value in self.known]))

    def __iter__(self) -> Iterator[Any]:
        return (
            self.tracer.create_proxy("call_function", operator.getitem, (self, i), {})
            for i in range(len(self))
        )

    __hash__ = object.__hash__


class _Method:
    """A bound method of a proxied value, recorded when it is called."""

    def __init__(self, proxy: ExampleProxy, name: str) -> None:
        self.proxy, self.name = proxy, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.name in _ASSIGNING and self.proxy.of_tensor:
            self.proxy[...] = _ASSIGNING[self.name](*args, **kwargs)
            return self.proxy
        return self.proxy.tracer.create_proxy("call_method", self.name, (self.proxy, *args), kwargs)


def _define_comparison(name: str) -> None:
    function = getattr(operator, name)

    def compare(self: ExampleProxy, other: Any) -> Any:
        if self.of_tensor or (isinstance(other, ExampleProxy) and other.of_tensor):
            return self.tracer.create_proxy("call_function", function, (self, other), {})
        return _agreed([function(value, _values(other, i)) for i, value in enumerate(self.known)])

    setattr(ExampleProxy, f"__{name}__", compare)


for _name in ("lt", "le", "eq", "ne", "gt", "ge"):
    _define_comparison(_name)


def _values(argument: Any, i: int) -> Any:
    """An argument with every proxy replaced by its value for example ``i``."""
    if isinstance(argument, ExampleProxy):
        return argument.known[i]
    if isinstance(argument, list | tuple):
        return type(argument)(_values(item, i) for item in argument)
    if isinstance(argument, dict):
        return {key: _values(item, i) for key, item in argument.items()}
    if isinstance(argument, slice):
        return slice(*(_values(part, i) for part in (argument.start, argument.stop, argument.step)))
    return argument


def _proxies(argument: Any) -> Iterator[ExampleProxy]:
    """The proxies anywhere among a call's arguments."""
    if isinstance(argument, ExampleProxy):
        yield argument
    elif isinstance(argument, list | tuple | dict):
        for item in argument.values() if isinstance(argument, dict) else argument:
            yield from _proxies(item)


def _storages(value: Any) -> set[int]:
    """Addresses of the memory of a tensor, or of those in a tuple."""
    if isinstance(value, Tensor):
        return {value.untyped_storage().data_ptr()} if value.numel() else set()
    return {s for item in value for s in _storages(item)} if isinstance(value, list | tuple) else set()


def _shares_memory(a: ExampleProxy, b: ExampleProxy) -> bool:
    return bool(_storages(a.known[0]) & _storages(b.known[0]))


def _agree(values: Sequence[Any]) -> bool:
    return all(type(value) is type(values[0]) and value == values[0] for value in values)


def _agreed(values: Sequence[Any]) -> Any:
    """The value that all examples agree on; if they do not, the batch size is the cause."""
    if not _agree(values):
        raise BATCH.error()
    return values[0]


def _reads_contents(kind: str, target: Any, args: tuple[Any, ...]) -> bool:
    if kind == "call_method":
        return target in _READERS and isinstance(args[0], ExampleProxy) and args[0].of_tensor
    return kind == "call_function" and target in _READER_FUNCTIONS
