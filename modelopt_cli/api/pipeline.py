"""The one way through a command: check, open, rehearse, work, compare, write, read back, measure."""

from dataclasses import replace

from modelopt_cli import artifact
from modelopt_cli.api.compressing import Compressing
from modelopt_cli.api.distilling import Distilling
from modelopt_cli.api.evaluating import compare
from modelopt_cli.api.network_data import with_own_folder
from modelopt_cli.api.opening import telling_why, without_graph
from modelopt_cli.api.parts_notes import PartsSummary
from modelopt_cli.api.rehearsal import after_writing
from modelopt_cli.api.request import Request
from modelopt_cli.api.result import Result
from modelopt_cli.api.training import TrainingWork
from modelopt_cli.api.work import Made, Work
from modelopt_cli.artifact.coding import require_code
from modelopt_cli.errors import UsageError
from modelopt_cli.kernels import require_device
from modelopt_cli.measure import Evaluation
from modelopt_cli.measure.latency import threads
from modelopt_cli.settings import option
from modelopt_cli.training.distributed import world

WORKS: dict[str, type[Work]] = {"distill": Distilling, "train": TrainingWork}
"""Commands that are more than a row of ``methods.method_table.METHODS``."""


def execute(request: Request) -> Result:
    """Do what a command asks for.

    Args:
        request: the command.

    Raises:
        InputError: a source, the data, an option or the output cannot be used; nothing is written.
        GateNotMet: the target cannot be reached, or nothing can be compressed; nothing is written.
        EnvironmentFailure: no space, no permission, an optional package.
    """
    request = with_own_folder(request.noting_once())
    work = WORKS.get(request.command, Compressing)(request)
    _check(work)
    rehearses = request.evaluate and (work.always_trains or not request.dry_run)
    with threads(request.options.threads):
        work.open()
        if work.opened.program is None:
            with telling_why(work.opened.without_graph):
                work.refuse_without_graph()
        work.settle_task()
        runs = work.opened.network is not None
        if rehearses and runs:
            work.rehearse()
        with without_graph(work.opened, request.on_note), work.training() as trainer:
            parts = PartsSummary.of(work.opened.program)
            made = work.make(trainer)
            if request.dry_run:
                return replace(work.finish(made, None), untraced=work.opened.untraced, captured_parts=parts)
            if rehearses and not runs:
                work.rehearse()  # only now: the method may have said more of what is missing
            result = replace(_written(work, made), untraced=work.opened.untraced, captured_parts=parts)
            if trainer is not None:
                trainer.run.close()
    if result.written is None or not request.evaluate:
        return result
    with after_writing(*work.outputs):
        return replace(result, evaluation=_measured(work))


def _check(work: Work) -> None:
    """Refuse what needs no file to be known."""
    request, training = work.request, work.request.training
    require_device(request.options.device)
    require_code(request.code)
    if request.gates and not request.evaluate:
        raise UsageError(
            "a gate needs the result to be measured",
            hint=f"leave out {option('evaluate', False)} or the gate",
        )
    work.check()
    if training is not None:
        training.require_fair(request.data)
    for path in work.outputs:
        if training is not None:
            training.require_apart(path, work.sources)
        artifact.check_suffix(path)
        if work.always_trains or not request.dry_run:
            artifact.check_output(path, request.force, work.sources)


def _written(work: Work, made: Made) -> Result:
    """The result once the files are written, which the main one of several processes does."""
    request = work.request
    if not world(request.options.device).main:
        return work.finish(made, None)
    result = work.finish(made, made.model.write(request.output, request.force, request.code))
    if made.scratch is None:
        return result
    model, path = made.scratch
    return replace(result, scratch=model.write(path, request.force, request.code))


def _measured(work: Work) -> Evaluation:
    """The outputs, read back from their files, next to what they were made from."""
    compared, measuring = work.compared([(path, work.read_back(path)) for path in work.outputs])
    compared = replace(compared, task=work.task)
    return compare(compared, replace(measuring, options=replace(measuring.options, baseline=0)))
