"""Layer-wise pass through a network with calibration data, for the second moments of each layer's inputs."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from modelopt_cli.data import Data
from modelopt_cli.errors import DataError, UsageError
from modelopt_cli.methods.batches import input_batches, require_finite
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.matrices import calls_by_layer, unfold, unseen_inputs
from modelopt_cli.program import Program
from modelopt_cli.program.calls import shown_name, source
from modelopt_cli.program.input_batch import Inputs, tensors_of, to
from modelopt_cli.program.parted import reaching
from modelopt_cli.settings import option

KEPT_BYTES = 1 << 30
"""Bytes of intermediate values that a pass keeps; values beyond that are computed again."""
DAMPING = 0.01
"""Addition to the diagonal of a Hessian, as a fraction of the diagonal's mean (SparseGPT, section 4)."""
WIDEST = 6144
"""Columns of the largest Hessian: 300 MB in float64."""
_DEAD = 1e-12
"""Diagonal for inputs that were always zero, as a fraction of the mean."""

Span = tuple[int, int]


def calibration_data(context: Context, purpose: str, samples: int, alternative: str) -> Data:
    """A random part of the context's data to calibrate on.

    Args:
        context: may have data.
        purpose: the setting that needs data, for the error; e.g. ``criterion obs``.
        samples: largest number of samples.
        alternative: the option that needs no data, for the error's hint.

    Raises:
        UsageError: the context has no data.
    """
    if context.data is None:
        raise no_data(purpose, alternative)
    return context.data.sample(samples, context.seed)


def evaluation_copy(program: Program, device: str) -> Program:
    """A copy on a device, in evaluation mode, whose weights may be changed."""
    return copy.deepcopy(program).eval().to(device)


def no_data(purpose: str, alternative: str) -> UsageError:
    """The error for a setting, ``purpose``, that needs data where there are none."""
    return UsageError(
        f"{purpose} needs data to calibrate on",
        hint=f"give {option('calibration')} or {option('data')}, or use {alternative}, which needs none",
    )


def no_samples() -> DataError:
    """The error for calibration data without samples."""
    return DataError("no samples to calibrate on", hint="give data with at least one sample")


def layers_in_call_order(program: Program, parameters: Iterable[str], alternative: str) -> dict[str, str]:
    """Parameter name by layer, in the order in which the layers are first called.

    Args:
        program: the network.
        parameters: names of weights.
        alternative: the option that watches no inputs, for the error's hint.

    Raises:
        UsageError: the inputs of a weight cannot be watched.
    """
    names = set(parameters)
    for name in sorted(names):
        if reason := unseen_inputs(program, name):
            raise UsageError(
                f"cannot watch the inputs of {name}: {reason}", hint=f"exclude it, or use {alternative}"
            )
    return {layer: f"{layer}.weight" for layer in calls_by_layer(program) if f"{layer}.weight" in names}


class LayerPass:
    """One pass of all batches through a network that pauses before each layer.

    Between two layers the batches wait at the same place of the graph, so that a layer can be changed
    before the layers after it see its outputs. The values of a waiting batch are kept while all of
    them fit into a fixed amount of memory; the batches beyond start again from their inputs.

    Args:
        program: in evaluation mode; its weights may be changed between two layers.
        data: the samples.
        context: batch size, workers, device.
        kept_bytes: memory for waiting batches, in bytes.
        calls_of: a network with the same parts, the calls of which the parts see; by default its own.
    """

    def __init__(
        self,
        program: Program,
        data: Data,
        context: Context,
        *,
        kept_bytes: int = KEPT_BYTES,
        calls_of: Program | None = None,
    ) -> None:
        self.program = program
        self.calls_of = calls_of or program
        self.data = data
        self.context = context
        self.kept_bytes = kept_bytes
        self.nodes = list(program.graph.nodes)
        self.interpreter = fx.Interpreter(program)
        self.waiting: dict[int, tuple[int, dict[fx.Node, Any]]] = {}
        self.batches: int | None = None

    def inputs(self, node: fx.Node) -> Iterator[Tensor]:
        """Inputs of a layer's call, batch by batch. Calls must be asked for in graph order."""
        argument = source(node)
        assert isinstance(argument, fx.Node)
        for (value,) in self.values(node, (argument,)):
            require_finite(value, f"layer {shown_name(node)}")
            yield value

    def values(self, node: fx.Node, wanted: Sequence[fx.Node]) -> Iterator[tuple[Any, ...]]:
        """Values that exist before a node is run, batch by batch. Nodes must be asked for in graph order.

        Args:
            node: where the batches pause.
            wanted: values that this or a later node reads.
        """
        stop = self.nodes.index(node)
        kept = sum(_bytes_of(values) for _, values in self.waiting.values())
        for number, inputs in self._batches():
            start, values = self.waiting.pop(number, (0, {}))
            kept -= _bytes_of(values)
            self._advance(values, inputs, start, stop)
            yield tuple(values[each] for each in wanted)
            if kept + (size := _bytes_of(values)) <= self.kept_bytes:
                self.waiting[number], kept = (stop, values), kept + size

    def _batches(self) -> Iterator[tuple[int, Inputs | None]]:
        """Number and inputs of every batch; no inputs where all batches wait in the graph."""
        if self.batches is not None and len(self.waiting) == self.batches:
            yield from ((number, None) for number in range(self.batches))
            return
        count = 0
        for inputs in input_batches(self.data, self.context):
            for reached in reaching(self.calls_of, to(inputs, self.context.device)):
                yield count, reached
                count += 1
        if not count:
            raise no_samples()
        self.batches = count

    def _advance(self, values: dict[fx.Node, Any], inputs: Inputs | None, start: int, stop: int) -> None:
        """Run the nodes from ``start`` to before ``stop``, dropping values after their last use."""
        self.interpreter.env = values
        tensors = iter(() if inputs is None else tensors_of(inputs))
        last_uses = self.interpreter.user_to_last_uses
        with torch.no_grad():
            for node in self.nodes[start:stop]:
                values[node] = next(tensors) if node.op == "placeholder" else self.interpreter.run_node(node)
                for unused in last_uses.get(node, ()):
                    del values[unused]


def _bytes_of(values: Mapping[fx.Node, Any]) -> int:
    """Bytes of the tensors among a batch's values, views of one storage counted once."""
    storages: dict[int, int] = {}
    for node, value in values.items():
        if node.op != "get_attr":  # parameters are not the batch's own
            for tensor in value if isinstance(value, tuple | list) else (value,):
                if isinstance(tensor, Tensor):
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def hessians(
    layer_pass: LayerPass, layers: Mapping[str, str], columns: Mapping[str, "Columns"]
) -> Iterator[tuple[str, list[Tensor]]]:
    """Each layer with its Hessians, in graph order, on inputs through the layers as they are by then.

    A layer that is called several times comes after its last call.

    Args:
        layer_pass: the pass through the network.
        layers: names of the layers.
        columns: order and spans of the columns, by layer.
    """
    calls = calls_by_layer(layer_pass.program)
    remaining = {layer: len(calls[layer]) for layer in layers}
    sums: dict[str, list[Tensor]] = {}
    done = 0
    for node in [n for n in layer_pass.nodes if n.op == "call_module" and str(n.target) in layers]:
        layer = str(node.target)
        parts = hessian_of(layer_pass.program.get_submodule(layer), layer_pass.inputs(node), columns[layer])
        sums[layer] = [a + b for a, b in zip(sums[layer], parts, strict=True)] if layer in sums else parts
        remaining[layer] -= 1
        if not remaining[layer]:
            yield layer, sums.pop(layer)
            done += 1
            if layer_pass.context.progress is not None:
                layer_pass.context.progress(done, len(layers))


class Columns:
    """Order in which a layer's columns are worked through, and the spans that are worked on at once.

    Args:
        count: number of columns.
        order: memory positions in the order of work; None for memory order.
        cuts: places where the columns, in the order of work, may be cut; None for everywhere.
        widest: largest number of columns at once; None for ``WIDEST``.
        constant: adds one more column at the end, that of the bias, whose input is always 1.

    Attributes:
        spans: ``(start, stop)`` of the columns that share a Hessian. Weights of different spans are
            treated as if their inputs were uncorrelated, which bounds the memory of very wide layers.
    """

    def __init__(
        self,
        count: int,
        order: Tensor | None = None,
        cuts: Sequence[int] | None = None,
        *,
        widest: int | None = None,
        constant: bool = False,
    ) -> None:
        self.order, self.constant = order, constant
        self.cuts = range(count + 1) if cuts is None else cuts
        self.spans = self.divide(0, count + constant, widest or WIDEST)

    def divide(self, start: int, stop: int, widest: int) -> list[Span]:
        """Cut ``start`` to ``stop`` into spans of at most ``widest``, or one uncuttable piece."""
        spans: list[Span] = []
        end = start
        for cut in [c for c in self.cuts if start < c < stop] + [stop]:
            if cut - start > widest and end > start:
                spans.append((start, end))
                start = end
            end = cut
        return [*spans, (start, stop)] if stop > start else spans


def hessian_of(module: nn.Module, inputs: Iterable[Tensor], columns: Columns) -> list[Tensor]:
    """X^T X of the unfolded inputs, one for each span: float64 ``(groups, width, width)``.

    Products are summed in float32 within a chunk, and chunks in float64.
    """
    totals: list[Tensor] = []
    for value in inputs:
        for rows in unfold(module, value.detach()):
            if columns.order is not None:
                rows = rows[..., columns.order]
            if columns.constant:
                rows = torch.cat((rows, rows.new_ones(*rows.shape[:-1], 1)), -1)
            parts = [rows[..., start:stop] for start, stop in columns.spans]
            products = [part.mT @ part for part in parts]
            totals = (
                [t.add_(p) for t, p in zip(totals, products, strict=True)]
                if totals
                else [p.double() for p in products]
            )
    return totals


def damped(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """The Hessian with its diagonal raised by ``damping`` times the mean of its live part.

    Inputs that were always zero get next to nothing, so that their weights go first: just enough for the
    Hessian to be regular.
    """
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    live = diagonal > 0
    mean = diagonal.sum(-1, keepdim=True) / live.sum(-1, keepdim=True).clamp(min=1)
    raised = torch.where(live, damping * mean, _DEAD * torch.where(mean > 0, mean, 1.0))
    return hessian + torch.diag_embed(raised)


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper triangular U with U^T U = H^-1, for ``(groups, n, n)``.

    Row j of U, from its diagonal on, is the j-th row of the inverse of H without the first j columns,
    divided by the root of its first entry.
    """
    # With both axes reversed, H = L L^T; reversing L's inverse again gives the upper factor of H^-1.
    lower: Tensor = torch.linalg.cholesky(hessian.flip(-1, -2))
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
    return inverse.flip(-1, -2)
