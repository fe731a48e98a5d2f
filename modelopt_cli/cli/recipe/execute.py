"""Doing what is not finished of a recipe's steps."""

import shlex
from dataclasses import replace

from modelopt_cli.artifact import check_output
from modelopt_cli.checkpoint.folder import digest_of
from modelopt_cli.cli.console import Console
from modelopt_cli.cli.failures import Terminated
from modelopt_cli.cli.recipe.commands import Commands
from modelopt_cli.cli.recipe.plan import RecipePlan
from modelopt_cli.cli.recipe.record import Entry, Record, digest


def execute(plan: RecipePlan, commands: Commands, console: Console, *, resume: bool, force: bool) -> None:
    """Run the steps of a recipe, but for those that ``resume`` finds finished.

    Raises:
        UsageError: an earlier run is there, and neither ``resume`` nor ``force`` says what becomes of it.
        OutputError: a step would write where it must not, or another process runs this recipe.
        ModeloptError: of the step in which it happened; KeyboardInterrupt and SIGTERM likewise.
    """
    source, last = plan.steps[0].source, len(plan.steps) - 1
    inputs = [] if source is None else [source]
    with Record(plan.folder, resume=resume, force=force) as record:
        for line in plan.steps:
            check_output(line.output, True, inputs)
        sha256 = digest(source) if source is not None else None
        for step, line in enumerate(plan.steps):
            wanted = Entry.of(line, sha256)
            sha256 = record.result(step, wanted, line.output)
            progress = f"step {step + 1} of {len(plan.steps)}"
            if sha256 is not None:
                console.note(f"{progress} is finished: {line.output}")
                continue
            check_output(plan.steps[last].output, force, inputs)  # now, not after hours
            console.note(f"{progress}: {shlex.join(['modelopt', *line.arguments()])}")
            known = record.entry(step)
            more = ["--force"] * (force or (known is not None and step != last))
            over = force and known is not None and not known.same_work(wanted)
            trains = "--epochs" in line.options or not commands.tunes(line.verb)
            more += ["--resume"] * (resume and not over and trains and commands.takes(line.verb, "resume"))
            record.put(step, wanted)
            _do(commands, line.arguments(*console.flags(), *more), progress)
            sha256 = digest_of([line.output])
            record.put(step, replace(wanted, sha256=sha256))


def _do(commands: Commands, arguments: list[str], step: str) -> None:
    """One step; what ends it says which one it was."""
    try:
        commands.work(arguments)()
    except BaseException as error:
        if "--" in (getattr(error, "hint", None) or ""):
            error.add_note(
                f"options of a step stand in the recipe, or behind --set {arguments[0]}.NAME=VALUE"
            )
        error.add_note(f"this was {step} ({arguments[0]})")
        told = any("--resume" in note for note in error.__notes__)
        if isinstance(error, (KeyboardInterrupt, Terminated)) and not told:
            error.add_note("go on with the same command and --resume")
        raise
