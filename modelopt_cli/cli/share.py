"""``modelopt share``: a checkpoint in, a file of few distinct values and the table out."""

from modelopt_cli.cli import options
from modelopt_cli.cli.console import Console
from modelopt_cli.cli.curve import check_curve, draw_curve
from modelopt_cli.cli.groups import Work
from modelopt_cli.cli.results import show_shared
from modelopt_cli.cli.values import Reader


def share(
    console: Console,
    checkpoint: options.Checkpoint,
    method: options.ShareOptions,
    training: options.FineTuneOptions,
    network: options.NetworkOptions,
    run: options.RunOptions,
    measure: options.MeasureTrainedOptions,
    gates: options.GateOptions,
    no_eval: options.NoEval = False,
    output: options.Output = None,
    code: options.Code = "entropy",
    force: options.Force = False,
    delete_on_fail: options.DeleteOnFail = False,
    dry_run: options.DryRun = False,
    export: options.Export = None,
) -> Work:
    """Share the weights of a checkpoint, and show what that cost.

    Example: modelopt share resnet18.pth --bits auto --ratio 12 --calib train/ --data val/
    """
    reader = Reader()
    config = method.read(reader, gates.max_drop)
    how = training.read(reader)
    reader.check(bool(how) or method.tune == options.TUNINGS[0], "--tune", "has no meaning without --epochs")
    request = options.read_request(reader, network, run, measure, gates)
    if config["max_drop"] is not None and (no_eval or network.data is None):
        # It is the budget, met on the calibration data, and there is nothing to judge the result by.
        request.gates.pop("max_drop")
    exports = options.read_exports(reader, export, measured=not (no_eval or dry_run))
    options.read_curve(reader, training, dry_run)
    coding = options.read_code(reader, code)
    reader.finish()
    options.check_exports(exports, force)

    from modelopt_cli.methods.share.config import ShareConfig

    settings = ShareConfig(**config)
    if not settings.automatic:
        settings.size  # noqa: B018 -- raises where nothing says how many, before the checkpoint is read
    asked = options.training_request(training, how) if how else None
    target = options.chosen_output(output, checkpoint, "shared")
    check_curve(training.curve, asked, [target], [checkpoint], force)

    def work() -> None:
        from modelopt_cli import api

        console.silent = options.beside_another()
        with console.progress() as progress:
            outcome = api.share(
                checkpoint,
                target,
                config=settings,
                training=asked,
                calibration=method.calib or training.train,
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
        show_shared(console, outcome, exports, force=force)

    return options.undone(work, delete_on_fail, target)
