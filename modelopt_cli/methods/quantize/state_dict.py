"""Quantization without a graph: stored weights anywhere, dynamic linear layers in a module."""

from collections import Counter
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from modelopt_cli.artifact import TensorStream
from modelopt_cli.artifact.codecs import PLAIN
from modelopt_cli.artifact.encodings import carry_over, is_pruned, is_shared
from modelopt_cli.artifact.lazy import described
from modelopt_cli.artifact.stream import Item, tied_names
from modelopt_cli.checkpoint.integer_layers import restored_kinds
from modelopt_cli.errors import GraphNeeded
from modelopt_cli.measure.layer_status import Coverage, LayerStatus
from modelopt_cli.methods.context import Progress, StreamResult
from modelopt_cli.methods.layer_selection import codec_of, not_named_as_weights, select_layers
from modelopt_cli.methods.quantize.candidates import nothing_compressed
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.layer_widths import layer_widths, weight_steps, widths_note
from modelopt_cli.methods.quantize.rounding import layer_of, require_nonzero
from modelopt_cli.methods.quantize.schemes import NetworkForm, Scheme, usable
from modelopt_cli.methods.quantize.stored_weights import store_weight
from modelopt_cli.methods.quantize.weight_only import already_quantized, storable
from modelopt_cli.methods.quantize.weight_rounding.roundings import ROUNDINGS
from modelopt_cli.methods.quantize.widths import Widths
from modelopt_cli.program import Encoding
from modelopt_cli.program.quantization import width_label
from modelopt_cli.settings import option


def apply_to_state(
    state: Mapping[str, Tensor],
    config: QuantizeConfig,
    layers: Mapping[str, nn.Module] | None = None,
    encodings: Mapping[str, Encoding] | None = None,
    progress: Progress | None = None,
) -> StreamResult:
    """Quantize a state dict that has no graph.

    Args:
        state: tensors by name; they are not changed. They may stay in their file until their turn.
        config: with a scheme that needs no graph, and no layers where ``layers`` are not given.
        layers: the network's modules by path, or None for a bare state dict.
        encodings: how the tensors were stored so far; what is pruned stays so.
        progress: called with tensors done and their total.

    Raises:
        UsageError: the scheme needs a graph, or a network.
        NothingCompressed: no tensor could be quantized.
    """
    scheme = config.row
    refuse_without_graph(config, layers is not None)
    shapes, earlier = described(state), encodings or {}
    reasons = _reasons(scheme, shapes, layers or {}, earlier)
    weights = Counter(map(layer_of, reasons))
    # A layer of several weights (attention with separate projections) is named weight by weight.
    by_layer = {layer_of(name) if weights[layer_of(name)] == 1 else name: name for name in reasons}
    selected, skipped = select_layers(by_layer, config) if by_layer else ([], {})
    skipped |= {layer: reason for layer in selected if (reason := reasons[by_layer[layer]])}
    chosen = [by_layer[layer] for layer in selected if reasons[by_layer[layer]] is None]
    if not chosen:
        raise nothing_compressed(skipped)
    labels = {by_layer[layer]: layer for layer in selected}
    edges = {next(iter(by_layer)), next(reversed(by_layer))}
    widths = layer_widths((labels[name] for name in chosen), edges, config)
    quantized = {name: widths[labels[name]] for name in chosen}
    restored = scheme.name in restored_kinds()

    def tie(name: str, owner: str) -> bool:
        # An integer layer is put back by its own name, so it needs a weight of its own.
        return (name not in quantized) if restored else (name in quantized) == (owner in quantized)

    tied = {name: owner for name, owner in tied_names(shapes, earlier).items() if tie(name, owner)}
    names = [name for name in state if name not in tied]

    def items() -> Iterator[Item]:
        for done, name in enumerate(names, 1):
            before = earlier.get(name, PLAIN)
            yield _stored(name, state[name], before, config, quantized.get(name))
            if progress is not None:
                progress(done, len(names))

    def status(layer: str, name: str) -> LayerStatus:
        size = 0 if name in tied else shapes[name].nbytes
        before = codec_of(earlier.get(name))
        if name in quantized:
            label = width_label(scheme.name, quantized[name].weight, quantized[name].activation)
            return LayerStatus(layer, "weight", True, label, bytes=size, before=before)
        return LayerStatus(layer, "weight", False, reason=skipped[layer], bytes=size, before=before)

    statuses = tuple(status(layer, name) for layer, name in by_layer.items())
    others = {name: each.numbers for name, each in widths.items() if each != config.widths}
    stream = TensorStream(items, tied)
    return StreamResult(stream, Coverage(statuses), skipped, widths_note(widths, config), others)


def refuse_without_graph(config: QuantizeConfig, has_network: bool) -> None:
    """Refuse a scheme that needs to know more of a network than its modules, or its bare tensors.

    Raises:
        GraphNeeded: names those that do not.
    """
    scheme, source = config.row, NetworkForm.MODULE if has_network else NetworkForm.TENSORS
    if ROUNDINGS[config.rounding].needs_data and scheme.source is not NetworkForm.GRAPH:
        problem = f"{option('rounding', config.rounding)} needs a network that can be traced"
        raise GraphNeeded(problem, hint=f"use {option('rounding', 'nearest')}")
    if scheme.source <= source:
        return
    needs = "a network that can be traced" if scheme.source is NetworkForm.GRAPH else "a network"
    ways = f"use {option('scheme')} {' or '.join(usable(source))}"
    if source is NetworkForm.TENSORS:
        ways = f"name its network with {option('arch')}, or {ways}"
    raise GraphNeeded(f"scheme {scheme.name} needs {needs}", hint=ways)


def _reasons(
    scheme: Scheme,
    shapes: Mapping[str, Tensor],
    layers: Mapping[str, nn.Module],
    earlier: Mapping[str, Encoding],
) -> dict[str, str | None]:
    """Every tensor that could be a weight, with the reason why the scheme leaves it, or None."""
    reasons: dict[str, str | None] = {**storable(shapes, scheme), **not_named_as_weights(shapes)}
    if not scheme.integer_arithmetic:
        reasons |= already_quantized(reasons, earlier)
    if scheme.layers:
        kinds = tuple(getattr(nn, kind) for kind in scheme.layers)
        for name, reason in reasons.items():
            if reason is None and not isinstance(layers.get(layer_of(name)), kinds):
                reasons[name] = f"{scheme.title} serves {' and '.join(scheme.layers)} only"
    return reasons


def _stored(
    name: str, tensor: Tensor, earlier: Encoding, config: QuantizeConfig, widths: Widths | None
) -> Item:
    """One tensor, quantized unless there are no widths, with its encoding; a pruned one stays pruned."""
    after, encoding = tensor, earlier
    if widths is not None:
        pruned, shared = is_pruned(earlier), is_shared(earlier)
        steps = weight_steps(widths, config, pruned=pruned, shared=shared)
        after, encoding = store_weight(tensor, steps, config.row.float_type)
        require_nonzero(name, tensor, after)
    if is_pruned(earlier):
        encoding = carry_over({name: tensor}, {name: earlier}, {name: after}, {name: encoding})[name]
    return name, after, encoding
