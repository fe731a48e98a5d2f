"""quantize: a Program in, a Program with integer weights out."""

from dataclasses import replace

import torch

from modelopt_cli.artifact.codecs.narrow import NARROW
from modelopt_cli.artifact.encodings import carry_over
from modelopt_cli.measure.coverage import coverage
from modelopt_cli.measure.layer_status import recorded
from modelopt_cli.methods.context import Context, MethodResult
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.learning.integer_training import (
    STAGE,
    figures_of,
    fine_tuned,
    require_trainable,
    settings_of,
)
from modelopt_cli.methods.quantize.sensitivity.rounding_sensitivity import in_history, sensitivity
from modelopt_cli.methods.stages import Stages
from modelopt_cli.program import Encoding, Program
from modelopt_cli.program.attention import split_names
from modelopt_cli.program.history import history_entry
from modelopt_cli.program.quantization import BITS
from modelopt_cli.program.quantized import Weighted
from modelopt_cli.program.quantized_recurrent import renamed_weights


def apply(program: Program, config: QuantizeConfig, context: Context) -> MethodResult:
    """Quantize a Program by the config's scheme.

    Args:
        program: any Program; it is not changed.
        config: scheme, observer, layers.
        context: calibration data (for schemes that need them), what to train with, seed, progress.

    Returns:
        The quantized Program and the layers left out, with reasons.

    Raises:
        UsageError: a scheme that needs calibration without data, or a glob that matches nothing.
        NothingCompressed: not one layer could be quantized.
        DataError: the calibration data are empty or do not fit.
        as ``modelopt_cli.training.fit``, with training.
    """
    scheme = config.row
    if context.training is not None:
        require_trainable(program, config)
    result = scheme.apply(program, config, context)
    _settle_encodings(program, result.program)
    if context.training is not None:
        result = replace(result, program=_trained(program, result, config, context))
    entry = history_entry(
        config.method, config.as_dict(), seed=context.seed, origin=context.origin, skipped=result.skipped
    )
    entry |= result.record
    if config.sensitivity and not config.automatic:  # which measures it in any case
        entry |= in_history(sensitivity(program, config, context, timed=False))
    entry |= recorded(coverage(result.program, (*program.history, entry), given=program))
    if config.needs_data and context.data is not None:
        entry["calibration"] = context.data.name
    if context.training is not None:
        entry["training"] = {"data": context.training.train.name, **settings_of(config, context).as_dict()}
        entry["trained"] = figures_of(result.program)
    result.program.history = (*program.history, entry)
    return result


def _trained(program: Program, result: MethodResult, config: QuantizeConfig, context: Context) -> Program:
    stages = Stages(context.training)
    return stages.once(STAGE, lambda: fine_tuned(program, result.floats, result.program, config, context))


def narrow_encodings(program: Program) -> dict[str, Encoding]:
    """Encodings of integer weights of fewer than 8 bits, so that a file may hold them in those."""
    return {
        f"{name}.weight": Encoding(NARROW.name, {"bits": layer.weight_bits})
        for name, layer in program.named_modules(remove_duplicate=False)
        if isinstance(layer, Weighted) and layer.weight_bits < BITS
    }


def _settle_encodings(source: Program, quantized: Program) -> None:
    """Forget what is recorded of tensors that are gone or int8 by now; what was pruned stays pruned.

    A float tensor that has not changed is stored as it was.
    """
    before, after = source.state_dict(), quantized.state_dict()
    floats = {name for name, tensor in after.items() if tensor.is_floating_point()}
    kept = {name: encoding for name, encoding in quantized.encodings.items() if name in floats}
    renamed = split_names(source, quantized) | renamed_weights(before, after)
    for old, encoding in source.encodings.items():
        name = renamed.get(old, old)
        if name in floats and name not in kept and torch.equal(before[old], after[name]):
            kept[name] = encoding
    kept |= narrow_encodings(quantized)
    quantized.encodings = carry_over(before, source.encodings, after, kept, renamed)
