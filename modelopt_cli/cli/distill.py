"""``modelopt distill``: a teacher and a student in, the taught student and the table out."""

from pathlib import Path
from typing import Annotated

import typer

from modelopt_cli.artifact.output_path import scratch_beside
from modelopt_cli.cli import options
from modelopt_cli.cli.console import Console
from modelopt_cli.cli.curve import check_curve, draw_curve
from modelopt_cli.cli.groups import Work
from modelopt_cli.cli.results import show_result
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
    outputs = [target, scratch_beside(target)] if networks.compare_scratch else [target]
    sources: list[str | Path] = [checkpoint, networks.student or "", *(path for path, _ in networks.others())]
    check_curve(files, training, outputs, sources, force)

    def work() -> None:
        from modelopt_cli import api

        asked = options.training_request(files, training)
        console.silent = options.beside_another()
        with console.progress() as progress:
            result = api.execute(
                api.Request(
                    command="distill",
                    source=checkpoint,
                    output=target,
                    student=networks.chosen(),
                    training=asked,
                    config=method,
                    evaluate=not no_eval,
                    code=code,
                    force=force,
                    dry_run=dry_run,
                    on_note=console.note,
                    progress=progress,
                    **request.keywords(),
                )
            )
        if result.written is not None:
            draw_curve(console, files.curve, asked, target, force)
        show_result(console, result, exports, force=force)

    begin = options.checked(work, [checkpoint], outputs, force=force)
    return options.undone(begin, delete_on_fail, *outputs)
