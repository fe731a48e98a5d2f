"""quantize: a Program in, a Program with integer weights out."""

import torch

from modelopt_cli.artifact.codecs.narrow import NARROW
from modelopt_cli.artifact.encodings import carry_over
from modelopt_cli.measure.coverage import coverage
from modelopt_cli.measure.layer_status import recorded
from modelopt_cli.methods.context import Context, MethodResult
from modelopt_cli.methods.quantize.config import QuantizeConfig
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
        context: calibration data (for schemes that need them), seed, progress.

    Returns:
        The quantized Program and the layers left out, with reasons.

    Raises:
        UsageError: a scheme that needs calibration without data, or a glob that matches nothing.
        NothingCompressed: not one layer could be quantized.
        DataError: the calibration data are empty or do not fit.
    """
    scheme = config.row
    result = scheme.apply(program, config, context)
    _settle_encodings(program, result.program)
    entry = history_entry(
        config.method, config.as_dict(), seed=context.seed, origin=context.origin, skipped=result.skipped
    )
    entry |= result.record
    entry |= recorded(coverage(result.program, (*program.history, entry), given=program))
    if config.needs_data and context.data is not None:
        entry["calibration"] = context.data.name
    result.program.history = (*program.history, entry)
    return result


def narrow_encodings(program: Program) -> dict[str, Encoding]:
    """How the integer weights of fewer than 8 bits are stored, so that a file may hold them in those."""
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
