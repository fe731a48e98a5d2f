"""``modelopt train``: an architecture or a checkpoint in, a trained file and the table out."""

from pathlib import Path
from typing import Annotated

import typer

from modelopt_cli.cli import options
from modelopt_cli.cli.console import Console
from modelopt_cli.cli.file_command import file_work
from modelopt_cli.cli.groups import Work
from modelopt_cli.cli.values import Reader
from modelopt_cli.data.config import PreprocessOverrides
from modelopt_cli.measure.config import EvalOptions, Gates
from modelopt_cli.training.config import TrainConfig

Start = Annotated[
    Path | None,
    typer.Argument(
        metavar="[CHECKPOINT]", help="What to start from; without one, from random weights of --arch."
    ),
]


def train(
    console: Console,
    training: TrainConfig,
    files: options.TrainingFiles,
    network: options.NetworkOptions,
    image: PreprocessOverrides,
    measure: EvalOptions,
    gates: Gates,
    checkpoint: Start = None,
    no_eval: options.NoEval = False,
    output: options.Output = None,
    force: options.Force = False,
    delete_on_fail: options.DeleteOnFail = False,
    dry_run: options.TrainDryRun = False,
    export: options.Export = (),
) -> Work:
    """Train a network into a file, from scratch or from a checkpoint.

    Example: modelopt train --arch builtin:resnet8 --train train/ --data test/ -o base.safetensors
    """
    reader = Reader()
    reader.check(
        output is not None or checkpoint is not None, "--output", "name the file to write, with -o FILE"
    )
    request = options.read_request(reader, network, image, measure, gates)
    exports = options.read_exports(reader, export, measured=not (no_eval or dry_run))
    options.read_training(reader, files, training, dry_run)
    options.read_training_dry_run(reader, dry_run)
    reader.finish()
    options.check_exports(exports, force)
    return file_work(
        console,
        request,
        command="train",
        source=checkpoint,
        output=options.chosen_output(output, checkpoint, "trained"),
        training=(files, training),
        evaluate=not no_eval,
        force=force,
        delete_on_fail=delete_on_fail,
        dry_run=dry_run,
        exports=exports,
    )
