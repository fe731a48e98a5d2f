"""Changes to torch and to the network that last only while a forward pass is followed."""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace
from torch.fx.node import map_aggregate

from modelopt_cli.program.allowlist import function_name

# Their sizes may be given one by one, where torch looks for no proxies.
_METHODS = ("expand", "new_zeros", "new_ones", "new_empty", "new_full")
_FACTORIES = ("zeros", "ones", "empty", "full")
_CONTAINERS = (dict, OrderedDict, defaultdict, list, set)


class _Context:
    """Stands in for an autograd context while only the forward pass is of interest."""

    def save_for_backward(self, *tensors: Any) -> None:
        """Saves nothing: a Program's backward pass is torch's own."""

    save_for_forward = mark_dirty = mark_non_differentiable = save_for_backward

    def set_materialize_grads(self, value: bool) -> None:
        """No gradients here."""


@contextmanager
def plain_autograd_functions() -> Iterator[None]:
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


@contextmanager
def wrapped_functions_followed() -> Iterator[None]:
    """Let functions that ``torch.fx.wrap`` keeps whole be followed, but for those that a Program can hold."""
    wrapped: dict[tuple[int, str], dict[str, Any]] = _symbolic_trace._wrapped_fns_to_patch
    before = dict(wrapped)
    for (place, name), namespace in before.items():
        if name in namespace and function_name(namespace[name]) is None:
            del wrapped[place, name]
    try:
        yield
    finally:
        wrapped.update(before)


@contextmanager
def proxied_sizes(source: Callable[[], fx.Proxy], dtype: torch.dtype) -> Iterator[None]:
    """Let ``tensor.expand(n, -1)`` and ``torch.zeros(n, 4)`` be recorded where ``n`` is a proxy.

    The second is recorded as ``x.new_zeros((n, 4))``, so that it is made where ``x`` is and of its type.

    Args:
        source: returns the proxy of ``x``.
        dtype: type of ``x``.
    """
    methods = {name: getattr(Tensor, name) for name in _METHODS}  # inherited
    factories = {name: getattr(torch, name) for name in _FACTORIES}
    for name, function in methods.items():
        setattr(Tensor, name, _recording(function, partial(_method, name)))
    for name, function in factories.items():
        setattr(torch, name, _recording(function, partial(_factory, name, source, dtype)))
    try:
        yield
    finally:
        for name, function in factories.items():
            setattr(torch, name, function)
        for name in methods:
            delattr(Tensor, name)


def _recording(function: Callable[..., Any], record: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        proxies: list[fx.Proxy] = []
        map_aggregate((args, kwargs), lambda a: proxies.append(a) if isinstance(a, fx.Proxy) else None)
        return record(proxies[0], *args, **kwargs) if proxies else function(*args, **kwargs)

    return call


def _method(name: str, proxy: fx.Proxy, *args: Any, **kwargs: Any) -> Any:
    return proxy.tracer.create_proxy("call_method", name, args, kwargs)


def _factory(
    name: str, source: Callable[[], fx.Proxy], like: torch.dtype, proxy: fx.Proxy, *sizes: Any, **options: Any
) -> Any:
    value = options.get("fill_value", sizes[-1]) if name == "full" else 0.0
    dtype = options.get("dtype") or (like if isinstance(value, fx.Proxy) else torch.tensor(value).dtype)
    options = {key: given for key, given in options.items() if key in ("size", "fill_value")}
    if dtype != like:
        options["dtype"] = dtype
    return proxy.tracer.create_proxy("call_method", f"new_{name}", (source(), *sizes), options)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """The attributes of every module of a network, and what is in its buffers, as they were, afterwards.

    A network may keep what it computed for the next call: a position table in a dictionary, its last
    feature map, a counter. What tracing leaves there are proxies, which the next call must not find.
    """
    saved: dict[int, tuple[Any, Any]] = {}
    for module in model.modules():
        _save(vars(module), saved)
    buffers = [(buffer, buffer._version, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, version, content in buffers:
            if buffer._version != version:
                buffer.copy_(content)
        for container, content in saved.values():
            container.clear()
            if isinstance(container, list):
                container.extend(content)
            else:
                container.update(content)


def _save(value: Any, saved: dict[int, tuple[Any, Any]]) -> None:
    """Keep a copy of a plain container and of those inside it."""
    if type(value) not in _CONTAINERS or id(value) in saved:
        return
    saved[id(value)] = value, copy(value)
    for item in value.values() if isinstance(value, dict) else value:
        _save(item, saved)
