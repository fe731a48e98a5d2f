"""``modelopt share``: a checkpoint in, a file of few distinct values and the table out."""

from dataclasses import replace

from modelopt_cli.cli import options
from modelopt_cli.cli.console import Console
from modelopt_cli.cli.file_command import file_work
from modelopt_cli.cli.groups import Work
from modelopt_cli.cli.values import Reader
from modelopt_cli.data.config import PreprocessOverrides
from modelopt_cli.measure.config import EvalOptions, Gates
from modelopt_cli.methods.share.config import ShareConfig
from modelopt_cli.training.config import FineTuneConfig


def share(
    console: Console,
    checkpoint: options.Checkpoint,
    method: ShareConfig,
    training: FineTuneConfig,
    files: options.TrainingFiles,
    network: options.NetworkOptions,
    image: PreprocessOverrides,
    measure: EvalOptions,
    gates: Gates,
    calibration: options.CalibrationOrTrain = None,
    no_eval: options.NoEval = False,
    output: options.Output = None,
    code: options.Code = ShareConfig.code,
    force: options.Force = False,
    delete_on_fail: options.DeleteOnFail = False,
    dry_run: options.DryRun = False,
    export: options.Export = (),
) -> Work:
    """Weight clustering (palettization): few distinct values.

    Example: modelopt share resnet18.pth --bits auto --ratio 12 --calibration train/ --data val/
    """
    reader = Reader()
    config = within_budget(method, gates)
    reader.check(
        bool(training.epochs) or method.tune == ShareConfig.tune, "--tune", "has no meaning without --epochs"
    )
    if config.max_drop is not None and (no_eval or network.data is None):
        # It is the budget, met on the calibration data, and there is nothing to judge the result by.
        gates = replace(gates, max_drop=None, confident=False)
    request = options.read_request(reader, network, image, measure, gates)
    exports = options.read_exports(reader, export, measured=not (no_eval or dry_run))
    options.read_training(reader, files, training, dry_run)
    reader.finish()
    options.check_exports(exports, force)

    config.require_size()  # before the checkpoint is read
    return file_work(
        console,
        request,
        command="share",
        source=checkpoint,
        output=options.chosen_output(output, checkpoint, "shared"),
        config=config,
        training=(files, training),
        calibration=calibration or files.train,
        evaluate=not no_eval,
        code=code,
        force=force,
        delete_on_fail=delete_on_fail,
        dry_run=dry_run,
        exports=exports,
    )


def within_budget(config: ShareConfig, gates: Gates) -> ShareConfig:
    """The config with the gate on accuracy as its budget, where it has no other."""
    if config.automatic and config.bytes is None and config.ratio is None:
        return replace(config, max_drop=gates.max_drop)
    return config
