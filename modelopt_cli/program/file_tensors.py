"""Tensors of a file: held against what its program says of them, and put into the layers."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from modelopt_cli.errors import ArtifactError
from modelopt_cli.program.json_arguments import DTYPES
from modelopt_cli.program.metadata import keyed, listed
from modelopt_cli.program.nodes import leaf_above
from modelopt_cli.program.quantized import Quantized, Weighted
from modelopt_cli.program.safe_names import shown


def checked_tensors(
    entries: Mapping[str, Any], tied: Mapping[str, Any], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """All tensors by all their names, checked against what the data says of them."""
    missing, extra = set(entries) - set(state), set(state) - set(entries) - set(tied)
    if missing or extra:
        name = min(missing or extra)
        raise ArtifactError(
            f"the tensor {shown(name)} is {'missing' if missing else 'not part of the program'}"
        )
    tensors = {}
    for path, entry in entries.items():
        fields = keyed(entry, ("dtype", "shape"), "a tensor")
        dtype, shape = fields["dtype"], listed(fields["shape"], "shape", 64)
        right = isinstance(dtype, str) and DTYPES.get(dtype) == state[path].dtype
        if not right or list(state[path].shape) != shape or bool in map(type, shape):
            raise ArtifactError("a tensor's type or shape is not what the program says", where=shown(path))
        tensors[path] = state[path]
    for path, first in tied.items():
        if path in entries or not isinstance(first, str) or first not in entries:
            raise ArtifactError("a tied name must stand for a tensor with another name", where=shown(path))
        if path in state and not _equal(state[path], tensors[first]):
            raise ArtifactError("tied tensors differ", where=shown(path))
        tensors[path] = tensors[first]
    return tensors


def _equal(a: Tensor, b: Tensor) -> bool:
    """True if two tensors are the same bit for bit, NaN included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def _slots(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Every place for a tensor inside leaf layers: full path, owner, name there, empty tensor."""
    for path, leaf in modules.items():
        for inner, empty in leaf.state_dict(keep_vars=True).items():
            owner, _, name = inner.rpartition(".")
            yield f"{path}.{inner}", leaf.get_submodule(owner), name, empty


def assign(
    modules: Mapping[str, nn.Module], attributes: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Put the tensors into the leaves; return those that belong outside of them."""
    slots = {path: (owner, name, empty) for path, owner, name, empty in _slots(modules)}
    unexpected = set(tensors) ^ {*slots, *attributes}
    if unexpected:
        raise ArtifactError("the tensors listed are not those the layers have", where=shown(min(unexpected)))
    parameters: dict[int, nn.Parameter] = {}

    def parameter(tensor: Tensor) -> nn.Parameter:
        grad = tensor.is_floating_point()
        return parameters.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=grad))

    for path, (owner, name, empty) in slots.items():
        tensor = tensors[path]
        exact = isinstance(owner, Quantized)  # its kernels take no other type
        if tensor.shape != empty.shape or not _fits(tensor.dtype, empty.dtype, exact):
            raise ArtifactError("the tensor does not fit the layer's hyperparameters", where=path)
        if isinstance(empty, nn.Parameter):
            setattr(owner, name, parameter(tensor))
        else:
            owner._buffers[name] = tensor
    return {p: parameter(tensors[p]) if kind == "parameter" else tensors[p] for p, kind in attributes.items()}


def _fits(stored: torch.dtype, wanted: torch.dtype, exact: bool) -> bool:
    return stored == wanted or (stored.is_floating_point and wanted.is_floating_point and not exact)


def check_values(modules: Mapping[str, nn.Module]) -> None:
    """Refuse integers and scales that an int8 layer cannot compute with."""
    for path, leaf in modules.items():
        for layer in (part for part in leaf.modules() if isinstance(part, Weighted)):
            try:
                layer.check()
            except ValueError as error:
                raise ArtifactError(str(error), where=path) from error


def fetch_from_leaves(graph: fx.Graph, parts: dict[str, Any]) -> None:
    """``get_attr`` of a tensor inside a leaf needs an entry of its own when a GraphModule is built."""
    for node in graph.find_nodes(op="get_attr", sort=False):
        path = str(node.target)
        if path not in parts:
            leaf = leaf_above(path, parts)
            assert leaf is not None  # graph_from_data has looked
            parts[path] = parts[leaf].state_dict(keep_vars=True)[path[len(leaf) + 1 :]]
