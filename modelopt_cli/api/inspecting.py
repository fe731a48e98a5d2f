"""The layers of a network, by the names that options take globs of."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from modelopt_cli.api.guard import Given
from modelopt_cli.api.opening import Note, open_input, open_noting, sample_of
from modelopt_cli.checkpoint import require_network
from modelopt_cli.data import PreprocessOverrides
from modelopt_cli.measure.flops import count_macs
from modelopt_cli.methods.distill.taps import Place, places
from modelopt_cli.program import Program


@dataclass(frozen=True)
class Layer:
    """A layer, or a function of the graph.

    Attributes:
        name: its path in the network; of a function, that of its node.
        kind: class of the layer, or name of the function.
        shape: of what it makes of one sample.
        macs: multiply-accumulates for one sample.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    macs: int


def layers(
    source: str | Path,
    *,
    arch: str | None = None,
    overrides: PreprocessOverrides | None = None,
    on_note: Note | None = None,
) -> list[Layer]:
    """All layers of a checkpoint or artifact whose outputs can be looked at, in the order of execution.

    Args:
        source: a checkpoint or an artifact of any kind.
        arch: its architecture, where it is not recognised.
        overrides: the input's size and channels, where nothing else says them.
        on_note: called with one line for each thing worth knowing.

    Raises:
        InputError: the source cannot be opened, its network does not run, or nothing says what it is.
    """
    opened = open_noting(source, arch, open_input([source], arch, None, overrides), on_note, overrides)
    network, input = require_network(opened, source), sample_of(opened, source)
    if opened.program is not None:
        Given.of(opened)  # runs it: a graph that cannot run is refused in one line
    macs = count_macs(network, input.shape, input.dtype).per_layer
    return [
        Layer(place.name, _kind(network, place), place.shape, macs.get(place.name, 0))
        for place in places(network, input.shape, input.dtype)
    ]


def _kind(network: nn.Module, place: Place) -> str:
    if not isinstance(network, Program):
        return type(network.get_submodule(place.key)).__name__
    node = next(node for node in network.graph.nodes if node.name == place.key)
    if node.op == "call_module":
        return type(network.get_submodule(str(node.target))).__name__
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))
