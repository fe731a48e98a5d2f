"""Networks for weights of an unknown architecture: those of other files whose weights are called the same."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from modelopt_cli.api.request import Note
from modelopt_cli.checkpoint import Opened
from modelopt_cli.measure.evaluated_model import is_quantized
from modelopt_cli.program import Program
from modelopt_cli.program.safe_names import path_in_network

_COUNTER = "num_batches_tracked"
"""Buffer of batch norms that no evaluation reads."""


def with_network_among(opened: Opened, others: Sequence[Opened], on_note: Note | None = None) -> Opened:
    """Weights of an unknown network, run by the graph of a file whose weights have their names and shapes.

    Args:
        opened: a file that is open.
        others: files that may have such a graph.
        on_note: called with a line that says which graph was taken.

    Returns:
        The same with a network; ``opened`` itself where it has one, or none fits.
    """
    if opened.network is not None:
        return opened
    for other in others:
        if other.program is not None and (program := _with_weights(other.program, opened.state)) is not None:
            if on_note is not None:
                lender = f"{other.path}, whose weights have its names and shapes"
                on_note(f"{opened.path}: run by the network of {lender}")
            return replace(opened, program=program, tensors=None)
    return opened


def _with_weights(program: Program, state: Mapping[str, Tensor]) -> Program | None:
    """A Program of the same graph with other weights; None where theirs are other names or shapes."""
    own = {path_in_network(path): tensor for path, tensor in program.state_dict().items()}
    shapes = {name: tensor.shape for name, tensor in state.items() if not name.endswith(_COUNTER)}
    if shapes != {n: tensor.shape for n, tensor in own.items() if not n.endswith(_COUNTER)}:
        return None
    if is_quantized(program):  # its layers were made of others, whose weights had these names
        return None
    made = copy.deepcopy(program)
    made.history, made.encodings = (), {}
    made.load_state_dict({path: state.get(path_in_network(path), t) for path, t in made.state_dict().items()})
    return made
