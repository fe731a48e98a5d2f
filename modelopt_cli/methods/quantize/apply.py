"""quantize: a Program in, a Program with int8 layers out."""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from modelopt_cli.artifact.sparsity import carry_over, is_shared
from modelopt_cli.errors import NothingCompressed, UsageError
from modelopt_cli.methods.context import Context, Result
from modelopt_cli.methods.layer_selection import select_layers
from modelopt_cli.methods.quantize.calibrate import calibrate
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.observers import OBSERVERS
from modelopt_cli.methods.quantize.plan import make_plan
from modelopt_cli.methods.quantize.static import convert, fill, numeric_padding, values_to_observe
from modelopt_cli.methods.quantize.weight_only import coarse, encode_weights, storable
from modelopt_cli.program import Program
from modelopt_cli.program.attention import split_attention, split_names
from modelopt_cli.program.coverage import WEIGHTED_KINDS, coverage, fetched_weights, weight_label
from modelopt_cli.program.fold import fold_batch_norms, inference_form
from modelopt_cli.program.quantized import DynamicLinear, Weighted
from modelopt_cli.program.rewrite import read_elsewhere


def apply(program: Program, config: QuantizeConfig, context: Context) -> Result:
    """Quantize a Program by the config's scheme.

    Args:
        program: any Program; it is not changed.
        config: scheme, observer, layers.
        context: calibration data (``int8`` only), seed, progress.

    Returns:
        The quantized Program and the layers left out, with reasons.

    Raises:
        UsageError: static int8 without data, or a glob that matches nothing.
        NothingCompressed: not one layer could be quantized.
        DataError: the calibration data are empty or do not fit.
    """
    result = _SCHEMES[config.scheme](program, config, context)
    _settle_encodings(program, result.program)
    covered = coverage(result.program)
    entry = {
        "method": "quantize",
        "config": config.as_dict(),
        "seed": context.seed,
        "torch": str(torch.__version__),
        "skipped": result.skipped,
        "coverage": {"compressed": covered.compressed, "total": covered.total},
        **context.origin,
    }
    if config.scheme == "int8" and context.data is not None:
        entry["calibration"] = context.data.name
    result.program.history = (*program.history, entry)
    return result


def _static(program: Program, config: QuantizeConfig, context: Context) -> Result:
    if context.data is None:
        raise UsageError(
            "static int8 needs data to calibrate on",
            hint="give --data, or use --scheme int8-dynamic or int8-weight, which need none",
        )
    split = split_attention(inference_form(program))
    selected, skipped = _select(split, config, _static_obstacle)
    shared = _shared(program, split)
    # A batch norm would give every channel of a shared weight values of its own.
    left = {layer for name in shared if (layer := name.rpartition(".")[0]) not in selected}
    ready = fold_batch_norms(split, left)
    plan = make_plan(ready, set(selected))
    watch = values_to_observe(plan, ready.graph)
    observers = {value: OBSERVERS[config.observer]() for value in watch}
    watched = {node: observers[value] for value, nodes in watch.items() for node in nodes}
    sample = context.data.sample(config.calibration_samples, context.seed)
    batches: Iterator[Tensor] = (
        images for images, _ in sample.batches(context.batch_size, workers=context.workers)
    )
    calibrate(ready, watched, batches, context.progress, sample.size)
    qparams = {value: observer.qparams() for value, observer in observers.items()}
    return Result(convert(ready, plan, qparams, shared), skipped)


def _dynamic(program: Program, config: QuantizeConfig, context: Context) -> Result:
    ready = copy.deepcopy(split_attention(inference_form(program)))
    selected, skipped = _select(ready, config, _dynamic_obstacle)
    shared = _shared(program, ready)
    for name in selected:
        linear = ready.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        layer = DynamicLinear(linear.in_features, linear.out_features, linear.bias is not None)
        fill(layer, linear, shared=f"{name}.weight" in shared)
        ready.set_submodule(name, layer)
    return Result(ready.eval(), skipped)


def _weight_only(program: Program, config: QuantizeConfig, context: Context) -> Result:
    ready = copy.deepcopy(program)
    state = dict(ready.named_parameters())
    reasons = storable(state)
    for name in fetched_weights(ready):  # whatever they are called
        reasons.setdefault(name, None)
    reasons |= coarse(reasons, ready.encodings)
    by_layer = {weight_label(name): name for name in reasons}
    selected, skipped = select_layers(by_layer, config)
    skipped |= {layer: why for layer in selected if (why := reasons[by_layer[layer]])}
    chosen = [name for name, why in reasons.items() if weight_label(name) in selected and why is None]
    if not chosen:
        raise nothing(skipped)
    rounded, encodings = encode_weights(state, chosen)
    with torch.no_grad():
        for name, values in rounded.items():
            state[name].copy_(values)
    ready.encodings.update(encodings)
    return Result(ready.eval(), skipped)


def _shared(program: Program, split: Program) -> set[str]:
    """Parameters that are shared, by the names that they have once attention is taken apart."""
    renamed = split_names(program, split)
    return {renamed.get(name, name) for name, e in program.encodings.items() if is_shared(e)}


def _settle_encodings(source: Program, made: Program) -> None:
    """Forget what is recorded of tensors that are gone or int8 by now; what was pruned stays pruned.

    A float tensor that has not changed is stored as it was.
    """
    before, after = source.state_dict(), made.state_dict()
    floats = {name for name, tensor in after.items() if tensor.is_floating_point()}
    kept = {name: encoding for name, encoding in made.encodings.items() if name in floats}
    renamed = split_names(source, made)
    for old, encoding in source.encodings.items():
        name = renamed.get(old, old)
        if name in floats and name not in kept and torch.equal(before[old], after[name]):
            kept[name] = encoding
    made.encodings = carry_over(before, source.encodings, after, kept, renamed)


def _select(
    program: Program, config: QuantizeConfig, obstacle: Callable[[nn.Module], str | None]
) -> tuple[list[str], dict[str, str]]:
    """Layers to quantize, and why the others are not."""
    calls: dict[str, int] = {}
    for node in program.graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    elsewhere = read_elsewhere(program)
    reasons: dict[str, str] = {}
    able: list[str] = []
    for name in calls:
        module = program.get_submodule(name)
        if not isinstance(module, WEIGHTED_KINDS):
            continue
        why = obstacle(module) or ("called more than once" if calls[name] > 1 else None)
        if why is None and name in elsewhere:
            why = f"its {elsewhere[name]} is also read outside of it"
        if why:
            reasons[name] = why
        else:
            able.append(name)
    if not able:
        done = {name: "int8 already" for name in calls if isinstance(program.get_submodule(name), Weighted)}
        raise nothing(reasons | done)
    selected, left_out = select_layers(able, config)
    if not selected:
        raise nothing(left_out | reasons)
    return selected, reasons | left_out


def nothing(reasons: dict[str, str]) -> NothingCompressed:
    """The error that says why not one layer could be quantized."""
    name, why = next(iter(reasons.items()), ("", ""))
    what = f"no layer can be quantized ({name}: {why})" if name else "no layer can be quantized"
    return NothingCompressed(what, hint="nothing was written; see --include, --exclude and --scheme")


def _static_obstacle(module: nn.Module) -> str | None:
    if isinstance(module, nn.Linear):
        return None
    if not isinstance(module, nn.Conv2d):
        return f"no int8 kernel for {type(module).__name__}"
    if module.padding_mode != "zeros":
        return f"padding mode {module.padding_mode!r}"
    return None if numeric_padding(module) is not None else "padding differs between the sides"


def _dynamic_obstacle(module: nn.Module) -> str | None:
    if isinstance(module, nn.Linear):
        return None
    return f"dynamic int8 serves Linear, not {type(module).__name__}"


_SCHEMES: dict[str, Callable[[Program, QuantizeConfig, Context], Result]] = {
    "int8": _static,
    "int8-dynamic": _dynamic,
    "int8-weight": _weight_only,
}
