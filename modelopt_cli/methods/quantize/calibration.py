"""Running a float Program on data and watching the values that will become uint8."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from modelopt_cli.errors import DataError
from modelopt_cli.kernels.fp32 import packed
from modelopt_cli.methods.batches import require_finite
from modelopt_cli.program import Program
from modelopt_cli.program.calls import shown_name
from modelopt_cli.program.input_batch import Inputs, batch_size
from modelopt_cli.program.parted import code_of, interpret
from modelopt_cli.settings import option

Progress = Callable[[int, int | None], None]


class Watching(Protocol):
    """Sees the values of an activation, batch by batch."""

    def update(self, x: Tensor) -> None:
        """Take in one batch."""


class _Watcher(fx.Interpreter):
    """Runs a graph node by node and shows each watched value to its observers."""

    def __init__(self, program: Program, watched: Mapping[fx.Node, Sequence[Watching]]) -> None:
        super().__init__(program)
        self.watched = {node.name: (shown_name(node), seen) for node, seen in watched.items()}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.watched:
            layer, observers = self.watched[n.name]
            require_finite(value, f"layer {layer}")
            for observer in observers:
                observer.update(value)
        return value


def calibrate(
    program: Program,
    watched: Mapping[fx.Node, Sequence[Watching]],
    batches: Iterable[Inputs],
    progress: Progress | None = None,
    total: int | None = None,
) -> int:
    """Show every batch to the observers.

    Args:
        program: a float Program in inference form.
        watched: which values to watch, and with what. One observer may watch several.
        batches: of the network's inputs.
        progress: called with samples done and the total.
        total: how many samples will come, where known.

    Returns:
        How many samples were seen.

    Raises:
        DataError: there are none, or the network is not finite on them.
    """
    form = packed(program, watched) if code_of(program) is None else program
    interpreter, seen = _Watcher(form, watched), 0
    with torch.inference_mode():
        for batch in batches:
            interpret(interpreter, form, batch)
            seen += batch_size(batch)
            if progress is not None:
                progress(seen, total)
    if seen == 0:
        raise DataError("no samples to calibrate on", hint=f"give {option('data')} with at least one sample")
    return seen
