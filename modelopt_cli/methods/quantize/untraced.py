"""What can be quantized without a graph: stored weights anywhere, dynamic linears in a module."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from modelopt_cli.artifact import Stream
from modelopt_cli.artifact.lazy import described
from modelopt_cli.artifact.plan import PLAIN
from modelopt_cli.artifact.sparsity import carry_over, is_pruned, is_shared
from modelopt_cli.artifact.stream import Item, tied_names
from modelopt_cli.errors import UsageError
from modelopt_cli.methods.context import Progress
from modelopt_cli.methods.layer_selection import not_named_as_weights, select_layers
from modelopt_cli.methods.quantize.apply import nothing
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.weight_only import coarse, encode_weight, layer_of, require_left, storable
from modelopt_cli.program import Encoding
from modelopt_cli.program.coverage import Coverage, LayerStatus
from modelopt_cli.program.quantized import DynamicLinear


@dataclass(frozen=True)
class TensorResult:
    """A state dict that is quantized tensor by tensor, while it is written.

    Attributes:
        stream: its tensors and how each is stored.
        coverage: what becomes of every layer.
        skipped: the reason for every layer that this leaves as it was.
    """

    stream: Stream
    coverage: Coverage
    skipped: dict[str, str]


def apply_to_state(
    state: Mapping[str, Tensor],
    config: QuantizeConfig,
    linears: set[str] | None = None,
    encodings: Mapping[str, Encoding] | None = None,
    progress: Progress | None = None,
) -> TensorResult:
    """Quantize a state dict that has no graph.

    Args:
        state: tensors by name; they are not changed. They may stay in their file until their turn.
        config: ``int8-weight``, or ``int8-dynamic`` where the network's linear layers are known.
        linears: names of the network's ``nn.Linear`` layers, or None for a bare state dict.
        encodings: how the tensors were stored so far; what is pruned stays so.
        progress: called with tensors done and their total.

    Raises:
        UsageError: the scheme needs a graph, or a network.
        NothingCompressed: no tensor could be quantized.
    """
    dynamic = config.scheme == "int8-dynamic"
    if config.scheme == "int8" or (dynamic and linears is None):
        needs = "a network that can be traced" if config.scheme == "int8" else "a network"
        ways = (
            "use --scheme int8-dynamic or int8-weight"
            if linears is not None
            else "name its network with --arch, or use --scheme int8-weight"
        )
        raise UsageError(f"scheme {config.scheme} needs {needs}", hint=ways)
    shapes, earlier = described(state), encodings or {}
    reasons: dict[str, str | None] = {**storable(shapes), **not_named_as_weights(shapes)}
    if not dynamic:
        reasons |= coarse(reasons, earlier)
    weights = Counter(map(layer_of, reasons))
    # A layer of several weights (attention with separate projections) is named weight by weight.
    by_layer = {layer_of(name) if weights[layer_of(name)] == 1 else name: name for name in reasons}
    for name in by_layer.values():
        if dynamic and reasons[name] is None and layer_of(name) not in (linears or set()):
            reasons[name] = "dynamic int8 serves Linear only"
    selected, skipped = select_layers(by_layer, config) if by_layer else ([], {})
    skipped |= {layer: why for layer in selected if (why := reasons[by_layer[layer]])}
    chosen = [by_layer[layer] for layer in selected if reasons[by_layer[layer]] is None]
    if not chosen:
        raise nothing(skipped)
    quantized = dict.fromkeys(chosen)

    def tie(name: str, owner: str) -> bool:
        # A dynamic layer is put back by its own name, so it needs a weight of its own.
        return name not in quantized if dynamic else (name in quantized) == (owner in quantized)

    tied = {name: owner for name, owner in tied_names(shapes, earlier).items() if tie(name, owner)}
    names = [name for name in state if name not in tied]

    def items() -> Iterator[Item]:
        for done, name in enumerate(names, 1):
            yield _stored(name, state[name], earlier.get(name, PLAIN), name in quantized, dynamic)
            if progress is not None:
                progress(done, len(names))

    def status(layer: str, name: str) -> LayerStatus:
        size = 0 if name in tied else shapes[name].nbytes
        if name in quantized:
            return LayerStatus(layer, "weight", True, config.scheme, bytes=size)
        if name in earlier:
            return LayerStatus(layer, "weight", True, earlier[name].codec, bytes=size)
        return LayerStatus(layer, "weight", False, reason=skipped[layer], bytes=size)

    statuses = tuple(status(layer, name) for layer, name in by_layer.items())
    return TensorResult(Stream(items, tied), Coverage(statuses), skipped)


def _stored(name: str, tensor: Tensor, earlier: Encoding, quantize: bool, dynamic: bool) -> Item:
    """One tensor, rounded if it is to be, with its encoding; a pruned one stays pruned."""
    after, encoding = tensor, earlier
    if quantize:
        after, encoding = encode_weight(tensor, exact_everywhere=dynamic, shared=is_shared(earlier))
        require_left(name, tensor, after)
    if is_pruned(earlier):
        encoding = carry_over({name: tensor}, {name: earlier}, {name: after}, {name: encoding})[name]
    return name, after, encoding


def restore(
    module: nn.Module, history: tuple[dict[str, Any], ...], encodings: Mapping[str, Encoding]
) -> None:
    """Put dynamic layers back into a rebuilt network whose file says it was quantized so, in place."""
    last = next((e for e in reversed(history) if e.get("method") == "quantize"), None)
    if last is None or last.get("config", {}).get("scheme") != "int8-dynamic":
        return
    skipped = last.get("skipped", {})
    for name, encoding in encodings.items():
        if "scale" not in encoding.parts or name in skipped or layer_of(name) in skipped:
            continue
        linear = module.get_submodule(layer_of(name))
        if isinstance(linear, nn.Linear):
            layer = DynamicLinear(linear.in_features, linear.out_features, linear.bias is not None)
            scale = encoding.parts["scale"].float()
            # The decoded weights are exact multiples of their scale.
            layer.weight.copy_((linear.weight.detach() / scale.view(-1, 1)).round())
            layer.scale.copy_(scale)
            if layer.bias is not None:
                layer.bias.copy_(linear.bias.detach())
            module.set_submodule(layer_of(name), layer)
