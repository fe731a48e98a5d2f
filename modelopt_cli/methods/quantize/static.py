"""Static int8: ranges of activations are fixed by calibration data."""

from modelopt_cli.errors import UsageError
from modelopt_cli.methods.batches import input_batches
from modelopt_cli.methods.context import Context, MethodResult
from modelopt_cli.methods.quantize.calibration import calibrate
from modelopt_cli.methods.quantize.candidates import select_candidates, shared_weights
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.conversion import convert, values_to_observe
from modelopt_cli.methods.quantize.histogram import Histogram
from modelopt_cli.methods.quantize.layer_forms import obstacle
from modelopt_cli.methods.quantize.observers import OBSERVERS
from modelopt_cli.methods.quantize.precision_plan import make_plan
from modelopt_cli.methods.quantize.schemes import SCHEMES, NetworkForm, usable
from modelopt_cli.program import Program
from modelopt_cli.program.channels import layered
from modelopt_cli.program.fold import fold_batch_norms, inference_form
from modelopt_cli.program.paddings import explicit_padding
from modelopt_cli.settings import option


def quantize_static(program: Program, config: QuantizeConfig, context: Context) -> MethodResult:
    """Calibrate a float Program and turn it into its int8 form.

    Raises:
        UsageError: there are no data, or a glob matches no layer.
        NothingCompressed: not one layer could be quantized.
        DataError: the calibration data are empty or do not fit.
    """
    if context.data is None:
        without_data = " or ".join(
            name for name in usable(NetworkForm.GRAPH) if not SCHEMES[name].needs_calibration
        )
        raise UsageError(
            f"{SCHEMES[config.scheme].title} needs data to calibrate on",
            hint=f"give {option('data')}, or use {option('scheme')} {without_data}, which need none",
        )
    split = explicit_padding(layered(inference_form(program)))
    selected, skipped = select_candidates(split, config, obstacle)
    shared = shared_weights(program, split)
    # A batch norm would give every channel of a shared weight values of its own.
    unfolded = {layer for name in shared if (layer := name.rpartition(".")[0]) not in selected}
    ready = fold_batch_norms(split, unfolded)
    plan = make_plan(ready, set(selected))
    watch = values_to_observe(plan, ready.graph)
    observer = OBSERVERS[config.observer]
    histograms = {value: Histogram(observer.choose, observer.needs_counts) for value in watch}
    watched = {node: histograms[value] for value, nodes in watch.items() for node in nodes}
    sample = context.data.sample(config.calibration_samples, context.seed)
    batches = input_batches(sample, context)
    calibrate(ready, watched, batches, context.progress, sample.size)
    qparams = {value: histogram.qparams() for value, histogram in histograms.items()}
    return MethodResult(convert(ready, plan, qparams, shared), skipped)
