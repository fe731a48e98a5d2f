"""The options of commands that a recipe may set; the commands' own parsers read every value."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from modelopt_cli.cli.console import Console
from modelopt_cli.cli.groups import Work, signature_of
from modelopt_cli.cli.options import OUTPUT, RequestOptions, read_request
from modelopt_cli.cli.recipe.document import Options, Value
from modelopt_cli.cli.typer_options import key_of
from modelopt_cli.cli.values import Reader
from modelopt_cli.measure.config import EvalOptions, Gates
from modelopt_cli.settings import Field, boolean, nearest
from modelopt_cli.training.config import TrainConfig

_OURS = {"no_eval", "run_dir", "resume", "baseline", "target_model"}  # what a recipe says otherwise
_OF_ONE = {"curve"}  # written next to the steps, each would draw over the one before it
_BOTH = {"data_batch_size"}  # is also that of looking at data to calibrate


class Commands:
    """The commands' options, and reading of command lines with the commands' own parsers.

    Args:
        commands: click's commands by name.
        console: what they are to print to.
    """

    def __init__(self, commands: Mapping[str, Any], console: Console) -> None:
        self._commands, self._console = commands, console
        self._signatures = {name: signature_of(command) for name, command in commands.items()}
        self._noted: set[str] = set()
        self.steps = [
            name for name, own in self._signatures.items() if {"output", "no_eval"} <= own.fields.keys()
        ]

    def starts_from_nothing(self, verb: str) -> bool:
        """True if it needs no checkpoint."""
        return not any(p.name == "checkpoint" and p.required for p in self._commands[verb].params)

    def takes(self, verb: str, name: str) -> bool:
        """True if it has an option of that name."""
        return name in self._signatures[verb].fields

    def tunes(self, verb: str) -> bool:
        """True if it trains only where a number of epochs is given."""
        epochs = self._signatures[verb].fields.get("epochs")
        return epochs is not None and not epochs.initial

    def of_training(self, verb: str) -> set[str]:
        """Names of its options that mean nothing without training; the data may be calibrated on, too."""
        fields = self._signatures[verb].fields.items()
        return {name.replace("_", "-") for name, field in fields if field.title == TrainConfig.title} - {
            "train"
        }

    def own(self, verb: str) -> dict[str, Field]:
        """The options that a step may be given, by each long spelling of theirs, older ones included.

        Limits are among them where they are a budget that the step itself keeps.
        """
        signature = self._signatures[verb]
        settable = {*self._settable(verb), *(signature.fields[name] for name in signature.budgets)}
        spellings = signature.spellings().items()
        return {flag[2:]: field for flag, field in spellings if flag[:2] == "--" and field in settable}

    def shared(self, verb: str) -> dict[str, Field]:
        """Options that may stand next to the steps, by the one name that means the same to every command.

        ``batch-size``, say, is that of training to some, and was one of latency's to others.
        """
        names = {field.flag[2:]: field for field in self._settable(verb)}
        current = {key_of(field) for own in self._signatures.values() for field in own.fields.values()}
        for field in list(names.values()):
            for flag in field.older:
                if flag[2:].replace("-", "_") not in current:
                    names[flag[2:]] = field
        return names

    def words(self, reader: Reader, verb: str, options: Options, known: Mapping[str, Field]) -> list[str]:
        """Options as arguments of ``verb``."""
        words: list[str] = []
        twice = named_twice(reader, options, known)
        for name, value in options.items():
            if name in twice:
                continue
            if (field := known.get(name)) is None:
                hint = nearest_name(name, known)
                if name in self.shared("eval"):
                    hint = "write it next to the steps, for the comparison at the end"
                reader.check(False, f"'{name}'", f"is no option of {verb}" + (f"; {hint}" if hint else ""))
                continue
            try:
                words += _argument(field, name, value)
            except ValueError as error:
                reader.check(False, f"'{name}'", str(error))
            if f"--{name}" in field.older and name not in self._noted:
                self._noted.add(name)
                self._console.note(f"'{name}' is now '{field.flag[2:]}'; the next version takes only that")
        return words

    def shared_words(self, verb: str, options: Options) -> list[str]:
        """The ``options`` that ``verb`` shares with others, which have been checked, as arguments."""
        known = self.shared(verb)
        return self.words(Reader(), verb, {k: v for k, v in options.items() if k in known}, known)

    def measuring(self, options: Options) -> RequestOptions:
        """Network, data, measuring and limits of the comparison at the end, whatever it will compare."""
        words = ["any file", *self.shared_words("eval", options)]
        with self._commands["eval"].make_context("eval", words, obj=self._console) as context:
            groups = self._signatures["eval"].arguments(context.params, environment=False, notes=[])
        return read_request(Reader(), *(groups[name] for name in ("network", "image", "measure", "gates")))

    def work(self, arguments: Sequence[str]) -> Work:
        """Read a command line, and return the work it asks for; raises what its command raises."""
        command, own = self._commands[arguments[0]], copy.copy(self._console)
        with command.make_context(arguments[0], list(arguments[1:]), obj=own) as context:
            work: Work = command.invoke(context)
        return work

    def _settable(self, verb: str) -> Iterator[Field]:
        """Only the comparison at the end measures and has limits, and the runner says where things go."""
        left_out = {OUTPUT, Gates.title, EvalOptions.title} if verb in self.steps else {OUTPUT}
        for key, field in self._signatures[verb].fields.items():
            if (field.title not in left_out or key in _BOTH) and key not in _OURS | _OF_ONE:
                yield field


def nearest_name(name: str, known: Mapping[str, Field]) -> str | None:
    """A hint naming the option nearest to ``name``, as it is called today, or None."""
    near = nearest(name, known)
    return None if near is None else f"did you mean '{known[near].current(f'--{near}')[2:]}'?"


def named_twice(reader: Reader, names: Iterable[str], known: Mapping[str, Field]) -> set[str]:
    """Names of which others mean the same option: an older name, say, or one that starts with ``no-``.

    They are left with ``reader``.
    """
    seen: dict[str, str] = {}
    twice = set()
    for name in names:
        if name in known and (first := seen.setdefault(key_of(known[name]), name)) != name:
            reader.check(False, f"'{name}'", f"is another name of '{first}'; give one of the two")
            twice |= {first, name}
    return twice


def _argument(field: Field, name: str, value: Value) -> list[str]:
    """``name: value`` as arguments; raises ValueError."""
    values = (value,) if isinstance(value, str) else value
    if field.type is bool:
        if value not in ("true", "false"):
            raise ValueError("is either true or false")
        positive = boolean(str(value)) is not name.startswith("no-")
        return [field.flag] if positive else [f"--no-{field.flag[2:]}"] * field.negatable
    if not values or "" in values:
        raise ValueError("needs a value")
    if len(values) > 1 and not field.several:
        raise ValueError("takes one value")
    for text in values:
        field.read(text)
    return [word for text in values for word in (field.flag, text)]
