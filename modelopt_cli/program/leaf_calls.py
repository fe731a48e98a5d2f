"""Leaf layers as single calls in the graph that ``torch.export`` makes.

Export looks into every module. While ``as_single_calls`` is in force, layers on the allow-list are called
through an operator of ours, ``modelopt::layer``, so that the graph has one node for each call, as fx's has.
What a layer returns is seen by running it on export's own fake tensors.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from modelopt_cli.errors import ArtifactError
from modelopt_cli.program.layer_kinds import kind_of, share

OPERATOR = "modelopt::layer"
_SCHEMA = "layer(Tensor[] tensors, SymInt[] sizes, int call) -> Tensor[]"


@dataclass(frozen=True)
class Place:
    """Stands for a tensor or a size: its number among those of the call."""

    index: int
    is_size: bool = False


@dataclass
class LayerCall:
    """One call of a leaf layer.

    Attributes:
        path: of the layer.
        layer: of the same kind, with the same tensors.
        arguments: ``(args, kwargs)``, with a ``Place`` for each tensor and each size.
        results: what it returned, with a ``Place`` for each tensor; None before it has run.
    """

    path: str
    layer: nn.Module
    arguments: Any
    results: Any = None

    def run(self, tensors: list[Tensor], sizes: list[Any]) -> list[Tensor]:
        """Run the layer on fake tensors; returns the tensors of its results."""
        mode: Any = torch._guards.detect_fake_mode(tensors)
        own = [*self.layer.named_parameters(), *self.layer.named_buffers()]
        args, kwargs = filled(self.arguments, tensors, sizes)
        results = functional_call(self.layer, {name: mode.from_tensor(t) for name, t in own}, args, kwargs)
        returned: list[Tensor] = []
        self.results = _emptied(results, returned, [])
        return [t.clone() if any(t is given for given in tensors) else t for t in returned]


_calls: list[LayerCall] = []
_library: list[torch.library.Library] = []


@contextmanager
def as_single_calls(model: nn.Module) -> Iterator[list[LayerCall]]:
    """Let calls of the leaf layers of a network be single nodes of what export records.

    Yields:
        The calls, which the operator's last argument counts.
    """
    _define()
    _calls.clear()
    patched: list[nn.Module] = []
    try:
        for path, module in model.named_modules():
            if path and (layer := _leaf(module)) is not None:
                patched.append(module)
                vars(module)["forward"] = partial(_call, path, layer)
        yield _calls
    finally:
        for module in patched:
            del vars(module)["forward"]
        _calls.clear()


def filled(structure: Any, tensors: Any, sizes: Any = ()) -> Any:
    """A structure with values in place of every ``Place``."""

    def value(item: Any) -> Any:
        if not isinstance(item, Place):
            return item
        return (sizes if item.is_size else tensors)[item.index]

    return pytree.tree_map(value, structure)


def _leaf(module: nn.Module) -> nn.Module | None:
    """A layer that stands for a module; None where the module is no leaf, or not a plain one."""
    if kind_of(module) is None or "forward" in vars(module):
        return None
    try:
        return share(module)
    except (ValueError, ArtifactError):
        return None


def _call(path: str, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    tensors: list[Tensor] = []
    sizes: list[Any] = []
    call = LayerCall(path, layer, _emptied((args, kwargs), tensors, sizes))
    _calls.append(call)
    results = torch.ops.modelopt.layer(tensors, sizes, len(_calls) - 1)
    return filled(call.results, results)


def _emptied(structure: Any, tensors: list[Tensor], sizes: list[Any]) -> Any:
    """A structure with a ``Place`` for every tensor and size, which are appended to the lists."""

    def place(item: Any) -> Any:
        if isinstance(item, Tensor):
            tensors.append(item)
            return Place(len(tensors) - 1)
        if isinstance(item, torch.SymInt):
            sizes.append(item)
            return Place(len(sizes) - 1, is_size=True)
        return item

    return pytree.tree_map(place, structure)


def _define() -> None:
    """Define the operator, once; it never computes anything but shapes."""
    if _library:
        return
    library = torch.library.Library("modelopt", "FRAGMENT")
    library.define(_SCHEMA)
    run: Callable[..., Any] = lambda tensors, sizes, call: _calls[call].run(tensors, sizes)  # noqa: E731
    torch.library.register_fake(OPERATOR, run, lib=library)
    _library.append(library)
