"""``modelopt run``: a recipe in, the files of its steps and one table out."""

import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modelopt_cli.cli import options
from modelopt_cli.cli.console import Console
from modelopt_cli.cli.groups import Work
from modelopt_cli.cli.values import Reader
from modelopt_cli.errors import UsageError
from modelopt_cli.settings import Setting

if TYPE_CHECKING:
    from modelopt_cli.cli.recipe.commands import Commands
    from modelopt_cli.cli.recipe.document import Recipe, Value
    from modelopt_cli.cli.recipe.plan import RecipePlan


def show_schema(context: typer.Context, wanted: bool) -> None:
    """Print the schema and end, if that is wanted."""
    if wanted:
        from modelopt_cli.cli.recipe.commands import Commands
        from modelopt_cli.cli.recipe.schema import recipe_schema

        assert context.parent is not None
        commands = context.parent.command.commands  # type: ignore[attr-defined]
        context.obj.result_json(recipe_schema(Commands(commands, context.obj)))
        raise typer.Exit


_output = partial(Setting, title=options.OUTPUT)
_recipe = partial(Setting, title="In place of what the recipe says")

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML; see docs/recipes.md.")]
Checkpoint = Annotated[str | None, _recipe("Checkpoint that the first step starts from.", metavar="FILE")]
Data = Annotated[str | None, _recipe("Data to evaluate on, as in eval.", metavar="SPEC", shared=True)]
Seed = Annotated[str | None, _recipe("Seed of everything random.", metavar="N", shared=True)]
Threads = Annotated[str | None, _recipe("CPU threads.", metavar="N", shared=True)]
Device = Annotated[str | None, _recipe("Device to run on.", metavar="cpu|cuda|cuda:N", shared=True)]
Settings = Annotated[
    tuple[str, ...],
    _recipe(
        "Any option; STEP is the step's number, or its verb if no other has it; may be repeated.",
        flags=("--set",),
        metavar="[STEP.]KEY=VALUE",
    ),
]
Output = Annotated[
    str | None, _recipe("The file that the last step writes.", flags=("-o", "--output"), metavar="FILE")
]
Resume = Annotated[bool, _output("Do not repeat the steps that are finished, or start if there are none.")]
Force = Annotated[bool, _output("Replace what exists: the output, the files of steps, exports.")]
Schema = Annotated[
    bool,
    typer.Option(
        "--schema",
        callback=show_schema,
        is_eager=True,
        help="Print a JSON schema of recipes, for editors, and exit.",
        rich_help_panel=options.OUTPUT,
    ),
]
DryRun = Annotated[bool, _output("Check the recipe and print its command lines; do nothing.")]


def run(
    console: Console,
    context: typer.Context,
    recipe: RecipeFile,
    checkpoint: Checkpoint = None,
    data: Data = None,
    seed: Seed = None,
    threads: Threads = None,
    device: Device = None,
    settings: Settings = (),
    output: Output = None,
    force: Force = False,
    delete_on_fail: options.DeleteOnFail = False,
    resume: Resume = False,
    dry_run: DryRun = False,
    export: options.Export = (),
    schema: Schema = False,
) -> Work:
    """Run a recipe: several steps, and one table of all.

    Example: modelopt run configs/deep-compression.yaml -o small.safetensors
    """
    from modelopt_cli.cli.recipe.commands import Commands
    from modelopt_cli.cli.recipe.document import read_recipe

    reader = Reader()
    exports = options.read_exports(reader, export, measured=not dry_run)
    overrides = {"checkpoint": checkpoint, "output": output, "data": data}
    overrides |= {"seed": seed, "threads": threads, "device": device}
    read = read_recipe(reader, recipe).override(reader, settings)
    read = replace(read, options=read.options | {k: v for k, v in overrides.items() if v is not None})
    assert context.parent is not None
    commands = Commands(context.parent.command.commands, console)  # type: ignore[attr-defined]
    plan = _plan(reader, read, commands)
    reader.finish(str(recipe))
    options.check_exports(exports, force)
    if options.of_several():
        hint = "run the lines that --dry-run prints"
        raise UsageError("a recipe runs in one process, not under torchrun", hint=hint)
    if dry_run:
        return partial(_print, console, plan)
    work = partial(_run, console, commands, plan, exports, resume, force)
    return options.undone(work, delete_on_fail, plan.steps[-1].output)


def _plan(reader: Reader, recipe: "Recipe", commands: "Commands") -> "RecipePlan":
    """The recipe's command lines, checked."""
    from modelopt_cli.cli.recipe.plan import make_plan

    options = dict(recipe.options)
    source, output = (_path(reader, name, options.pop(name, None)) for name in ("checkpoint", "output"))
    reader.check(output is not None, "output", "there is no file to write; name it with 'output:' or -o")
    if source is not None:
        reader.check(source.exists(), "checkpoint", f"there is no {source}")
    return make_plan(reader, replace(recipe, options=options), commands, source, output or Path("output"))


def _path(reader: Reader, name: str, value: "Value | None") -> Path | None:
    path = Path(value) if isinstance(value, str) else Path()
    fine = value is None or (path.name not in ("", "..") and path.suffix != ".steps")
    reader.check(fine, name, "name a file, not one that ends in .steps")
    return path if value is not None and fine else None


def _print(console: Console, plan: "RecipePlan") -> None:
    """The commands that would run."""
    lines = [*(line.arguments() for line in plan.steps), plan.evaluation]
    if console.json:
        console.result_json({"schema_version": 1, "commands": [["modelopt", *line] for line in lines]})
        return
    if len(plan.steps) > 1:
        console.result(shlex.join(["mkdir", "-p", str(plan.folder)]))
    for line in lines:
        console.result(shlex.join(["modelopt", *line]))


def _run(
    console: Console,
    commands: "Commands",
    plan: "RecipePlan",
    exports: tuple[Path, ...],
    resume: bool,
    force: bool,
) -> None:
    """Do what is not finished, and compare all."""
    from modelopt_cli.cli.recipe.execute import execute

    _rehearse(plan)
    execute(plan, commands, console, resume=resume, force=force)
    more = [word for path in exports for word in ("--export", str(path))]
    more += ["--json"] * console.json + ["--force"] * force
    commands.work([*plan.evaluation, *console.flags(), *more])()


def _rehearse(plan: "RecipePlan") -> None:
    """Refuse what the comparison at the end could not judge, before the first step."""
    from modelopt_cli.api import EvalRequest
    from modelopt_cli.api.rehearsal import rehearse_files

    first = plan.steps[0].source
    rehearse_files(EvalRequest(paths=[] if first is None else [first], **plan.measuring.keywords()))
