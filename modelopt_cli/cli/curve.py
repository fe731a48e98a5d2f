"""``--curve``: a picture of the training that a command has done."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from modelopt_cli.artifact import check_output
from modelopt_cli.cli.console import Console
from modelopt_cli.cli.options import TrainingFiles, training_request
from modelopt_cli.errors import OutputError
from modelopt_cli.training.config import TrainConfig

if TYPE_CHECKING:
    from modelopt_cli.api import TrainingRequest


def check_curve(
    files: TrainingFiles,
    config: TrainConfig,
    outputs: Sequence[Path],
    sources: Sequence[str | Path],
    force: bool,
) -> None:
    """Refuse, before anything is trained, a picture that could not or must not be drawn.

    Args:
        files: one of which is the picture.
        config: of the training.
        outputs: what else the command writes.
        sources: what it reads.
        force: whether an existing file may be replaced.

    Raises:
        OutputError, EnvironmentFailure: as ``artifact.check_output``; matplotlib is missing.
        UsageError: the run uses that name itself.
    """
    path = files.curve
    if path is None or (training := training_request(files, config)) is None:
        return
    from modelopt_cli import report

    check_output(path, force, sources)
    for output in outputs:
        if path.resolve() == output.resolve():
            raise OutputError("is also the output", where=str(path), hint="choose another name")
        training.require_apart(output, [path])
    report.require_plots(path)


def draw_curve(
    console: Console, path: Path | None, training: "TrainingRequest | None", output: Path, force: bool
) -> None:
    """Draw the whole run that wrote ``output``, what was before an interruption as well."""
    if path is None or training is None:
        return
    from modelopt_cli import report
    from modelopt_cli.api.distilling import SCRATCH

    report.draw_curve(training.log(output), path, overlaid=[SCRATCH], force=force)
    console.note(f"drew {path}")
