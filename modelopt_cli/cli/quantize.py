"""``modelopt quantize``: a checkpoint in, an int8 file and the table out."""

from dataclasses import replace

from modelopt_cli.cli import options
from modelopt_cli.cli.console import Console
from modelopt_cli.cli.file_command import file_work
from modelopt_cli.cli.groups import Work
from modelopt_cli.cli.sensitivity_options import Plot, read_sensitivity, sensitivity_work
from modelopt_cli.cli.values import Reader
from modelopt_cli.data.config import PreprocessOverrides
from modelopt_cli.measure.config import EvalOptions, Gates
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.training.config import IntegerTuneConfig


def quantize(
    console: Console,
    checkpoint: options.Checkpoint,
    method: QuantizeConfig,
    training: IntegerTuneConfig,
    files: options.TrainingFiles,
    network: options.NetworkOptions,
    image: PreprocessOverrides,
    measure: EvalOptions,
    gates: Gates,
    calibration: options.CalibrationOrTrain = None,
    plot: Plot = None,
    no_eval: options.NoEval = False,
    output: options.Output = None,
    code: options.SchemeCode = None,
    force: options.Force = False,
    delete_on_fail: options.DeleteOnFail = False,
    dry_run: options.DryRun = False,
    export: options.Export = (),
) -> Work:
    """Quantize a checkpoint, train it so, and show what that cost.

    Example: modelopt quantize resnet18.pth --data val/ -o resnet18-int8.safetensors
    """
    reader = Reader()
    config = within_budget(method, gates)
    if config.automatic and (no_eval or network.data is None):
        # They are the budget, met on the calibration data, and there is nothing to judge the result by.
        gates = replace(gates, max_drop=None, min_ratio=None, min_speedup=None, confident=False)
    reader.check(
        not (no_eval and gates),
        "--no-eval",
        "a gate needs the result to be measured; leave out --no-eval or the gate; "
        "in a recipe, write it next to the steps",
    )
    request = options.read_request(reader, network, image, measure, gates)
    exports = options.read_exports(reader, export, measured=not (no_eval or dry_run))
    options.read_training(reader, files, training, dry_run)
    read_sensitivity(reader, config.sensitivity, plot, dry_run)
    reader.finish()
    options.check_exports(exports, force)

    target = options.chosen_output(output, checkpoint, config.suffix)
    calibration = calibration or files.train
    if config.sensitivity and dry_run:
        fields = {"source": checkpoint, "output": target, "config": config, "calibration": calibration}
        return sensitivity_work(console, request, plot, force, command="quantize", **fields)
    config.require_budget()  # before the checkpoint is read
    return file_work(
        console,
        request,
        command="quantize",
        source=checkpoint,
        output=target,
        config=config,
        training=(files, training),
        calibration=calibration,
        evaluate=not no_eval,
        code=code or config.code,
        force=force,
        delete_on_fail=delete_on_fail,
        dry_run=dry_run,
        exports=exports,
    )


def within_budget(config: QuantizeConfig, gates: Gates) -> QuantizeConfig:
    """The config with the gates on accuracy, size and speed as its budget, where it chooses precisions."""
    if not config.automatic:
        return config
    limits = {name: getattr(gates, name) for name in ("max_drop", "min_ratio", "min_speedup")}
    return replace(config, **limits)
