"""Taking ``nn.MultiheadAttention`` apart, so that its projections are ordinary linear layers."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import pairwise
from operator import getitem
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from modelopt_cli.program.calls import arguments, operation
from modelopt_cli.program.program import Program
from modelopt_cli.program.shapes import program_values

_INPUTS = {"q": "query", "k": "key", "v": "value"}
_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def split_attention(program: Program) -> Program:
    """Replace attention modules by linear layers and a scaled dot product.

    An attention ``NAME`` becomes ``NAME.in_proj`` (query, key and value in one), the attention of
    Vaswani et al. (NeurIPS 2017, section 3.2) and ``NAME.out_proj``. Where its inputs differ there is a
    layer for each: ``NAME.q_proj`` and ``NAME.kv_proj`` in a decoder that attends to an encoder, say. What
    ``undivided`` lists stays a module.

    Args:
        program: in inference form; it is not changed.
    """
    calls = _calls(program)
    if not calls:
        return program
    values = {node.name: value for node, value in program_values(program, 1).items()}
    undivided = _undivided(program, calls, values)
    calls = [node for node in calls if str(node.target) not in undivided]
    if not calls:
        return program
    names = {node.name for node in calls}
    layouts = _layouts(program, calls)
    program = copy.deepcopy(program)
    for node in [n for n in program.graph.nodes if n.name in names]:
        _split(program, node, layouts[str(node.target)], values)
    for name, layout in layouts.items():
        _replace_module(program, name, layout)
    program.graph.eliminate_dead_code()
    program.recompile()
    return program


def split_names(program: Program, split: Program) -> dict[str, str]:
    """Parameters that ``split_attention`` gave another name: the name before to the name after.

    Those of which it made several are not among them.
    """
    names = {
        name: f"{name.removesuffix('_weight')}.weight"
        for name in program.state_dict()
        if name.rpartition(".")[2] in _WEIGHTS
    }
    after = split.state_dict()
    return {old: new for old, new in names.items() if old not in after and new in after}


def undivided(program: Program) -> dict[str, str]:
    """Attention modules that ``split_attention`` leaves whole, and a clause that says why."""
    calls = _calls(program)
    values = program_values(program, 1) if calls else {}
    return _undivided(program, calls, {node.name: value for node, value in values.items()})


def _calls(program: Program) -> list[fx.Node]:
    modules = dict(program.named_modules())
    calls = program.graph.find_nodes(op="call_module")
    return [node for node in calls if isinstance(modules[str(node.target)], nn.MultiheadAttention)]


def _undivided(program: Program, calls: Sequence[fx.Node], values: Mapping[str, Any]) -> dict[str, str]:
    fetched = {str(node.target) for node in program.graph.find_nodes(op="get_attr")}
    layouts = _layouts(program, calls)
    reasons: dict[str, str] = {}
    for node in calls:
        path, module = str(node.target), _attention(program, node)
        reason = _obstacle(node, module, values)
        if any(f"{path}.{name}" in fetched for name in (*_WEIGHTS, "in_proj_bias")):
            reason = "whose weights are read outside of it, too"
        packed = program.encodings.get(f"{path}.in_proj_weight")
        if len(layouts[path]) > 1 and packed is not None and not packed.is_plain:
            reason = "whose weights for several inputs are compressed as one"
        if reason is not None:
            reasons.setdefault(path, reason)
    return reasons


def _attention(program: Program, node: fx.Node) -> nn.MultiheadAttention:
    module = program.get_submodule(str(node.target))
    assert isinstance(module, nn.MultiheadAttention)
    return module


def _obstacle(node: fx.Node, module: nn.MultiheadAttention, values: Mapping[str, Any]) -> str | None:
    """The reason why a call needs the whole module; None where it does not."""
    bound = arguments(node, module)
    if not all(is_first_item(user) for user in node.users):
        return "whose attention weights are used"
    if module.bias_k is not None or module.add_zero_attn:
        return "which adds keys and values of its own"
    if values[node.name][0].dim() != 3:
        return "whose input has no batch dimension"
    mask = bound["attn_mask"]
    if mask is not None and values[mask.name].dim() != 2:
        return "whose mask differs between heads"
    return None


def is_first_item(node: fx.Node) -> bool:
    """True if a node takes the first part of a tuple."""
    return operation(node) == "getitem" and arguments(node)["index"] == 0


def _layouts(program: Program, calls: Sequence[fx.Node]) -> dict[str, tuple[str, ...]]:
    """Inputs of each module that one layer projects: ``("qkv",)``, ``("q", "kv")`` and so on.

    A layer projects neighbours that are the same value in every call, unless they have weights of their own.
    """
    cuts: dict[str, set[str]] = {}
    for node in calls:
        module = _attention(program, node)
        bound = arguments(node, module)
        apart = module.in_proj_weight is None
        cut = {b for a, b in pairwise("qkv") if apart or bound[_INPUTS[a]] is not bound[_INPUTS[b]]}
        cuts.setdefault(str(node.target), set()).update(cut)
    return {
        path: tuple("".join(f" {x}" if x in cut else x for x in "qkv").split()) for path, cut in cuts.items()
    }


@dataclass
class Writer:
    """Appends calls to a graph, one after another."""

    graph: fx.Graph
    cursor: fx.Node

    def add(self, op: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Append a call of ``target``."""
        with self.graph.inserting_after(self.cursor):
            self.cursor = self.graph.create_node(op, target, args, kwargs)
        return self.cursor


def _split(program: Program, node: fx.Node, layout: tuple[str, ...], values: Mapping[str, Any]) -> None:
    """Write the attention out after its node and let its readers read that instead."""
    module = _attention(program, node)
    bound = arguments(node, module)
    write = Writer(program.graph, node)
    parts = [part for letters in layout for part in _projected(write, node, module, letters)]
    mask = attention_mask(write, bound["attn_mask"], bound["key_padding_mask"], values)
    masked = {} if mask is None else {"attn_mask": mask}
    mixed = write.add("call_function", F.scaled_dot_product_attention, *parts, **masked)
    by_token = write.add(
        "call_function", torch.permute, mixed, (0, 2, 1, 3) if module.batch_first else (2, 0, 1, 3)
    )
    joined = write.add("call_function", torch.flatten, by_token, 2)
    result = write.add("call_module", f"{node.target}.out_proj", joined)
    for user in list(node.users):
        user.replace_all_uses_with(result)
        program.graph.erase_node(user)
    program.graph.erase_node(node)


def _projected(write: Writer, node: fx.Node, module: nn.MultiheadAttention, letters: str) -> list[fx.Node]:
    """Projections of one input for each letter, ``(N, heads, length, width)``."""
    source = arguments(node, module)[_INPUTS[letters[0]]]
    packed = write.add("call_module", f"{node.target}.{_layer_name(letters)}", source)
    heads, width = module.num_heads, module.head_dim
    first = 0 if module.batch_first else 1  # the batch dimension
    if len(letters) == 1:
        split = write.add("call_method", "unflatten", packed, -1, (heads, width))
        return [write.add("call_function", torch.permute, split, (first, 2, 1 - first, 3))]
    split = write.add("call_method", "unflatten", packed, -1, (len(letters), heads, width))
    stacked = write.add("call_function", torch.permute, split, (2, first, 3, 1 - first, 4))
    parts = write.add("call_function", torch.unbind, stacked, 0)
    return [write.add("call_function", getitem, parts, i) for i in range(len(letters))]


def _layer_name(letters: str) -> str:
    return "in_proj" if letters == "qkv" else f"{letters}_proj"


def attention_mask(write: Writer, pairs: Any, keys: Any, values: Mapping[str, Any]) -> Any:
    """The mask of scaled dot products: True where a query sees a key, or what is added to the scores.

    Args:
        write: adds nodes.
        pairs: ``(queries, keys)``, True where a pair is masked, or what is added to its score; or None.
        keys: ``(N, keys)``, the same for each key; or None.
        values: tensors by node name.
    """
    flagged = [mask is not None and values[mask.name].dtype == torch.bool for mask in (pairs, keys)]
    if keys is not None:
        keys = write.add("call_method", "unsqueeze", write.add("call_method", "unsqueeze", keys, 1), 1)
    masks = [(mask, flag) for mask, flag in zip((pairs, keys), flagged, strict=True) if mask is not None]
    flags = [mask for mask, flag in masks if flag]
    scores = [mask for mask, flag in masks if not flag]
    masked = reduce(partial(write.add, "call_function", torch.logical_or), flags) if flags else None
    added = reduce(partial(write.add, "call_function", torch.add), scores) if scores else None
    if added is None or masked is None:
        return added if masked is None else write.add("call_function", torch.logical_not, masked)
    return write.add("call_function", torch.where, masked, -math.inf, added)


def _replace_module(program: Program, name: str, layout: tuple[str, ...]) -> None:
    attention = program.get_submodule(name)
    assert isinstance(attention, nn.MultiheadAttention)
    parts = nn.Module()
    for letters in layout:
        setattr(parts, _layer_name(letters), _linear(*_weights(attention, letters)))
    parts.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)
    program.set_submodule(name, parts)


def _weights(attention: nn.MultiheadAttention, letters: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of some of the projections; those of all three are the module's own."""
    bias = attention.in_proj_bias
    if letters == "qkv":
        return attention.in_proj_weight, bias
    start, width = "qkv".index(letters[0]), attention.embed_dim
    rows = slice(start * width, (start + len(letters)) * width)
    if attention.in_proj_weight is None:
        weight = getattr(attention, f"{letters}_proj_weight")
    else:
        weight = _part(attention.in_proj_weight, rows)
    return weight, None if bias is None else _part(bias, rows)


def _part(tensor: Tensor, rows: slice) -> nn.Parameter:
    return nn.Parameter(tensor.detach()[rows].clone(), tensor.requires_grad)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = weight
    if bias is not None:
        layer.bias = bias  # type: ignore[assignment]
    return layer
