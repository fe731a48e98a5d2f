"""Looks at a network: its layers, and how much each minds being compressed."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from modelopt_cli.api.arguments import configured
from modelopt_cli.api.call import Call
from modelopt_cli.api.compressing import Compressing
from modelopt_cli.api.given_models import Model, Workspace
from modelopt_cli.api.guard import Original
from modelopt_cli.api.keywords import HIDDEN, Given
from modelopt_cli.api.opening import open_alone, sample_of
from modelopt_cli.api.request import Note, Request
from modelopt_cli.checkpoint import require_network
from modelopt_cli.data import PreprocessOverrides
from modelopt_cli.errors import CaptureError
from modelopt_cli.kernels import require_device
from modelopt_cli.measure.flops import count_macs
from modelopt_cli.measure.latency import threads
from modelopt_cli.methods.distill.feature_points import FeaturePoint, feature_points
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


@configured(
    {"given": Given, "preprocessing": PreprocessOverrides},
    ("data", "progress", "resize", "crop", "interpolation", "mean", "std", *HIDDEN),
)
def layers(configs: dict[str, Any], model: Model) -> list[Layer]:
    """All layers of a network whose outputs can be looked at, in the order of execution.

    Args:
        model: a path, an ``nn.Module`` or a Program; it is not changed.

    Returns:
        The name, kind, output shape and multiply-accumulates of each layer, for one sample.

    Raises:
        InputError: the model cannot be opened, its network does not run, or nothing says what its input is.

    Example:
        >>> [(layer.name, layer.shape) for layer in mo.layers(model, example_inputs=batch)][1]
        ('1', (16,))
    """
    with Workspace() as space:
        call = Call(configs, space)
        source = call.file(model, None)
        call.tell()
        with space.telling_why():
            return layers_of(source, call.given.arch, call.preprocessing, call.note)


def layers_of(
    source: str | Path,
    arch: str | None = None,
    preprocessing: PreprocessOverrides | None = None,
    on_note: Note | None = None,
) -> list[Layer]:
    """All layers of a checkpoint or artifact; arguments are those of :meth:`ModelFile.open`.

    Raises:
        InputError: the source cannot be opened, its network does not run, or nothing says what it is.
    """
    opened = open_alone(source, arch, None, preprocessing, on_note)
    network, sample = require_network(opened, source), sample_of(opened, source)
    if opened.program is not None:
        Original.of(opened)  # runs it: a graph that cannot run is refused in one line
    macs = count_macs(network, sample).per_layer
    return [
        Layer(place.name, _kind(network, place), place.shape, macs.get(place.name, 0))
        for place in feature_points(network, sample)
    ]


def _kind(network: nn.Module, place: FeaturePoint) -> str:
    if not isinstance(network, Program):
        return type(network.get_submodule(place.key)).__name__
    node = next(node for node in network.graph.nodes if node.name == place.key)
    if node.op == "call_module":
        return type(network.get_submodule(str(node.target))).__name__
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))


def sensitivity(request: Request) -> Any:
    """Measure how much the outputs of a network change when its parts are compressed one at a time.

    Args:
        request: ``command``, ``source``, the samples whose outputs are compared (labels are not needed), and
            as ``config`` what to do by which criterion or scheme; it needs no target.

    Returns:
        What the method measures: a tuple of ``methods.prune.sensitivity.Sensitivity``, or a
        ``methods.quantize.rounding_sensitivity.QuantizeSensitivity``.

    Raises:
        InputError: the source, the data or an option cannot be used, or the network cannot be traced.
        NothingCompressed: nothing can be compressed.
    """
    request = replace(request, evaluate=False).noting_once()
    require_device(request.options.device)
    work = Compressing(request)
    work.open()
    require_network(work.opened, work.opened.path)
    if work.opened.program is None:
        raise CaptureError("sensitivity needs a graph", where=work.opened.path, hint=work.opened.untraced)
    context = replace(work.context(None, work.method.stage), data=work.samples(None))
    assert work.method.sensitivity is not None
    with threads(request.options.threads):
        return work.method.sensitivity(work.opened.program, request.config, context)
