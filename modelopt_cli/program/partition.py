"""Partition: from a network that cannot be captured as one to its largest submodules that can be."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from modelopt_cli.errors import CaptureError
from modelopt_cli.program.capture import named_inputs, require_inputs
from modelopt_cli.program.input_batch import call, clone
from modelopt_cli.program.input_spec import InputSpec
from modelopt_cli.program.output_structure import plain
from modelopt_cli.program.part_capture import Call, Captured, captured_part, joined_graphs
from modelopt_cli.program.parted import PartedProgram
from modelopt_cli.program.parts import Parts
from modelopt_cli.program.patches import unchanged
from modelopt_cli.program.safe_names import is_output_key, is_path, path_in_program
from modelopt_cli.program.shapes import evaluation_mode
from modelopt_cli.program.verification import random_input, same_outputs

_BATCHES = (2, 3)
_WIDER = (32, 64)
"""Pixels that are added to height and width of images, to see which sizes of the parts follow."""


def capture_parts(
    model: nn.Module,
    input_spec: InputSpec,
    reason: CaptureError,
    *,
    labels: Sequence[str] | None = None,
    arch: str | None = None,
) -> PartedProgram | None:
    """Capture the largest submodules of a network that is not captured whole.

    The network runs on random inputs at two batch sizes and, of images, at a second size. From the top of the
    module tree down, a submodule becomes a part as soon as it is captured, computes what it did in each of
    these calls, and the network returns the same with it. Submodules without parameters are left as they are.

    Args:
        model: the network; it is left as it was.
        input_spec: what one sample looks like.
        reason: why it is not captured whole.
        labels: class names in logit order.
        arch: what the network was built from.

    Returns:
        The network, or None where nothing in it can be captured.

    Raises:
        CaptureError: the network does not run on such samples, or needs other inputs.
    """
    if any(p.is_meta for p in model.parameters()) or isinstance(model, torch.jit.ScriptModule):
        return None
    input_spec = named_inputs(model, input_spec)
    require_inputs(model, input_spec)
    with evaluation_mode(model), torch.no_grad():
        search = _Search(model, input_spec)
        search.run()
    if not search.found:
        return None
    return search.assembled(str(reason), labels=tuple(labels) if labels else None, arch=arch)


class _Search:
    """The way down the module tree.

    Attributes:
        found: the parts so far, by path.
    """

    def __init__(self, model: nn.Module, input_spec: InputSpec) -> None:
        self.model, self.input = model, input_spec
        self.examples = list(_examples(model, input_spec))
        self.expected = [self._outputs(model, x) for x in self.examples]
        self.found: dict[str, Captured] = {}
        self.names: set[str] = set()

    def run(self) -> None:
        """Look for parts, one level of the tree after the other."""
        seen: set[int] = set()
        level = list(_children(self.model, "", seen))
        while level:
            calls = self._calls(level)
            below: list[str] = []
            for path in level:
                if not self._take(path, calls.get(path, [])):
                    below += _children(self.model.get_submodule(path), path, seen)
            level = below

    def _take(self, path: str, calls: list[Call]) -> bool:
        if not calls or not is_path(path_in_program(path)) or not is_output_key(path):
            return False
        names = set(self.names)
        try:
            captured = captured_part(self.model.get_submodule(path), path, calls, names)
            whole = self.assembled("", {**self.found, path: captured})
            for x, expected in zip(self.examples, self.expected, strict=True):
                if not same_outputs(self._outputs(whole, x), expected, exact=False):
                    return False
        except Exception:  # whatever the user's code raises: it cannot do without the submodule itself
            return False
        self.found[path], self.names = captured, names
        return True

    def assembled(
        self, reason: str, captured: Mapping[str, Captured] | None = None, **header: Any
    ) -> PartedProgram:
        """The network with these parts."""
        captured = captured or self.found
        root, graph = joined_graphs({path: each.program for path, each in captured.items()}, captured)
        parts = Parts.of(self.model, {path: each.part for path, each in captured.items()}, reason)
        tensors = {**dict(_all_tensors(self.model))}
        remaining = {path: tensors[name] for path, name in parts.remaining.items()}
        program = PartedProgram(
            root, graph, parts=parts, remaining=remaining, input_spec=self.input, **header
        )
        program.eval()
        return program

    def _outputs(self, network: nn.Module, x: Any) -> Any:
        with unchanged(network), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                return plain(call(network, clone(x)))
            except Exception as error:
                if network is self.model and x is self.examples[0]:
                    from modelopt_cli.program.verification import require_runnable

                    require_runnable(network, x)
                raise error

    def _calls(self, paths: Sequence[str]) -> dict[str, list[Call]]:
        """All calls of submodules while the network runs on the examples."""
        calls: dict[str, list[Call]] = {}
        for x in self.examples:
            with ExitStack() as hooks:
                for path in paths:
                    _watch(self.model.get_submodule(path), calls.setdefault(path, []), hooks)
                self._outputs(self.model, x)
        return calls


def _examples(model: nn.Module, input_spec: InputSpec) -> Iterator[Any]:
    """Batches of two sizes and, where the network takes them, of larger images."""
    for batch in _BATCHES:
        yield random_input(model, input_spec, batch)
    if (wider := _wider(input_spec)) is not None:
        x = random_input(model, wider, 1)
        try:
            with unchanged(model):
                call(model, clone(x))
        except Exception:  # whatever a network for one size raises
            return
        yield x


def _wider(input_spec: InputSpec) -> InputSpec | None:
    """The inputs with larger images; None where there are none."""
    if not any(len(each.shape) == 3 for each in input_spec.tensors):
        return None
    first, *others = (
        replace(
            each, shape=(each.shape[0], *(n + more for n, more in zip(each.shape[1:], _WIDER, strict=True)))
        )
        if len(each.shape) == 3
        else each
        for each in input_spec.tensors
    )
    return replace(first, others=tuple(others))


def _children(module: nn.Module, path: str, seen: set[int]) -> Iterator[str]:
    """Paths of the submodules with parameters, each under its first name."""
    for name, child in module.named_children():
        if id(child) not in seen and next(child.parameters(), None) is not None:
            seen.add(id(child))
            yield f"{path}.{name}" if path else name


def _watch(module: nn.Module, calls: list[Call], hooks: ExitStack) -> None:
    begun: list[Any] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        begun.append(_copied(plain([list(args), kwargs])))

    def after(module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        calls.append(Call(begun.pop(), _copied(plain(outputs))))

    for handle in (
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ):
        hooks.callback(handle.remove)


def _copied(values: Any) -> Any:
    return pytree.tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, values)


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
