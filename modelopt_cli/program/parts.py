"""Parts of a network that are graphs, and the network's own code that calls them."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from modelopt_cli.errors import InputError
from modelopt_cli.program.input_spec import InputSpec
from modelopt_cli.program.output_structure import plain
from modelopt_cli.program.part_arguments import OtherArguments, as_returned, matched
from modelopt_cli.program.safe_names import path_in_program

Run = Callable[[str, tuple[Tensor, ...]], Any]
"""Computes the part of a path from its tensors, in the order of its inputs."""


@dataclass(frozen=True)
class Part:
    """A submodule that is a graph.

    Attributes:
        inputs: the tensors that it takes, by the names of their placeholders.
        arguments: its positional and its keyword arguments in lists and pairs, as ``described`` gives them.
    """

    inputs: tuple[InputSpec, ...]
    arguments: Any


@dataclass(frozen=True)
class Parts:
    """The parts of a network, and the network's own code around them.

    Attributes:
        by_path: each part.
        network: the module whose code calls them. Its weights are empty: those of the parts are in the graph,
            the others are lent to it at each call.
        remaining: names of the parameters and stored buffers that belong to no part, by their paths in the
            Program.
        reason: why it was not captured whole.
    """

    by_path: Mapping[str, Part]
    network: nn.Module
    remaining: Mapping[str, str]
    reason: str

    @property
    def graph_input(self) -> InputSpec:
        """The inputs of all parts, in the order in which the graph takes them."""
        first, *others = (each for part in self.by_path.values() for each in part.inputs)
        return replace(first, others=tuple(others))

    @classmethod
    def of(cls, network: nn.Module, by_path: Mapping[str, Part], reason: str) -> "Parts":
        """The parts of a network, which is copied without its weights."""
        names = [name for name, _ in stored_tensors(network) if not _lies_in(name, by_path)]
        remaining = {path_in_program(name): name for name in names}
        return cls(dict(by_path), _emptied(network, by_path), remaining, reason)

    def call(
        self, lent: Mapping[str, Tensor], run: Run, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Run the network's own code.

        Args:
            lent: its remaining tensors by their paths in the Program.
            run: computes a part.
            args: of the network.
            kwargs: of the network.
        """
        called = {path: self.network.get_submodule(path) for path in self.by_path}
        for path, module in called.items():
            vars(module)["forward"] = partial(self._call_part, path, run)
        try:
            if not lent:
                return self.network(*args, **kwargs)
            own = {self.remaining[path]: tensor for path, tensor in lent.items()}
            return functional_call(self.network, own, tuple(args), dict(kwargs), tie_weights=False)
        finally:
            for module in called.values():
                vars(module).pop("forward", None)

    def _call_part(self, path: str, run: Run, /, *args: Any, **kwargs: Any) -> Any:
        part = self.by_path[path]
        try:
            inputs = dict(matched(part.arguments, plain([list(args), kwargs])))
        except OtherArguments as other:
            problem = f"is called in another way than when it was captured: {other}"
            raise InputError(problem, where=f"submodule {path}") from None
        for each in part.inputs:
            shape = tuple(inputs[each.name].shape)
            if not each.fits(shape[1:]):
                problem = f"{each.name} has shape {shape}, and the part takes {('N', *each.shape)}"
                hint = "capture the network for the size that is needed"
                raise InputError(problem, where=f"submodule {path}", hint=hint)
        return as_returned(run(path, tuple(inputs[each.name] for each in part.inputs)))


def stored_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that a state dict has, by all their names."""
    for prefix, module in network.named_modules(remove_duplicate=False):
        own = [*module._parameters.items(), *module._buffers.items()]
        for name, tensor in own:
            if tensor is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, tensor


def _lies_in(name: str, paths: Mapping[str, Any]) -> bool:
    return any(name.startswith(f"{path}.") for path in paths)


def _emptied(network: nn.Module, parts: Mapping[str, Part]) -> nn.Module:
    """A copy whose weights and parts' buffers are all NaN, so that no use of them goes unseen."""
    empty: dict[int, Any] = {id(tensor): _nothing(tensor) for _, tensor in stored_tensors(network)}
    for path in parts:
        part = network.get_submodule(path)
        empty |= {id(tensor): _nothing(tensor) for tensor in part.buffers()}
    return copy.deepcopy(network, empty)


def _nothing(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and type that takes no memory."""
    fill = torch.nan if tensor.is_floating_point() else 0
    filled = torch.full((), fill, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
    return nn.Parameter(filled, requires_grad=False) if isinstance(tensor, nn.Parameter) else filled
