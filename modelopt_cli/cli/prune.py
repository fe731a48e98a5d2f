"""``modelopt prune``: a checkpoint in, a smaller or sparser file and the table out."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

from modelopt_cli.artifact import check_output
from modelopt_cli.cli import options
from modelopt_cli.cli.console import Console
from modelopt_cli.cli.file_command import file_work
from modelopt_cli.cli.groups import Work
from modelopt_cli.cli.results import show_sensitivity
from modelopt_cli.cli.values import Reader
from modelopt_cli.data.config import PreprocessOverrides
from modelopt_cli.measure.config import EvalOptions, Gates
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.report.formats import PICTURES, file_names
from modelopt_cli.settings import Setting
from modelopt_cli.training.config import FineTuneConfig

Sensitivity = Annotated[
    bool,
    Setting("With --dry-run: show what pruning each layer alone costs.", title="Pruning", advanced=True),
]
Plot = Annotated[
    Path | None,
    Setting(
        f"With --sensitivity: also draw it, to {file_names(PICTURES)} (plots extra).",
        title="Pruning",
        advanced=True,
    ),
]


def prune(
    console: Console,
    checkpoint: options.Checkpoint,
    method: PruneConfig,
    training: FineTuneConfig,
    files: options.TrainingFiles,
    network: options.NetworkOptions,
    image: PreprocessOverrides,
    measure: EvalOptions,
    gates: Gates,
    calibration: options.CalibrationOrTrain = None,
    sensitivity: Sensitivity = False,
    plot: Plot = None,
    no_eval: options.NoEval = False,
    output: options.Output = None,
    code: options.Code = PruneConfig.code,
    force: options.Force = False,
    delete_on_fail: options.DeleteOnFail = False,
    dry_run: options.DryRun = False,
    export: options.Export = (),
) -> Work:
    """Prune a checkpoint, and show what that cost.

    Example: modelopt prune resnet18.pth --flops 0.5 --train train/ --epochs 5 --data val/
    """
    reader = Reader()
    request = options.read_request(reader, network, image, measure, gates)
    exports = options.read_exports(reader, export, measured=not (no_eval or dry_run))
    options.read_training(reader, files, training, dry_run)
    reader.check(dry_run or not sensitivity, "--sensitivity", "has no meaning without --dry-run")
    if plot is not None:
        reader.check(sensitivity, "--plot", "has no meaning without --sensitivity")
        options.read_ending(reader, "--plot", plot, PICTURES)
    reader.finish()
    options.check_exports(exports, force)

    target = options.chosen_output(output, checkpoint, "pruned")
    calibration = calibration or files.train
    if sensitivity:
        keywords = {"source": checkpoint, "output": target, "config": method, "calibration": calibration}
        return partial(_sensitivity, console, plot, force, keywords, request)
    method.target  # noqa: B018 -- raises where there is none, before the checkpoint is read
    return file_work(
        console,
        request,
        command="prune",
        source=checkpoint,
        output=target,
        config=method,
        training=(files, training),
        calibration=calibration,
        evaluate=not no_eval,
        code=code,
        force=force,
        delete_on_fail=delete_on_fail,
        dry_run=dry_run,
        exports=exports,
    )


def _sensitivity(
    console: Console,
    plot: Path | None,
    force: bool,
    keywords: dict[str, Any],
    request: options.RequestOptions,
) -> None:
    """Measure and show what pruning each part alone would cost."""
    from modelopt_cli import api, report

    if plot is not None:
        check_output(plot, force)
        report.require_plots(plot)
    with console.progress() as progress:
        asked = api.Request(
            command="prune", on_note=console.note, progress=progress, **keywords, **request.keywords()
        )
        parts = api.sensitivity(asked)
    if plot is not None:
        report.plot_sensitivity(parts, plot)
    show_sensitivity(console, parts)
    if plot is not None:
        console.note(f"drew {plot}")
