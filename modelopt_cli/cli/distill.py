"""``modelopt distill``: a teacher and a student in, the taught student and the table out."""

from pathlib import Path
from typing import Annotated

import typer

from modelopt_cli.artifact.output_path import scratch_beside
from modelopt_cli.cli import options
from modelopt_cli.cli.console import Console
from modelopt_cli.cli.file_command import file_work
from modelopt_cli.cli.groups import Work
from modelopt_cli.cli.values import Reader
from modelopt_cli.data.config import PreprocessOverrides
from modelopt_cli.measure.config import EvalOptions, Gates
from modelopt_cli.methods.distill.config import DistillConfig
from modelopt_cli.training.config import TrainConfig

Teacher = Annotated[
    Path, typer.Argument(metavar="TEACHER", help="A checkpoint of any kind, or a modelopt file.")
]


def distill(
    console: Console,
    checkpoint: Teacher,
    networks: options.StudentOptions,
    method: DistillConfig,
    training: TrainConfig,
    files: options.TrainingFiles,
    network: options.NetworkOptions,
    image: PreprocessOverrides,
    measure: EvalOptions,
    gates: Gates,
    no_eval: options.NoEval = False,
    output: options.Output = None,
    code: options.Code = DistillConfig.code,
    force: options.Force = False,
    delete_on_fail: options.DeleteOnFail = False,
    dry_run: options.TrainDryRun = False,
    export: options.Export = (),
) -> Work:
    """Teach a small network what a large one knows.

    Example: modelopt distill resnet56.pth --student builtin:resnet8 --train train/ --data test/
    """
    reader = Reader()
    networks.read(reader, method)
    request = options.read_request(reader, network, image, measure, gates)
    exports = options.read_exports(reader, export, measured=not (no_eval or dry_run))
    options.read_training(reader, files, training, dry_run)
    options.read_training_dry_run(reader, dry_run)
    reader.finish()
    options.check_exports(exports, force)

    target = options.chosen_output(output, checkpoint, "distilled")
    return file_work(
        console,
        request,
        command="distill",
        source=checkpoint,
        output=target,
        writes=[scratch_beside(target)] if networks.compare_scratch else [],
        reads=[networks.student or "", *(path for path, _ in networks.further_teachers())],
        student=networks,
        config=method,
        training=(files, training),
        evaluate=not no_eval,
        code=code,
        force=force,
        delete_on_fail=delete_on_fail,
        dry_run=dry_run,
        exports=exports,
    )
