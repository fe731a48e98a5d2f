"""Taking ``nn.MultiheadAttention`` apart, so that its projections are ordinary linear layers."""

import copy
from collections.abc import Mapping
from operator import getitem
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from modelopt_cli.program.calls import arguments, operation
from modelopt_cli.program.program import Program


def split_attention(program: Program) -> Program:
    """Replace self-attention modules by linear, scaled dot product, linear.

    An attention ``NAME`` becomes ``NAME.in_proj`` (query, key and value in one), the attention of
    Vaswani et al. (NeurIPS 2017, section 3.2) and ``NAME.out_proj``. Only plain self-attention is
    taken apart: one input, batch first, no masks, no use of the attention weights, in every call of it.

    Args:
        program: in inference form; it is not changed.
    """
    modules = dict(program.named_modules())
    calls = _divisible(program, modules)
    if not calls:
        return program
    program = copy.deepcopy(program)
    names = {n.name for n in calls}
    for node in [n for n in program.graph.nodes if n.name in names]:
        _split(program, node)
    for name in {str(n.target) for n in calls}:
        _replace_module(program, name)
    program.graph.eliminate_dead_code()
    program.recompile()
    return program


def split_names(program: Program, split: Program) -> dict[str, str]:
    """Parameters that ``split_attention`` gave another name: the name before to the name after."""
    packed = "in_proj_weight"
    names = {
        name: f"{name[: -len(packed)]}in_proj.weight"
        for name in program.state_dict()
        if name.endswith(packed)
    }
    after = split.state_dict()
    return {old: new for old, new in names.items() if old not in after and new in after}


def _divisible(program: Program, modules: Mapping[str, nn.Module]) -> list[fx.Node]:
    """Calls of the attention modules that can be taken apart: those of which no call needs the whole."""
    calls = [
        node
        for node in program.graph.find_nodes(op="call_module")
        if isinstance(modules[str(node.target)], nn.MultiheadAttention)
    ]
    fetched = {str(node.target) for node in program.graph.find_nodes(op="get_attr")}
    kept_targets = {node.target for node in calls if not _is_plain(node, modules)}
    packed = ("in_proj_weight", "in_proj_bias")  # which the parts have under other names
    kept_targets |= {
        node.target for node in calls if not fetched.isdisjoint(f"{node.target}.{name}" for name in packed)
    }
    return [node for node in calls if node.target not in kept_targets]


def _is_plain(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    module = modules[str(node.target)]
    assert isinstance(module, nn.MultiheadAttention)
    bound = arguments(node, module)
    one_input = bound.get("query") is bound.get("key") is bound.get("value")
    masked = any(bound.get(name) is not None for name in ("key_padding_mask", "attn_mask"))
    packed = module.in_proj_weight is not None and module.bias_k is None
    return bool(
        one_input
        and packed
        and bool(module.batch_first)
        and not bool(module.add_zero_attn)
        and not masked
        and not bound.get("is_causal", False)
        and all(_is_first_item(user) for user in node.users)
    )


def _is_first_item(node: fx.Node) -> bool:
    return operation(node) == "getitem" and arguments(node)["index"] == 0


def _split(program: Program, node: fx.Node) -> None:
    """Write the attention out after its node and let its readers read that instead."""
    module = program.get_submodule(str(node.target))
    assert isinstance(module, nn.MultiheadAttention)
    heads, width = module.num_heads, module.head_dim
    graph = program.graph
    cursor = node

    def add(op: str, target: Any, *args: Any) -> fx.Node:
        nonlocal cursor
        with graph.inserting_after(cursor):
            cursor = graph.create_node(op, target, args, {})
        return cursor

    packed = add("call_module", f"{node.target}.in_proj", arguments(node, module)["query"])
    split = add("call_method", "unflatten", packed, -1, (3, heads, width))
    stacked = add("call_function", torch.permute, split, (2, 0, 3, 1, 4))
    parts = add("call_function", torch.unbind, stacked, 0)
    q, k, v = (add("call_function", getitem, parts, i) for i in range(3))
    mixed = add("call_function", F.scaled_dot_product_attention, q, k, v)
    back = add("call_function", torch.permute, mixed, (0, 2, 1, 3))
    joined = add("call_function", torch.flatten, back, 2)
    result = add("call_module", f"{node.target}.out_proj", joined)
    for user in list(node.users):
        user.replace_all_uses_with(result)
        graph.erase_node(user)
    graph.erase_node(node)


def _replace_module(program: Program, name: str) -> None:
    attention = program.get_submodule(name)
    assert isinstance(attention, nn.MultiheadAttention)
    bias = attention.in_proj_bias is not None
    parts = nn.Module()
    parts.in_proj = nn.Linear(attention.embed_dim, 3 * attention.embed_dim, bias, device="meta")
    parts.in_proj.weight = attention.in_proj_weight
    parts.out_proj = nn.Linear(attention.embed_dim, attention.embed_dim, bias, device="meta")
    parts.out_proj.weight = attention.out_proj.weight
    if bias:
        parts.in_proj.bias, parts.out_proj.bias = attention.in_proj_bias, attention.out_proj.bias
    program.set_submodule(name, parts)
