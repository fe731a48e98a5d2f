"""The two tracers behind ``capture``: a purely symbolic one, and one that knows example values.

``ProgramTracer`` is fx's symbolic tracer with our own notion of a leaf module. It keeps every size
symbolic and gives up where Python needs a number: ``math.ceil(x.shape[2])``, ``range(x.size(1))``,
``if x.shape[-2:] != (28, 28)``.

``ExampleTracer`` then runs the network on two example inputs of different batch sizes while it traces.
A number that is the same for both cannot depend on the batch: it is a fact about the network at this
input shape and becomes a literal. One that differs stays symbolic, and code that insists on knowing
it (``int(x.shape[0])``, ``for image in x``) is an error that names the line, as is code that looks
at the values in a tensor.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from modelopt_cli.errors import CaptureError
from modelopt_cli.program.kinds import kind_of

INPUT_NAME = "x"
# Methods that take a tensor's contents out of torch's sight.
_READERS = frozenset({"item", "tolist", "numpy", "equal", "is_nonzero", "allclose", "__array__", "nonzero"})
_READER_FUNCTIONS = (torch.equal, torch.allclose, torch.is_nonzero)
_PLAIN = (bool, int, float, str, type(None), torch.Size, torch.dtype, torch.device, torch.layout)


class ProgramTracer(fx.Tracer):
    """Traces through everything but the leaf modules on the allow-list.

    Attributes:
        constants: tensors the forward pass made out of nothing, by the name their nodes have.
        failed_in: path of the innermost module whose forward raised, or None.
    """

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__(autowrap_modules=())  # type: ignore[arg-type]
        self.constants: dict[str, Tensor] = {}
        self.failed_in: str | None = None

    def trace(
        self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None
    ) -> fx.Graph:
        """The graph of ``root``'s forward pass as a function of its first argument."""
        with torch.no_grad(), _plain_autograd_functions():
            return super().trace(root, concrete_args)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """One placeholder, whatever the signature: optional arguments keep their defaults."""
        return root_fn, [self.root, self.create_proxy("placeholder", INPUT_NAME, (), {})]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Leaves are exactly the classes on the list, so a subclass with its own forward is traced."""
        return kind_of(m) is not None

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """As in fx, remembering where an exception came from."""
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed_in is None:
                self.failed_in = (self.submodule_paths or {}).get(m)
            raise

    def create_arg(self, a: Any) -> Any:
        """As in fx, but constant tensors go to ``constants`` instead of onto the user's module."""
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and not self._is_attribute(a):
            name = f"constant_{len(self.constants)}"
            self.constants[name] = a
            self.tensor_attrs[a] = name
        return super().create_arg(a)

    def _is_attribute(self, tensor: Tensor) -> bool:
        return tensor in self.tensor_attrs or any(tensor is buffer for buffer in self.root.buffers())


class ExampleTracer(ProgramTracer):
    """Traces with the values that two example inputs give to every node.

    Args:
        examples: inputs of different batch sizes.
    """

    def __init__(self, examples: Sequence[Tensor]) -> None:
        super().__init__()
        self.examples = tuple(examples)
        self._running = False

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
            _refuse_contents()
        proxy: Any = super().create_proxy(kind, target, args, kwargs, name, type_expr)
        proxy.known = tuple(self._run(kind, target, args, kwargs, i) for i in range(len(self.examples)))
        if kind != "placeholder" and isinstance(proxy.known[0], _PLAIN) and _agree(proxy.known):
            return proxy.known[0]
        return proxy

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
            return self.examples[i]
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


class ExampleProxy(fx.Proxy):
    """A node together with its value for each example."""

    known: tuple[Any, ...] = ()

    def __getattr__(self, k: str) -> Any:
        if k.startswith("__"):
            raise AttributeError(k)
        if callable(getattr(self.known[0], k)):
            return _Method(self, k)
        return self.tracer.create_proxy("call_function", getattr, (self, k), {})

    @property
    def of_tensor(self) -> bool:
        """Whether the node's value is a tensor rather than a number or a tuple."""
        return isinstance(self.known[0], Tensor)

    def plain(self, function: Callable[[Any], Any]) -> Any:
        """``function`` of the value, as Python needs it: the same for every batch size, or an error."""
        if self.of_tensor:
            _refuse_contents()
        return _agreed([function(value) for value in self.known])

    def __bool__(self) -> bool:
        return bool(self.plain(bool))

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


def _agree(values: Sequence[Any]) -> bool:
    return all(type(value) is type(values[0]) and value == values[0] for value in values)


def _agreed(values: Sequence[Any]) -> Any:
    """What all examples agree on; if they do not, the batch size is what differs."""
    if not _agree(values):
        raise CaptureError(
            "the batch size is needed as a number",
            hint="a Program must work at any batch size: reshape with -1, or treat the batch as a whole",
        )
    return values[0]


def _reads_contents(kind: str, target: Any, args: tuple[Any, ...]) -> bool:
    if kind == "call_method":
        return target in _READERS and isinstance(args[0], ExampleProxy) and args[0].of_tensor
    return kind == "call_function" and target in _READER_FUNCTIONS


def _refuse_contents() -> NoReturn:
    raise CaptureError(
        "control flow depends on the values in a tensor",
        hint="a Program takes the same path for every input; compute both and choose with torch.where",
    )


class _Context:
    """Stands in for an autograd context while only the forward pass is of interest."""

    def save_for_backward(self, *tensors: Any) -> None:
        """Nothing is saved: a Program's backward pass is torch's own."""

    save_for_forward = mark_dirty = mark_non_differentiable = save_for_backward

    def set_materialize_grads(self, value: bool) -> None:
        """No gradients here."""


@contextmanager
def _plain_autograd_functions() -> Iterator[None]:
    """Let a user's autograd Function be traced through: its forward, written in Python, is called."""
    base = torch.autograd.Function
    original = base.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(arg, fx.Proxy) for arg in args):
            return original.__get__(None, cls)(*args, **kwargs)
        if cls.setup_context is base.setup_context:
            return cls.forward(_Context(), *args, **kwargs)
        return cls.forward(*args, **kwargs)

    base.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        base.apply = original  # type: ignore[method-assign]
