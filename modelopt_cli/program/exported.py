"""The third of the tracers behind ``capture``: ``torch.export``, with its graph in the normal form's terms.

It runs the network on tensors without values and with a symbolic batch size, so that Python may do what it
likes: wrappers, loops, keyword arguments, containers, hooks, views that are written into. Leaf layers stay
whole, and weights keep their names.
"""

import logging
import traceback
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import wraps
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from modelopt_cli.errors import CaptureError
from modelopt_cli.program.checks import without_values
from modelopt_cli.program.input_batch import as_arguments, call
from modelopt_cli.program.leaf_calls import LayerCall, as_single_calls
from modelopt_cli.program.output_structure import plain
from modelopt_cli.program.refusals import BATCH, VALUES, Unfollowed, unfollowed
from modelopt_cli.program.translation import ConstantChanged, Translation
from modelopt_cli.program.user_lines import is_users, module_raised, shown_line


class ExportTracer:
    """Traces a network with ``torch.export``.

    Args:
        example: a batch of the network's inputs, by name.
        free: keep other sizes than the batch's symbolic, too, as far as the network allows it.

    Attributes:
        constants: tensors the forward pass made out of nothing, by the name their nodes have.
        failed_in: path of the innermost module whose forward raised, or None.
        exact: the Program computes the same to the last bit: not where a view was written into, since what
            is added up later may lie in memory in another order.
    """

    exact = False

    def __init__(self, example: Mapping[str, Tensor], *, free: bool) -> None:
        self.example, self.free = dict(example), free
        self.constants: dict[str, Tensor] = {}
        self.failed_in: str | None = None

    def trace(self, root: nn.Module) -> fx.Graph:
        """The graph of a network's forward pass, as fx would record it.

        Raises:
            CaptureError: the path depends on what is in a tensor or on the batch size, or an operator has no
                counterpart on the allow-list.
        """
        self._known = {name for name, _ in _tensors(root)}
        try:
            call(root, self.example)  # what it keeps for later calls, it has then
        except Exception as error:  # whatever the user's forward raises
            self.failed_in = module_raised(error, root) or None
            raise unfollowed(error) from error
        with as_single_calls(root) as calls:
            exported = self._exported(root)
            try:
                return self._graph(exported, calls, fold=True)
            except ConstantChanged:
                return self._graph(exported, calls, fold=False)

    def _exported(self, root: nn.Module) -> torch.export.ExportedProgram:
        args, kwargs = as_arguments(type(root).forward, self.example)
        shapes, batch = torch.export.ShapesCollection(), torch.export.Dim("batch")
        for tensor in self.example.values():
            free_dims = dict.fromkeys(range(1, tensor.dim()), torch.export.Dim.AUTO) if self.free else {}
            shapes[tensor] = {0: batch, **free_dims}
        try:
            with _quiet(), _users_lines(), without_values(), plain_outputs(root):
                sizes = shapes.dynamic_shapes(root, args, kwargs)
                return torch.export.export(root, args, kwargs, dynamic_shapes=sizes, strict=False)
        except CaptureError:
            raise
        except Exception as error:  # whatever the user's forward raises, and all that export refuses
            self.failed_in = module_raised(error, root) or None
            raise _refusal(error, type(root).__name__) from error

    def _graph(
        self, exported: torch.export.ExportedProgram, calls: Sequence[LayerCall], *, fold: bool
    ) -> fx.Graph:
        written = Translation(_values(exported, self._known), self._names(exported), calls, fold=fold)
        outputs = written.run(exported.graph)
        kept = [
            written.fetched(value)
            for value, spec in zip(outputs, exported.graph_signature.output_specs, strict=True)
            if spec.kind is torch.export.graph_signature.OutputKind.USER_OUTPUT
        ]
        written.graph.output(pytree.tree_unflatten(kept, exported.call_spec.out_spec))
        self.constants = written.constants
        return written.graph

    def _names(self, exported: torch.export.ExportedProgram) -> dict[str, str]:
        """The inputs' names, in the network's order, by placeholder."""
        args, kwargs = pytree.tree_unflatten(exported.graph_signature.user_inputs, exported.call_spec.in_spec)
        places = {**dict(zip(self.example, args, strict=False)), **kwargs}
        return {places[name]: name for name in self.example}


@contextmanager
def plain_outputs(root: nn.Module) -> Iterator[None]:
    """Let a network return tuples, lists and dictionaries alone."""
    forward = root.forward

    @wraps(forward)
    def plainly(*args: Any, **kwargs: Any) -> Any:
        return plain(forward(*args, **kwargs))

    vars(root)["forward"] = plainly
    try:
        yield
    finally:
        del vars(root)["forward"]


def _tensors(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from root.named_parameters(remove_duplicate=False)
    yield from root.named_buffers(remove_duplicate=False)


def _values(exported: torch.export.ExportedProgram, known: Collection[str]) -> dict[str, str | Tensor]:
    """Weights' paths and constants, by the placeholders that stand for them.

    Args:
        exported: the graph and its tensors.
        known: paths of the network's own tensors; what it registered on the way is a constant.
    """
    signature, tensors = exported.graph_signature, {**exported.state_dict, **exported.constants}
    paths = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    paths |= signature.inputs_to_lifted_tensor_constants
    return {name: path if path in known else tensors[path] for name, path in paths.items()}


@contextmanager
def _users_lines() -> Iterator[None]:
    """Let nodes know the lines of the user's code that made them; torch keeps those of ``forward`` alone."""
    tracer: Any = torch.fx.proxy.TracerBase
    original = tracer._filter_traceback_frames

    def users(self: Any, frames: traceback.StackSummary) -> traceback.StackSummary:
        return traceback.StackSummary.from_list([each for each in frames if is_users(each.filename)])

    tracer._filter_traceback_frames = users
    try:
        yield
    finally:
        tracer._filter_traceback_frames = original


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what torch's compiler says of its work to itself: it shows the graph in which it failed."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _refusal(error: Exception, name: str) -> CaptureError:
    """The refusal of a network of this name, in our own terms."""
    if type(error).__name__ in ("GuardOnDataDependentSymNode", "DataDependentOutputException"):
        return VALUES.error()
    if "onstraints violated" in str(error):
        line = _line_decided(error)
        return BATCH.error(f"{name} ({line})") if line else Unfollowed(BATCH.message, hint=BATCH.hint)
    return unfollowed(error)


def _line_decided(error: BaseException) -> str | None:
    """The user's line at which a size of the batch was fixed, before export found out."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        sizes = getattr(frame.f_locals.get("fake_mode"), "shape_env", None)
        for guard in sizes.guards if sizes is not None else ():
            line = guard.sloc and guard.sloc.framework_loc
            if line is not None and is_users(line.filename):
                return shown_line(line.filename, line.lineno)
    return None
