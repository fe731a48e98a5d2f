"""``modelopt eval``: checkpoints and modelopt files side by side in one table."""

from pathlib import Path
from typing import Annotated

import typer

from modelopt_cli.cli import options
from modelopt_cli.cli.console import Console
from modelopt_cli.cli.groups import Work
from modelopt_cli.cli.results import show_evaluation
from modelopt_cli.cli.values import Reader
from modelopt_cli.data.config import PreprocessOverrides
from modelopt_cli.measure.config import EvalOptions, Gates
from modelopt_cli.settings import Setting

Checkpoints = Annotated[
    list[Path],
    typer.Argument(metavar="CHECKPOINT...", help="Checkpoints of any kind, and modelopt files."),
]
Baseline = Annotated[
    Path | None,
    Setting(
        "Checkpoint that the others are compared with.",
        metavar="CHECKPOINT",
        default="the first",
        title=EvalOptions.title,
    ),
]
TargetModel = Annotated[
    Path | None,
    Setting(
        "The only file that is held against the limits.",
        metavar="CHECKPOINT",
        default="all but the baseline",
        title=Gates.title,
        older=("--judge",),
        advanced=True,
    ),
]
ForceExport = Annotated[bool, Setting("Replace files named by --export if they exist.", title=options.OUTPUT)]
Rehearse = Annotated[
    bool,
    Setting(
        "Send a few samples of --data through each file to see if it can be measured; measure nothing.",
        title=options.OUTPUT,
    ),
]


def evaluate(
    console: Console,
    checkpoints: Checkpoints,
    network: options.NetworkOptions,
    image: PreprocessOverrides,
    measure: EvalOptions,
    gates: Gates,
    target_model: TargetModel = None,
    baseline: Baseline = None,
    export: options.Export = (),
    force: ForceExport = False,
    dry_run: Rehearse = False,
) -> Work:
    """Compare size, accuracy and speed with a baseline.

    Example: modelopt eval resnet18.pth resnet18-int8.safetensors --data val/ --max-drop 1
    """
    reader = Reader()
    request = options.read_request(reader, network, image, measure, gates)
    exports = options.read_exports(reader, export, measured=not dry_run)
    paths, index = with_baseline(checkpoints, baseline)
    target = paths.index(target_model) if target_model in paths else None
    if target_model is not None:
        reader.check(
            target is not None, "--target-model", f"{target_model} is not one of the files to measure"
        )
        reader.check(target != index, "--target-model", f"{target_model} is the baseline itself")
        reader.check(bool(request.gates), "--target-model", "has no meaning without a limit")
    reader.finish()
    options.check_exports(exports, force)
    if not dry_run:
        request.require_limits(len(paths))

    def rehearse() -> None:
        from modelopt_cli.api import EvalRequest
        from modelopt_cli.api.rehearsal import rehearse_files

        rehearse_files(EvalRequest(paths=paths, on_note=console.note, **request.keywords(index, target)))
        console.result(f"all {len(paths)} files can be measured")

    def work() -> None:
        from modelopt_cli import api

        with console.progress() as progress:
            evaluation = api.evaluate_files(
                api.EvalRequest(
                    paths=paths,
                    on_note=console.note,
                    progress=progress,
                    **request.keywords(index, target),
                )
            )
        show_evaluation(console, evaluation, exports, force=force)

    given = request.network
    return options.checked(rehearse if dry_run else work, paths, arch=given.arch, data=[given.data])


def with_baseline(checkpoints: list[Path], baseline: Path | None) -> tuple[list[Path], int]:
    """The files to measure, and the index of the baseline; one that was not named before comes first."""
    if baseline is None:
        return checkpoints, 0
    if baseline in checkpoints:
        return checkpoints, checkpoints.index(baseline)
    return [baseline, *checkpoints], 0
