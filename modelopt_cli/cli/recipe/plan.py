"""Planning: from a recipe to command lines, all checked by the commands' parsers before the first runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from typer.exceptions import TyperException

from modelopt_cli.cli.failures import explain
from modelopt_cli.cli.options import RequestOptions
from modelopt_cli.cli.recipe.commands import Commands, named_twice, nearest_name
from modelopt_cli.cli.recipe.document import Options, Recipe
from modelopt_cli.cli.values import Reader
from modelopt_cli.errors import ModeloptError
from modelopt_cli.measure.config import Gates
from modelopt_cli.settings import did_you_mean

_DATA = ("data", "train", "val", "calibration", "calib")


@dataclass(frozen=True)
class Line:
    """The command line of a step.

    Attributes:
        verb: the command.
        options: what the recipe says, as arguments.
        source: the file it reads, if any.
        output: the file it writes.
    """

    verb: str
    options: tuple[str, ...]
    source: Path | None
    output: Path

    def arguments(self, *more: str) -> list[str]:
        """The whole line, without the name of the program."""
        source = [] if self.source is None else [str(self.source)]
        return [self.verb, *source, *self.options, "--no-eval", "-o", str(self.output), *more]


@dataclass(frozen=True)
class RecipePlan:
    """The command lines of a recipe, and where their files go.

    Attributes:
        folder: of what the steps before the last one write.
        steps: each reads what the one before has written.
        evaluation: the arguments of the ``eval`` that compares all files.
        measuring: what it measures and its limits, to see before the first step if it can.
    """

    folder: Path
    steps: tuple[Line, ...]
    evaluation: tuple[str, ...]
    measuring: RequestOptions


def make_plan(
    reader: Reader, recipe: Recipe, commands: Commands, checkpoint: Path | None, output: Path
) -> RecipePlan:
    """The command lines of a recipe; what is wrong with them is left with ``reader``."""
    folder = output.with_suffix(".steps")
    shared_options = _check_shared(reader, recipe, commands)
    lines: list[Line] = []
    source = checkpoint
    for number, step in enumerate(recipe.steps, 1):
        last = number == len(recipe.steps)
        target = output if last else folder / f"{number}-{step.verb}.safetensors"
        if step.verb not in commands.steps:
            hint = did_you_mean(step.verb, commands.steps) or f"it is one of {', '.join(commands.steps)}"
            reader.check(False, f"step {number}", f"'{step.verb}' cannot be a step; {hint}")
        else:
            problems = Reader()
            words = commands.words(problems, step.verb, step.options, commands.own(step.verb))
            _check_data(problems, step.options)
            shared = {name: value for name, value in shared_options.items() if name not in step.options}
            if commands.tunes(step.verb) and "epochs" not in {**shared, **step.options}:
                idle = commands.of_training(step.verb)
                shared = {name: value for name, value in shared.items() if name.replace("_", "-") not in idle}
            words = [*commands.shared_words(step.verb, shared), *words]
            lines.append(Line(step.verb, tuple(words), source, target))
            if source is None and not commands.starts_from_nothing(step.verb):
                hint = "name it with 'checkpoint:' or --checkpoint, or begin with train"
                problems.note(f"there is no checkpoint to start from; {hint}")
            _try(problems, commands, lines[-1].arguments())
            reader.take(problems, f"step {number} ({step.verb})")
        source = target
    files = [str(path) for path in (checkpoint, *(line.output for line in lines)) if path is not None]
    evaluation = _evaluation(reader, commands, shared_options, files)
    return RecipePlan(folder, tuple(lines), evaluation, commands.measuring(shared_options))


def _evaluation(
    reader: Reader, commands: Commands, shared_options: Options, files: list[str]
) -> tuple[str, ...]:
    """All files side by side; only the last one is held against the limits."""
    problems, known = Reader(), commands.shared("eval")
    limited = any(known[name].title == Gates.title for name in shared_options if name in known)
    words = commands.shared_words("eval", shared_options) + ["--target-model", *files[-1:]] * limited
    _try(problems, commands, ["eval", *files, *words])
    reader.take(problems, "eval")
    return ("eval", *files, *words)


def _check_shared(reader: Reader, recipe: Recipe, commands: Commands) -> Options:
    """The options next to the steps that can be used; what is wrong with the others is said once."""
    verbs = dict.fromkeys([*(step.verb for step in recipe.steps if step.verb in commands.steps), "eval"])
    known = {name: verb for verb in verbs for name in commands.shared(verb)}
    fields = {name: commands.shared(verb)[name] for name, verb in known.items()}
    _check_data(reader, recipe.options)
    twice = named_twice(reader, recipe.options, fields)
    fine = {}
    for name, value in recipe.options.items():
        if name in twice:
            continue
        if name not in known:
            hint = nearest_name(name, fields)
            reader.check(False, f"'{name}'", "is an option of no step here" + (f"; {hint}" if hint else ""))
        elif commands.words(reader, known[name], {name: value}, commands.shared(known[name])):
            fine[name] = value
    return fine


def _try(reader: Reader, commands: Commands, arguments: Sequence[str]) -> None:
    """Have the whole line read, if its parts are fine."""
    if not reader.wrong:
        try:
            commands.work(arguments)
        except (ModeloptError, TyperException) as error:
            reader.note(explain(error).line or "")


def _check_data(reader: Reader, options: Options) -> None:
    """Look whether all data can be there."""
    for name in _DATA:
        if isinstance(text := options.get(name), str) and text:
            reader.read(f"'{name}'", text, _data)


def _data(text: str) -> None:
    """Refuse data that cannot be there; raises ValueError."""
    from modelopt_cli.data.data_spec import parse_spec
    from modelopt_cli.errors import DataError

    try:
        spec = parse_spec(text)
    except DataError as error:
        raise ValueError(str(error)) from None
    if spec.is_missing:
        raise ValueError(f"{text}: there is no {spec.target}")
