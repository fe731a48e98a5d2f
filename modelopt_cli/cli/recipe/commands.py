"""What the commands of modelopt take, as far as a recipe may say it; their own parsers read every value."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from typer.exceptions import TyperException

from modelopt_cli.cli.console import Console
from modelopt_cli.cli.failures import explain
from modelopt_cli.cli.groups import Work, options_of
from modelopt_cli.cli.options import GATES, MEASURING, OUTPUT
from modelopt_cli.cli.recipe.document import Options, Value
from modelopt_cli.cli.values import Reader
from modelopt_cli.settings import did_you_mean

_OURS = {"no_eval", "run", "resume", "checkpoints", "baseline", "judge"}  # what a recipe says otherwise
_OF_ONE = {"curve"}  # written beside the steps, each would draw over the one before it
_BOTH = {"data_batch_size"}  # is also that of looking at data to calibrate


class Commands:
    """What the commands of modelopt take, and reading command lines with their own parsers.

    Args:
        commands: click's commands by name.
        console: what they are to print to.
    """

    def __init__(self, commands: Mapping[str, Any], console: Console) -> None:
        self._commands, self._console = commands, console
        self.steps = [name for name in commands if {"output", "no_eval"} <= self._names(name)]

    def starts_from_nothing(self, verb: str) -> bool:
        """Whether it needs no checkpoint."""
        return not any(p.name == "checkpoint" and p.required for p in self._commands[verb].params)

    def takes(self, verb: str, name: str) -> bool:
        """Whether it has a parameter of that name."""
        return name in self._names(verb)

    def own(self, verb: str) -> dict[str, Any]:
        """The parameters that a step may be given, by each long name of theirs."""
        names = ((name, p) for p in self._settable(verb) for name in (*p.opts, *p.secondary_opts))
        return {name.removeprefix("--"): p for name, p in names if name.startswith("--")}

    def shared(self, verb: str) -> dict[str, Any]:
        """Those that may stand beside the steps, by the one name that means the same to every command.

        ``batch-size``, say, is that of training to some, and to others a second name of latency's.
        """
        return {str(p.name).replace("_", "-"): p for p in self._settable(verb) if not p.hidden}

    def words(self, reader: Reader, verb: str, options: Options, known: Mapping[str, Any]) -> list[str]:
        """Options as arguments of ``verb``."""
        context = self._commands[verb].make_context(verb, [], resilient_parsing=True)
        words: list[str] = []
        for name, value in options.items():
            if name not in known:
                hint = did_you_mean(name, known)
                if name in self.shared("eval"):
                    hint = "write it beside the steps, for the comparison at the end"
                reader.check(False, f"'{name}'", f"is no option of {verb}" + (f"; {hint}" if hint else ""))
                continue
            try:
                words += _argument(self._commands[verb], context, known[name], name, value)
            except ValueError as error:
                reader.check(False, f"'{name}'", str(error))
            except TyperException as error:
                reader.note(explain(error).line or "")
        return words

    def shared_words(self, verb: str, options: Options) -> list[str]:
        """Those of ``options`` that ``verb`` shares with others, which have been checked, as arguments."""
        known = self.shared(verb)
        return self.words(Reader(), verb, {k: v for k, v in options.items() if k in known}, known)

    def work(self, arguments: Sequence[str], *, silent: bool = False) -> Work:
        """Read a command line, and return the work it asks for; raises what its command raises."""
        command, own = self._commands[arguments[0]], copy.copy(self._console)
        own.silent = own.silent or silent
        with command.make_context(arguments[0], list(arguments[1:]), obj=own) as context:
            work: Work = command.invoke(context)
        return work

    def _names(self, verb: str) -> set[str]:
        return {p.name for p in self._commands[verb].params}

    def _settable(self, verb: str) -> Iterator[Any]:
        """Only the comparison at the end measures and has limits, and the runner says where things go."""
        left_out = {OUTPUT} if verb == "eval" else {OUTPUT, GATES, MEASURING}
        for p in self._commands[verb].params:
            fine = p.rich_help_panel not in left_out or p.name in _BOTH
            if p.param_type_name == "option" and fine and p.name not in _OURS | _OF_ONE:
                yield p


def _argument(command: Any, context: Any, parameter: Any, name: str, value: Value) -> list[str]:
    """``name: value`` as arguments; raises ValueError or TyperException."""
    option, values = f"--{name}", (value,) if isinstance(value, str) else value
    if parameter.is_flag:
        if value not in ("true", "false"):
            raise ValueError("is either true or false")
        other = parameter.secondary_opts if option in parameter.opts else parameter.opts
        return [option] if value == "true" else other[-1:]
    if not values or "" in values:
        raise ValueError("needs a value")
    if len(values) > 1 and not parameter.multiple:
        raise ValueError("takes one value")
    if (field := options_of(command).get(parameter.name)) is not None:
        for text in values:
            field.read(text)
    else:
        parameter.process_value(context, values if parameter.multiple else values[0])
    return [word for text in values for word in (option, text)]
