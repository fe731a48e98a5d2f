"""The work that all commands have in common which read a checkpoint and write a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modelopt_cli.cli import options
from modelopt_cli.cli.console import Console
from modelopt_cli.cli.curve import check_curve, draw_curve
from modelopt_cli.cli.groups import Work
from modelopt_cli.cli.results import show_result
from modelopt_cli.training.config import FineTuneConfig, TrainConfig


def file_work(
    console: Console,
    request: options.RequestOptions,
    *,
    command: str,
    source: Path | None,
    output: Path,
    force: bool,
    delete_on_fail: bool,
    dry_run: bool,
    exports: Sequence[Path],
    training: tuple[options.TrainingFiles, TrainConfig] | None = None,
    student: options.StudentOptions | None = None,
    writes: Sequence[Path] = (),
    reads: Sequence[str | Path] = (),
    **fields: Any,
) -> Work:
    """Work that executes a command, draws the curve of its training and shows the result.

    Args:
        console: what it prints to.
        request: network, data, measuring and limits.
        command: its name.
        source: the checkpoint, or None.
        output: the file to write.
        force: replace existing files.
        delete_on_fail: leave files as they were where the command fails.
        dry_run: plan only; without training, existing files then do not matter.
        exports: files to which the table is written, too.
        training: the files and settings of a command that can train.
        student: the network that learns, for ``distill``.
        writes: files that are written besides ``output``.
        reads: files that are read besides ``source``; the curve must be none of them.
        fields: the other fields of ``api.Request``.

    Raises:
        OutputError, UsageError, EnvironmentFailure: the curve cannot be drawn where it is wanted.
    """
    outputs, sources = [output, *writes], [*([] if source is None else [source]), *reads]
    if training is not None:
        check_curve(*training, outputs, sources, force)

    def work() -> None:
        from modelopt_cli import api

        asked = None if training is None else options.training_request(*training)
        console.silent |= training is not None and options.beside_another()
        with console.progress() as progress:
            result = api.execute(
                api.Request(
                    command=command,
                    source=source,
                    output=output,
                    training=asked,
                    student=None if student is None else student.chosen(),
                    force=force,
                    dry_run=dry_run,
                    on_note=console.note,
                    progress=progress,
                    **fields,
                    **request.keywords(),
                )
            )
        if training is not None and result.written is not None:
            draw_curve(console, training[0].curve, asked, output, force)
        show_result(console, result, exports, force=force)

    always_trains = training is not None and not isinstance(training[1], FineTuneConfig)
    given, files = request.network, None if training is None else training[0]
    data = [given.data, fields.get("calibration"), *([] if files is None else [files.train, files.val])]
    written = outputs if always_trains or not dry_run else []
    begin = options.checked(work, [source], written, force=force, arch=given.arch, data=data)
    return options.undone(begin, delete_on_fail, *outputs)
