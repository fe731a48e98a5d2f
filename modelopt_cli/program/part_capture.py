"""Submodules as parts: captured by their calls, and their graphs joined to one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from torch import Tensor, fx, nn

from modelopt_cli.errors import CaptureError
from modelopt_cli.program.capture import capture
from modelopt_cli.program.input_batch import names_by_place
from modelopt_cli.program.input_spec import InputSpec, place_names
from modelopt_cli.program.part_arguments import described, matched
from modelopt_cli.program.parts import Part
from modelopt_cli.program.program import Program
from modelopt_cli.program.rewrite import copy_graph
from modelopt_cli.program.safe_names import is_input_name, path_in_program
from modelopt_cli.program.samples import DTYPES
from modelopt_cli.program.verification import same_outputs


@dataclass(frozen=True)
class Call:
    """One call of a submodule: plain arguments before the call, and what it returned."""

    arguments: Any
    outputs: Any


@dataclass(frozen=True)
class Captured:
    """A submodule, its graph, and how it is called."""

    part: Part
    program: Program


def captured_part(module: nn.Module, path: str, calls: Sequence[Call], taken: set[str]) -> Captured:
    """A submodule as a part.

    Raises:
        Exception: whatever shows that it cannot be one.
    """
    tensors: dict[str, Tensor] = {}
    given = names_by_place(type(module).forward, len(calls[0].arguments[0]))
    start = path.replace(".", "_").replace("-", "_")

    def name_of(place: tuple[str, ...], tensor: Tensor) -> str:
        kind, first, *rest = place
        own = given[int(first)] if kind == "0" else first
        wanted = "_".join((start, own, *rest))
        name = wanted if is_input_name(wanted) else f"input_{len(taken)}"
        while name in taken:
            name += "_"
        taken.add(name)
        tensors[name] = tensor
        return name

    arguments = described(calls[0].arguments, name_of)
    matches = [dict(matched(arguments, each.arguments)) for each in calls]
    inputs = tuple(_described_input(name, [match[name] for match in matches]) for name in tensors)
    wrapper = _Wrapper(module, arguments, tuple(tensors)).eval()
    sample = replace(inputs[0], name=place_names(1)[0])
    others = (replace(e, name=n) for e, n in zip(inputs, place_names(len(inputs)), strict=True))
    sample, *more = others
    program = capture(wrapper, replace(sample, others=tuple(more)))
    for match, each in zip(matches, calls, strict=True):
        if not same_outputs(program(*match.values()), each.outputs, exact=False):
            raise CaptureError("does not compute what the submodule does")
    free = {e.name: own.free for e, own in zip(inputs, program.input.tensors, strict=True)}
    inputs = tuple(replace(e, free=tuple(sorted({*e.free, *free[e.name]}))) for e in inputs)
    return Captured(Part(inputs, arguments), program)


def _described_input(name: str, tensors: Sequence[Tensor]) -> InputSpec:
    """Shape and type of an input, from all calls; sizes that differ among them are free."""
    ranks = {tensor.dim() for tensor in tensors}
    dtype = next(known for known, each in DTYPES.items() if each == tensors[0].dtype)
    if len(ranks) > 1 or ranks == {0} or len({tensor.dtype for tensor in tensors}) > 1:
        raise CaptureError("has no batch dimension")
    shape = tuple(tensors[0].shape[1:])
    free = (i for i in range(len(shape)) if any(tensor.shape[i + 1] != shape[i] for tensor in tensors))
    return InputSpec(shape, dtype=dtype, name=name, free=tuple(free))  # type: ignore[arg-type]


class _Wrapper(nn.Module):
    """A submodule that takes its tensors by place; all other arguments are constants."""

    def __init__(self, module: nn.Module, arguments: Any, names: tuple[str, ...]) -> None:
        super().__init__()
        self.inner = module
        self._arguments, self._names = arguments, names

    def forward(self, *tensors: Tensor) -> Any:
        """Outputs of the submodule."""
        args, kwargs = _filled(self._arguments, dict(zip(self._names, tensors, strict=True)))
        return self.inner(*args, **kwargs)


def _filled(pattern: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Arguments that a description stands for."""
    if isinstance(pattern, dict) and "input" in pattern:
        return tensors[pattern["input"]]
    if isinstance(pattern, dict):
        return {key: _filled(value, tensors) for key, value in pattern["dict"]}
    return [_filled(value, tensors) for value in pattern] if isinstance(pattern, list) else pattern


def joined_graphs(
    programs: Mapping[str, Program], captured: Mapping[str, Captured]
) -> tuple[dict[str, Any], fx.Graph]:
    """All that the graphs of the parts call and fetch, by path in the network, and one graph of all."""
    graph, root, results = fx.Graph(), dict[str, Any](), dict[str, Any]()
    copies: dict[fx.Node, fx.Node] = {}
    for path, program in programs.items():
        sources = program.graph.find_nodes(op="placeholder")
        for node, each in zip(sources, captured[path].part.inputs, strict=True):
            copies[node] = graph.placeholder(each.name)
    for path, program in programs.items():
        for node in program.graph.nodes:
            if node.op == "output":
                results[path] = fx.node.map_arg(node.args[0], copies.__getitem__)
            elif node.op != "placeholder":
                copy = copies[node] = graph.node_copy(node, copies.__getitem__)
                if node.op in ("call_module", "get_attr"):
                    copy.target = _path_in_network(str(node.target), path)
                    root[copy.target] = attrgetter(str(node.target))(program)
    graph.output(results)
    return root, copy_graph(graph)


def _path_in_network(target: str, path: str) -> str:
    first, _, rest = target.partition(".")
    if first == "inner":
        return path_in_program(f"{path}.{rest}" if rest else path)
    return f"{path.replace('.', '_')}_{target}"
