"""``modelopt distill``: a teacher and a student in, the taught student and the table out."""

from pathlib import Path
from typing import Annotated

import typer

from modelopt_cli.cli import options
from modelopt_cli.cli.console import Console
from modelopt_cli.cli.curve import check_curve, draw_curve
from modelopt_cli.cli.groups import Work
from modelopt_cli.cli.results import show_distilled
from modelopt_cli.cli.values import Reader

Teacher = Annotated[
    Path, typer.Argument(metavar="TEACHER", help="A checkpoint of any kind, or a modelopt file.")
]


def distill(
    console: Console,
    checkpoint: Teacher,
    method: options.DistillOptions,
    training: options.TrainOptions,
    network: options.NetworkOptions,
    run: options.RunOptions,
    measure: options.MeasureTrainedOptions,
    gates: options.GateOptions,
    no_eval: options.NoEval = False,
    output: options.Output = None,
    code: options.Code = "plain",
    force: options.Force = False,
    delete_on_fail: options.DeleteOnFail = False,
    dry_run: options.TrainDryRun = False,
    export: options.Export = None,
) -> Work:
    """Teach a small network what a large one knows.

    Example: modelopt distill resnet56.pth --student builtin:resnet8 --train train/ --data test/
    """
    reader = Reader()
    config = method.read(reader)
    how = training.read(reader)
    reader.check(training.train is not None, "--train", "there is nothing to train on; name the data")
    request = options.read_request(reader, network, run, measure, gates)
    exports = options.read_exports(reader, export, measured=not (no_eval or dry_run))
    options.read_curve(reader, training, dry_run)
    options.read_training_dry_run(reader, dry_run)
    coding = options.read_code(reader, code)
    reader.finish()
    options.check_exports(exports, force)
    asked = options.training_request(training, how)

    from modelopt_cli.api.distilling import scratch_beside
    from modelopt_cli.methods.distill.config import DistillConfig

    target = options.chosen_output(output, checkpoint, "distilled")
    outputs = [target, scratch_beside(target)] if method.compare_scratch else [target]
    sources: list[str | Path] = [checkpoint, method.student or "", *(path for path, _ in method.others())]
    check_curve(training.curve, asked, outputs, sources, force)

    settings = DistillConfig(**config)

    def work() -> None:
        from modelopt_cli import api

        console.silent = options.beside_another()
        student = api.Student(
            method.student or "",
            method.student_arch,
            method.others(),
            method.resize_for_teacher,
            method.compare_scratch,
            method.cache,
        )
        with console.progress() as progress:
            outcome = api.distill(
                checkpoint,
                target,
                student=student,
                training=asked,
                config=settings,
                evaluate=not no_eval,
                code=coding,
                force=force,
                dry_run=dry_run,
                on_note=console.note,
                progress=progress,
                **request.keywords(),
            )
        if outcome.written is not None:
            draw_curve(console, training.curve, asked, target, force)
        show_distilled(console, outcome, exports, force=force)

    return options.undone(work, delete_on_fail, *outputs)
