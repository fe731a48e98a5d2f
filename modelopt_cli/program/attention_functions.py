"""Taking ``F.multi_head_attention_forward`` apart into products with its weights and a scaled dot product.

Networks call it themselves to pool by attention, as CLIP's ResNets do (Radford et al., ICML 2021).
"""

import copy
import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from modelopt_cli.program.attention import Writer, attention_mask, is_first_item
from modelopt_cli.program.calls import arguments, operation
from modelopt_cli.program.program import Program
from modelopt_cli.program.shapes import program_values

_FUNCTION = "multi_head_attention_forward"
_EXTRAS = ("bias_k", "bias_v", "static_k", "static_v")


def split_attention_functions(program: Program) -> Program:
    """Write out calls of the function, but for those that only the function itself can compute.

    Args:
        program: in inference form; it is not changed.

    Returns:
        The Program itself where there is no such call.
    """
    calls = [node for node in program.graph.nodes if operation(node) == _FUNCTION]
    if not calls:
        return program
    values = {node.name: value for node, value in program_values(program, 1).items()}
    names = {node.name for node in calls if _is_plain(arguments(node), node, values)}
    if not names:
        return program
    program = copy.deepcopy(program)
    for node in [node for node in program.graph.nodes if node.name in names]:
        _split(program.graph, node, values)
    program.graph.eliminate_dead_code()
    program.recompile()
    return program


def _is_plain(bound: Mapping[str, Any], node: fx.Node, values: Mapping[str, Any]) -> bool:
    mask = bound["attn_mask"]
    packed = not bound["use_separate_proj_weight"]
    return (
        all(is_first_item(user) for user in node.users)
        and not any(bound[name] is not None for name in _EXTRAS)
        and not (bound["add_zero_attn"] or bound["training"])
        and type(bound["num_heads"]) is int
        and values[bound["query"].name].dim() == 3
        and (mask is None or values[mask.name].dim() == 2)
        and not (packed and len({bound[name] for name in ("query", "key", "value")}) > 1)
    )


def _split(graph: fx.Graph, node: fx.Node, values: Mapping[str, Any]) -> None:
    bound = arguments(node)
    write = Writer(graph, node)
    mask = attention_mask(write, bound["attn_mask"], bound["key_padding_mask"], values)
    masked = {} if mask is None else {"attn_mask": mask}
    # (length, N, width) to (N, heads, length, width of a head)
    parts = [_by_head(write, part, bound["num_heads"]) for part in _projected(write, bound, values)]
    mixed = write.add("call_function", F.scaled_dot_product_attention, *parts, **masked)
    joined = write.add("call_function", torch.permute, mixed, (2, 0, 1, 3))
    joined = write.add("call_function", torch.flatten, joined, 2)
    output = (bound["out_proj_weight"], bound["out_proj_bias"])
    result = write.add("call_function", F.linear, joined, *output)
    for user in list(node.users):
        user.replace_all_uses_with(result)
        graph.erase_node(user)
    graph.erase_node(node)


def _projected(write: Writer, bound: Mapping[str, Any], values: Mapping[str, Any]) -> list[fx.Node]:
    bias = bound["in_proj_bias"]
    if not bound["use_separate_proj_weight"]:
        packed = write.add("call_function", F.linear, bound["query"], bound["in_proj_weight"], bias)
        parts = write.add("call_function", torch.chunk, packed, 3, -1)
        return [write.add("call_function", operator.getitem, parts, place) for place in range(3)]
    projections = []
    for place, (letter, name) in enumerate(zip("qkv", ("query", "key", "value"), strict=True)):
        weight = bound[f"{letter}_proj_weight"]
        width = int(values[weight.name].shape[0])
        rows = slice(place * width, (place + 1) * width)
        part = None if bias is None else write.add("call_function", operator.getitem, bias, rows)
        projections.append(write.add("call_function", F.linear, bound[name], weight, part))
    return projections


def _by_head(write: Writer, part: fx.Node, heads: int) -> fx.Node:
    split = write.add("call_method", "unflatten", part, -1, (heads, -1))
    return write.add("call_function", torch.permute, split, (1, 2, 0, 3))
