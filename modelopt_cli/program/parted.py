"""A network of which only parts are graphs: one Program of all of them, called by the network's own code.

Where a network cannot be captured whole, the largest submodules that can be are its parts. Their graphs
stand next to each other in one graph, which takes the inputs of all parts and returns their outputs by the
submodules' paths. So a method sees one ordinary Program. Called, it runs the network's own ``forward``, in
which each part is computed by its graph.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, Self, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import PythonCode
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map_only

from modelopt_cli.errors import InputError
from modelopt_cli.program.input_batch import Inputs, as_arguments, tensors_of
from modelopt_cli.program.input_spec import InputSpec
from modelopt_cli.program.parts import Parts, Run
from modelopt_cli.program.placing import place
from modelopt_cli.program.program import Program
from modelopt_cli.program.samples import zeros


class PartedProgram(Program):
    """The graphs of a network's parts, which its own code calls.

    ``graph`` is that of all parts, next to each other: its inputs and outputs are theirs. ``input`` is the
    network's, and a call is a call of the network: ``program(images)``, or in training
    ``program(images, targets)``. Tensors that belong to no part are parameters and buffers, too.
    """

    _parted: Parts
    _pickled = (*Program._pickled, "_parted")

    def __init__(
        self,
        root: nn.Module | dict[str, Any],
        graph: fx.Graph,
        *,
        parts: Parts,
        remaining: Mapping[str, Tensor],
        **header: Any,
    ) -> None:
        super().__init__(root, graph, **header)
        self._parted = parts
        for name in parts.remaining:
            place(self, name, remaining[name])

    def with_graph(self, root: nn.Module | dict[str, Any], graph: fx.Graph) -> "PartedProgram":
        """A Program with other graphs of the same parts; see :meth:`Program.with_graph`."""
        held = vars(root).get("_parted") if isinstance(root, nn.Module) else None
        owner = root if held is not None else self
        return PartedProgram(
            root,
            graph,
            parts=replace(self._parted, network=copy.deepcopy((held or self._parted).network)),
            remaining={name: attrgetter(name)(owner) for name in self._parted.remaining},
            input_spec=self.input,
            labels=self.labels,
            history=self.history,
            encodings=self.encodings,
            arch=self.arch,
        )

    def recompile(self) -> PythonCode:
        """Make the code of the graphs; a call stays one of the network."""
        code = super().recompile()
        vars(self).pop("_forwards", None)
        type(self).forward = PartedProgram._forward
        return code

    def delete_all_unused_submodules(self) -> None:
        """Delete the submodules that neither the graphs nor the network's own code uses."""
        remaining = self._remaining()
        super().delete_all_unused_submodules()
        for name, tensor in remaining.items():
            place(self, name, tensor)

    def _remaining(self) -> dict[str, Tensor]:
        return {name: attrgetter(name)(self) for name in self._parted.remaining}

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run_network(vars(self).get("_recording", self._compute), args, kwargs)

    def _run_network(self, run: Run, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        parts = self._parted
        for module in parts.network.modules():
            module.training = self.training
        return parts.call(self._remaining(), run, args, kwargs)

    def _computing(self) -> Program:
        return self  # the network's code calls the parts, and each is computed as a call of it says

    def _compute(self, path: str, tensors: tuple[Tensor, ...]) -> Any:
        computing = super()._computing()
        forwards: dict[str, Any] = vars(computing).setdefault("_forwards", {})
        if path not in forwards:
            forwards[path] = type(fx.GraphModule(computing, part_graph(computing, path))).forward
        return forwards[path](computing, *tensors)

    def _refused(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> InputError | None:
        return None  # sizes are the network's own affair

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._parted.network._apply(fn)
        return self


def parts_of_network(program: nn.Module) -> Parts | None:
    """The parts of a network that was captured in parts; None of any other."""
    return program._parted if isinstance(program, PartedProgram) else None


def code_of(program: nn.Module) -> nn.Module | None:
    """The network whose own code calls the parts; None of what was not captured in parts."""
    parts = parts_of_network(program)
    return None if parts is None else parts.network


def graph_input(program: Program) -> InputSpec:
    """The inputs of the graph: the network's, or those of its parts."""
    parts = parts_of_network(program)
    return program.input if parts is None else parts.graph_input


def joined(program: nn.Module) -> nn.Module:
    """A Program that takes the inputs of the graph and returns its outputs, and shares the tensors.

    What was not captured in parts is that itself.
    """
    if not isinstance(program, PartedProgram):
        return program
    alone = Program(
        program,
        copy.deepcopy(program.graph),
        input_spec=graph_input(program),
        history=program.history,
        encodings=program.encodings,
    )
    alone.kernel = copy.copy(program.kernel)
    return alone.train(program.training)


def interpret(
    interpreter: fx.Interpreter, program: nn.Module, inputs: Inputs, calls_of: PartedProgram | None = None
) -> Any:
    """Run a graph node by node on the inputs of the network.

    Args:
        interpreter: of the Program's graph.
        program: of which parts are run in the order of their calls, each on what reaches it.
        inputs: of the network.
        calls_of: a network with the same parts, which runs, and whose calls the parts see; otherwise its own.
    """
    if not isinstance(program, PartedProgram):
        return interpreter.run(*tensors_of(inputs))

    def run(path: str, tensors: tuple[Tensor, ...]) -> Any:
        result, own = _of_part(program, path)
        others = {node: None for node in program.graph.nodes if node not in own}
        interpreter.run(*tensors, initial_env=others)
        if calls_of is not None:
            return calls_of._compute(path, tensors)
        return map_arg(result, interpreter.env.__getitem__)

    caller = program if calls_of is None else calls_of
    args, kwargs = as_arguments(type(caller._parted.network).forward, inputs)
    return caller._run_network(run, args, kwargs)


def has_same_parts(program: nn.Module, other: nn.Module) -> bool:
    """True for two networks in parts, whose parts have the same paths, inputs and arguments."""
    ours, theirs = parts_of_network(program), parts_of_network(other)
    return ours is not None and theirs is not None and ours.by_path == theirs.by_path


@dataclass(frozen=True)
class PartCall:
    """A call of a part while its network ran.

    Attributes:
        path: of the part.
        inputs: in the order of its placeholders.
        outputs: of any structure.
    """

    path: str
    inputs: tuple[Tensor, ...]
    outputs: Any

    def repeated(self, program: nn.Module) -> Any:
        """Outputs of the same part of another network for the same inputs; see :func:`has_same_parts`."""
        return cast(PartedProgram, program)._compute(self.path, self.inputs)


@contextmanager
def recorded_calls(program: nn.Module) -> Iterator[list[PartCall]]:
    """The calls of a network's parts while it runs; none of what was not captured in parts."""
    calls: list[PartCall] = []
    if not isinstance(program, PartedProgram):
        yield calls
        return

    def run(path: str, tensors: tuple[Tensor, ...]) -> Any:
        inputs = tuple(tensor.clone() for tensor in tensors)  # the network's code may change what it has
        outputs = program._compute(path, tensors)
        calls.append(PartCall(path, inputs, tree_map_only(Tensor, Tensor.clone, outputs)))
        return outputs

    vars(program)["_recording"] = run
    try:
        yield calls
    finally:
        del vars(program)["_recording"]


def reaching(program: nn.Module, inputs: Inputs) -> list[Inputs]:
    """Inputs that reach the graph when the network runs: batches for the graph of all parts.

    A part that is called several times makes several; one that is called fewer times gets its own again, and
    one that is not called a sample of zeros.
    """
    if not isinstance(program, PartedProgram):
        return [inputs]
    parts, seen = program._parted, dict[str, list[dict[str, Tensor]]]()

    def run(path: str, tensors: tuple[Tensor, ...]) -> Any:
        names = [each.name for each in parts.by_path[path].inputs]
        seen.setdefault(path, []).append({n: t.clone() for n, t in zip(names, tensors, strict=True)})
        return program._compute(path, tensors)

    args, kwargs = as_arguments(type(parts.network).forward, inputs)
    with torch.no_grad():
        program._run_network(run, args, kwargs)
    return list(_together(program, seen))


def _together(program: Program, seen: Mapping[str, list[dict[str, Tensor]]]) -> Iterator[Inputs]:
    spec = graph_input(program)
    for number in range(max((len(calls) for calls in seen.values()), default=0)):
        batch: dict[str, Tensor] = {}
        for calls in seen.values():
            batch |= calls[number % len(calls)]
        device = next(iter(batch.values())).device
        nothing = zeros(spec, 1, device)
        filled = {
            e.name: batch.get(e.name, nothing[e.name] if isinstance(nothing, dict) else nothing)
            for e in spec.tensors
        }
        yield filled if spec.others else filled[spec.name]


def part_graph(program: Program, path: str) -> fx.Graph:
    """The graph of one part alone, with the node names that it has among the others."""
    result, own = _of_part(program, path)
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in program.graph.nodes:
        if node in own:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(map_arg(result, copies.__getitem__))
    return graph


def _of_part(program: Program, path: str) -> tuple[Any, set[fx.Node]]:
    """The values that a part returns, and all its nodes."""
    parts = parts_of_network(program)
    assert parts is not None
    names = {each.name for each in parts.by_path[path].inputs}
    (output,) = program.graph.find_nodes(op="output")
    result = cast(dict[str, Any], output.args[0])[path]
    own = {node for node in program.graph.find_nodes(op="placeholder") if node.target in names}
    wanted: list[fx.Node] = []
    map_arg(result, wanted.append)
    while wanted:
        node = wanted.pop()
        if node not in own or node.op == "placeholder":
            own.add(node)
            wanted += node.all_input_nodes
    return result, own
