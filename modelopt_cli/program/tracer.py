"""The first of the two tracers behind ``capture``: fx's, with our own notion of a leaf module.

It keeps every size symbolic and gives up where Python needs a number: ``math.ceil(x.shape[2])``,
``range(x.size(1))``, ``if x.shape[-2:] != (28, 28)``. Then ``ExampleTracer`` takes over.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from modelopt_cli.errors import CaptureError
from modelopt_cli.program.allowlist import IN_PLACE_OPERATORS
from modelopt_cli.program.input_batch import as_arguments
from modelopt_cli.program.layer_kinds import kind_of
from modelopt_cli.program.output_structure import plain
from modelopt_cli.program.patches import (
    plain_autograd_functions,
    proxied_sizes,
    wrapped_functions_followed,
)

# Methods of plain tensors that Python calls for an operator, where the other operand is a proxy.
_OPERATORS: dict[Any, Callable[..., Any]] = {
    **{"__getitem__": operator.getitem, "__and__": operator.and_, "__or__": operator.or_},
    **{f"__{name}__": getattr(operator, name) for name in IN_PLACE_OPERATORS},
    "__xor__": operator.xor,
}
# Memory without values: any are right, and zeros are the same in every run.
_EMPTY: dict[Any, Any] = {
    torch.empty: torch.zeros,
    torch.empty_like: torch.zeros_like,
    "new_empty": "new_zeros",
}


class ProgramTracer(fx.Tracer):
    """Traces through everything but the leaf modules on the allow-list.

    Args:
        example: a batch of the network's inputs by name; the placeholders get these names.

    Attributes:
        constants: tensors the forward pass made out of nothing, by the name their nodes have.
        failed_in: path of the innermost module whose forward raised, or None.
        source: the proxy of the network's first input.
        exact: the Program computes the same to the last bit.
    """

    proxy_buffer_attributes = True
    exact = True

    def __init__(self, example: Mapping[str, Tensor]) -> None:
        super().__init__(autowrap_modules=())  # type: ignore[arg-type]
        self.names = tuple(example)
        self.dtype = example[self.names[0]].dtype
        self.constants: dict[str, Tensor] = {}
        self.failed_in: str | None = None
        self.source: Any = None

    def trace(
        self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None
    ) -> fx.Graph:
        """The graph of ``root``'s forward pass as a function of its inputs, which returns plain outputs."""
        sizes = proxied_sizes(lambda: self.source, self.dtype)
        with torch.no_grad(), plain_autograd_functions(), wrapped_functions_followed(), sizes:
            return super().trace(root, concrete_args)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """A placeholder for each input, whatever the signature: other arguments keep their defaults."""
        sources = {name: self.create_proxy("placeholder", name, (), {}) for name in self.names}
        self.source = sources[self.names[0]]

        def forward(root: nn.Module, *proxies: Any) -> Any:
            args, kwargs = as_arguments(root_fn, dict(zip(self.names, proxies, strict=True)))
            return plain(root_fn(root, *args, **kwargs))

        return forward, [self.root, *sources.values()]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A proxy that records ``x += y`` as the change in place that it is."""
        return ProgramProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Leaves are exactly the classes on the list, so a subclass with its own forward is traced."""
        return kind_of(m) is not None

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
        """Record a call as in fx, under the operation and target that ``recorded`` gives."""
        kind, target = recorded(kind, target)
        return super().create_proxy(kind, target, args, kwargs, name, type_expr, proxy_factory_fn)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call a module as in fx, remembering where an exception came from."""
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed_in is None:
                self.failed_in = (self.submodule_paths or {}).get(m)
            raise

    def create_arg(self, a: Any) -> Any:
        """Make an argument as in fx, but constant tensors go to ``constants``, not onto the user's module."""
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and not self._is_attribute(a):
            name = f"constant_{len(self.constants)}"
            self.constants[name] = a
            self.tensor_attrs[a] = name
        return super().create_arg(a)

    def _is_attribute(self, tensor: Tensor) -> bool:
        return tensor in self.tensor_attrs or any(tensor is buffer for buffer in self.root.buffers())


class ProgramProxy(fx.Proxy):
    """A node; unlike fx's it does not take ``x += y`` for ``x = x + y``, nor lose ``x.data = y``."""

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(Tensor, name):
            raise CaptureError(
                f"assigns to a tensor's attribute {name!r}",
                hint="compute a new tensor: y = f(x) in place of x.data = f(x)",
            )
        super().__setattr__(name, value)

    def __format__(self, format_spec: str) -> str:
        return str(self)  # in a message, which is no part of the graph

    def __copy__(self) -> "ProgramProxy":
        return self  # a copy of a tensor shares its memory

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.tracer.create_proxy("call_method", "clone", (self,), {})


def _define_in_place(name: str) -> None:
    function = getattr(operator, name)

    def change(self: ProgramProxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    setattr(ProgramProxy, f"__{name}__", change)


for _name in IN_PLACE_OPERATORS:
    _define_in_place(_name)


def recorded(kind: str, target: Any) -> tuple[str, Any]:
    """Op and target that a call is recorded as.

    Raises:
        CaptureError: it assigns to a tensor that was made without the input.
    """
    if kind == "call_method" and target == "__setitem__":
        raise CaptureError(
            "a value is assigned into a tensor that was made without the input",
            hint="make the tensor from the input: x.new_zeros(...) in place of torch.zeros(...)",
        )
    if kind == "call_method" and target in _OPERATORS:
        return "call_function", _OPERATORS[target]
    return kind, _EMPTY.get(target, target) if kind in ("call_function", "call_method") else target
