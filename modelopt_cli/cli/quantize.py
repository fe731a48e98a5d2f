"""``modelopt quantize``: a checkpoint in, an int8 file and the table out."""

from modelopt_cli.cli import options
from modelopt_cli.cli.console import Console
from modelopt_cli.cli.file_command import file_work
from modelopt_cli.cli.groups import Work
from modelopt_cli.cli.sensitivity_options import Plot, QuantizeSensitivity, read_sensitivity, sensitivity_work
from modelopt_cli.cli.values import Reader
from modelopt_cli.data.config import PreprocessOverrides
from modelopt_cli.measure.config import EvalOptions, Gates
from modelopt_cli.methods.quantize.config import QuantizeConfig


def quantize(
    console: Console,
    checkpoint: options.Checkpoint,
    method: QuantizeConfig,
    network: options.NetworkOptions,
    image: PreprocessOverrides,
    measure: EvalOptions,
    gates: Gates,
    calibration: options.Calibration = None,
    sensitivity: QuantizeSensitivity = False,
    plot: Plot = None,
    no_eval: options.NoEval = False,
    output: options.Output = None,
    code: options.SchemeCode = None,
    force: options.Force = False,
    delete_on_fail: options.DeleteOnFail = False,
    dry_run: options.DryRun = False,
    export: options.Export = (),
) -> Work:
    """Quantize a checkpoint to int8, and show what that cost.

    Example: modelopt quantize resnet18.pth --data val/ -o resnet18-int8.safetensors
    """
    reader = Reader()
    request = options.read_request(reader, network, image, measure, gates)
    exports = options.read_exports(reader, export, measured=not (no_eval or dry_run))
    read_sensitivity(reader, sensitivity, plot, dry_run)
    reader.finish()
    options.check_exports(exports, force)

    target = options.chosen_output(output, checkpoint, method.suffix)
    if sensitivity:
        fields = {"source": checkpoint, "output": target, "config": method, "calibration": calibration}
        return sensitivity_work(console, request, plot, force, command="quantize", **fields)
    return file_work(
        console,
        request,
        command="quantize",
        source=checkpoint,
        output=target,
        config=method,
        calibration=calibration,
        evaluate=not no_eval,
        code=code or method.code,
        force=force,
        delete_on_fail=delete_on_fail,
        dry_run=dry_run,
        exports=exports,
    )
