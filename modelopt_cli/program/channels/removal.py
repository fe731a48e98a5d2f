"""Taking channels out: smaller tensors, smaller layers, the same graph with other sizes."""

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from modelopt_cli.errors import ModeloptError
from modelopt_cli.program.channels.dependencies import Dependencies, analyse
from modelopt_cli.program.channels.remaining import Remaining
from modelopt_cli.program.channels.replay import Replay
from modelopt_cli.program.channels.trace import OTHER_BATCH, Trace
from modelopt_cli.program.layer_kinds import build, config_of, kind_of, put_tensors
from modelopt_cli.program.program import Program
from modelopt_cli.program.rewrite import copy_graph
from modelopt_cli.program.shapes import value_shapes

Kept = dict[str, dict[int, Tensor]]


def remove(
    program: Program, keep: Mapping[str, Sequence[int]], *, dependencies: Dependencies | None = None
) -> Program:
    """The Program without some of its channels; nothing is shared with the original.

    It computes what the original would if what is removed were zero wherever it is read. Layer and
    group norms take their statistics over the channels that are left. Tensors that shrink lose their
    encodings, which ``artifact.encodings.compact`` makes again.

    Args:
        program: not changed.
        keep: group name, as ``analyse`` gives it, to the units that stay; other groups stay whole.
        dependencies: what ``analyse`` found in this Program, to save doing it again.

    Raises:
        UsageError: no such group or unit, or no unit of a group is kept.
    """
    analysed = dependencies or analyse(program)
    original, trace = analysed.program, analysed.trace
    remaining = Remaining(analysed, keep)
    kept = _kept_positions(trace, remaining)
    graph = copy_graph(original.graph)
    replay = Replay(graph, trace, remaining, kept)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    tensors = _tensors(original, kept)
    parts = _parts(original, graph, trace, remaining, replay, tensors)
    smaller = original.with_graph(parts, graph).train(original.training)
    names = smaller.state_dict().keys() - kept.keys()
    smaller.encodings = {name: each for name, each in original.encodings.items() if name in names}
    _check(smaller, trace, replay)
    return smaller


def _kept_positions(trace: Trace, remaining: Remaining) -> Kept:
    """The positions that stay along each dimension that shrinks, by tensor."""
    kept: Kept = {}
    for slot in trace.slots:
        positions = remaining.kept(slot.line)
        if len(positions) == len(slot.line):
            continue
        kept.setdefault(slot.tensor, {})[slot.dim] = positions
    return kept


def _tensors(program: Program, kept: Kept) -> dict[int, Tensor]:
    """A new tensor for each old one, by the old one's id."""
    new: dict[int, Tensor] = {}
    for name, tensor in program.state_dict(keep_vars=True).items():
        if id(tensor) in new:
            continue
        values = tensor.detach()
        for dim, positions in kept.get(name, {}).items():
            values = values.index_select(dim, positions.to(values.device))
        values = values.clone() if name not in kept else values.contiguous()
        is_parameter = isinstance(tensor, nn.Parameter)
        new[id(tensor)] = nn.Parameter(values, tensor.requires_grad) if is_parameter else values
    return new


def _parts(
    program: Program,
    graph: fx.Graph,
    trace: Trace,
    remaining: Remaining,
    replay: Replay,
    tensors: Mapping[int, Tensor],
) -> dict[str, Any]:
    """The new layers and tensors the graph refers to, by path."""
    device = next((t.device for t in tensors.values()), torch.device("cpu"))
    parts: dict[str, Any] = {}
    for node in graph.nodes:
        path = str(node.target)
        if node.op == "call_module" and path not in parts:
            fields = dict(trace.fields.get(path, {}))
            parts[path] = _layer(
                program.get_submodule(path), fields, remaining, replay.values[node.name], tensors
            )
        elif node.op == "get_attr" and path in replay.indices:
            parts[path] = replay.indices[path].to(device)
        elif node.op == "get_attr":
            parts[path] = tensors[id(attrgetter(path)(program))]
    return parts


def _layer(
    layer: nn.Module,
    fields: Mapping[str, Any],
    remaining: Remaining,
    output: Any,
    tensors: Mapping[int, Tensor],
) -> nn.Module:
    config = config_of(layer)
    for name, counted in fields.items():
        config[name] = (
            [remaining.count(c) if isinstance(c, Tensor) else c for c in counted]
            if isinstance(counted, list)
            else remaining.count(counted)
        )
    if isinstance(layer, nn.Unflatten):
        config["unflattened_size"] = _unflattened(layer, output)
    new = build(kind_of(layer) or "", config)
    old = dict(layer.named_modules())
    for path, part in new.named_modules():
        own = (old[path]._parameters, old[path]._buffers)
        put_tensors(part, *({k: None if v is None else tensors[id(v)] for k, v in d.items()} for d in own))
    return new


def _unflattened(layer: nn.Unflatten, output: Tensor) -> list[int]:
    count = len(layer.unflattened_size)
    start = int(layer.dim) if int(layer.dim) >= 0 else int(layer.dim) + output.dim() - count + 1
    return list(output.shape[start : start + count])


def _check(smaller: Program, trace: Trace, replay: Replay) -> None:
    """Every value has the shape that its labels say, at another batch size, too."""
    for name, shape in value_shapes(smaller, OTHER_BATCH).items():
        labels, size = replay.values.get(name), trace.batched.get(name)
        if name in trace.inside or not isinstance(labels, Tensor) or not isinstance(size, torch.Size):
            continue
        sizes = zip(labels.shape, size, trace.shapes[name], strict=True)
        expected = [count * batched // before if before else 0 for count, batched, before in sizes]
        if list(shape) != expected:
            raise ModeloptError(f"{tuple(shape)} where {tuple(expected)} should be left", where=name)
