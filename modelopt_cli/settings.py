"""Settings: everything about an option is declared once, on a field of a frozen dataclass.

    @dataclass(frozen=True)
    class QuantizeConfig(Config, title="Quantizing"):
        scheme: Annotated[str, Setting("Numbers to compute with.", choices=SCHEMES)] = "int8"

From that declaration come the checks of values, the command line's option, its environment variable, the key
in a recipe, the recipe's JSON schema and the tables in ``docs/``. Modules with configs import no torch.
"""

import dataclasses
import math
import re
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from modelopt_cli.errors import UsageError
from modelopt_cli.option_names import flag_of
from modelopt_cli.option_names import naming_flags as naming_flags
from modelopt_cli.option_names import option as option
from modelopt_cli.option_types import as_python, is_of_type, not_of_type
from modelopt_cli.option_values import boolean as boolean
from modelopt_cli.option_values import did_you_mean as did_you_mean
from modelopt_cli.option_values import fraction as fraction
from modelopt_cli.option_values import help_of as help_of
from modelopt_cli.option_values import nearest as nearest
from modelopt_cli.option_values import not_one_of as not_one_of
from modelopt_cli.option_values import number as number
from modelopt_cli.option_values import out_of_bounds
from modelopt_cli.option_values import parse_device as parse_device
from modelopt_cli.option_values import row_named as row_named

CALIBRATION = "Calibration"
"""Title of the options that say what data a method looks at."""


@dataclass(frozen=True, eq=False)
class Setting:
    """An option, as it is declared on a field of a config.

    Attributes:
        help: one sentence that can be read alone.
        choices: the rows that may be named; a row is a text or has a text ``help``, and may have a pattern
            ``spelling`` where its name stands for many (``N:M`` for ``2:4``).
        least: smallest number allowed.
        most: largest number allowed.
        above: the number must be larger than this.
        below: the number must be smaller than this.
        metavar: the value in a usage line; by default what the type and the choices say.
        parse: makes a text the value; raises ValueError with what is wrong.
        title: group of options in the help; by default that of the config.
        advanced: shown by ``--help-all`` alone.
        flags: spellings on the command line; by default ``--name``, and ``--name/--no-name`` for what may be
            None or is True by default.
        older: spellings that still work, with a note; ``--name/--no-name`` for a flag with an opposite.
        shared: its environment variable may also be written without the command's name.
        default: the default in words, where None stands for something.
        suggest: makes the values that a shell offers, each with a description, where others are fine, too.
        of_layers: a value is a pattern for the names of a checkpoint's layers.
    """

    help: str
    _: KW_ONLY
    choices: Mapping[str, Any] | None = None
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    metavar: str | None = None
    parse: Callable[[str], Any] | None = None
    title: str | None = None
    advanced: bool = False
    flags: tuple[str, ...] = ()
    older: tuple[str, ...] = ()
    shared: bool = False
    default: str | None = None
    suggest: Callable[[], Mapping[str, str]] | None = None
    of_layers: bool = False


@dataclass(frozen=True, eq=False)
class Field:
    """A setting together with the field that it is declared on.

    Attributes:
        name: of the field.
        type: of its values, None aside.
        optional: None is a value too.
        initial: its default; ``dataclasses.MISSING`` where a value must be given.
        setting: its declaration.
        title: group of options in the help.
    """

    name: str
    type: Any
    optional: bool
    initial: Any
    setting: Setting
    title: str

    @property
    def flag(self) -> str:
        """The option's long spelling, such as ``--max-drop``."""
        long = [flag for flag in self.setting.flags if flag.startswith("--")]
        return long[0] if long else flag_of(self.name)

    @property
    def negatable(self) -> bool:
        """True for a flag with an opposite, ``--no-name``: it may be None, or is True by default."""
        return self.type is bool and self.initial is not False and not self.setting.flags

    @property
    def spellings(self) -> tuple[str, ...]:
        """All spellings on the command line, without older ones; the opposite of a flag comes last."""
        flags = self.setting.flags or (self.flag,)
        return (*flags, f"--no-{flags[0].removeprefix('--')}") if self.negatable else flags

    @property
    def older(self) -> tuple[str, ...]:
        """All older spellings on the command line."""
        return tuple(part for flag in self.setting.older for part in flag.split("/"))

    def current(self, flag: str) -> str:
        """The spelling that takes the place of one of ``older``; any other stays."""
        if flag not in self.older:
            return flag
        return self.spellings[-1] if self.negatable and flag.startswith("--no-") else self.flag

    @property
    def label(self) -> str:
        """The name to use in a message: the option's on the command line, else the argument's."""
        return option(self.flag.removeprefix("--").replace("-", "_"))

    @property
    def several(self) -> bool:
        """True if the option may be repeated."""
        args = get_args(self.type)
        return get_origin(self.type) is tuple and args[-1:] == (...,) and self.setting.parse is None

    @property
    def metavar(self) -> str:
        """The value in a usage line."""
        if self.setting.metavar is not None or self.setting.of_layers:
            return self.setting.metavar or "GLOB"
        if self.setting.choices is not None:
            return "|".join(self.setting.choices)
        kind = get_args(self.type)[0] if self.several else self.type
        return {int: "N", float: "X", Path: "FILE"}.get(kind, "TEXT")

    def read(self, text: str) -> Any:
        """The value that ``text`` stands for; raises ValueError with what is wrong."""
        value = self._parsed(text)
        if (problem := self.problem((value,) if self.several else value)) is not None:
            raise ValueError(problem)
        return value

    def problem(self, value: Any) -> str | None:
        """The fault of a value, or None."""
        if value is None and self.optional:
            return None
        by_name = self.setting.choices is not None and isinstance(value, str)
        problem = None if by_name else not_of_type(value, self.type)
        if self.setting.parse is not None and (isinstance(value, str) or (problem and self.type is str)):
            try:
                self.setting.parse(str(value))
            except ValueError as error:  # says more of what may be given than the type
                return str(error)
        if problem is not None:
            return problem
        for part in value if self.several else (value,):
            if (problem := self._problem(part)) is not None:
                return problem
        return None

    def converted(self, value: Any) -> Any:
        """The value of an argument in Python, where a text may stand for it as on the command line.

        One text or number is also a list of one, and numbers may be those of NumPy and torch. What cannot be
        read stays, and is a problem.
        """
        listed, value = get_origin(self.type) is tuple, as_python(value)
        try:
            if isinstance(value, str) and (
                self.setting.parse is not None or not is_of_type(value, self.type)
            ):
                value = self._parsed(value)
        except (TypeError, ValueError):
            return value
        if isinstance(value, list) and (listed or is_of_type(tuple(value), self.type)):
            return tuple(value)
        return (value,) if listed and is_of_type((value,), self.type) else value

    def _parsed(self, text: str) -> Any:
        kind = get_args(self.type)[0] if self.several else self.type
        if self.setting.parse is not None:
            return self.setting.parse(text)
        if kind is bool:
            return boolean(text)
        if kind is int:
            if not re.fullmatch(r"[+-]?\d{1,18}", text.strip(), re.ASCII):
                raise ValueError(f"'{text}' is not an integer")
            return int(text)
        if kind is float:
            return number(text)
        return text if get_origin(kind) is Literal else kind(text)

    def _problem(self, value: Any) -> str | None:
        setting = self.setting
        if setting.choices is not None:
            if row_named(value, setting.choices) is not None:
                return None
            if value in setting.choices:
                return f"write numbers in place of the letters of {value}"
            return not_one_of(value, setting.choices)
        if not isinstance(value, int | float):
            return None
        if not math.isfinite(value):
            return f"{value} is not a finite number"
        return out_of_bounds(value, setting.least, setting.above, setting.most, setting.below)


class Config:
    """Base of configs: frozen dataclasses, their fields ``Annotated`` with a ``Setting``.

    Making one checks it. A subclass says with ``conflicts`` which settings do not go together, each of which
    may be fine alone, and with ``title`` how its group of options is headed.

    Raises:
        UsageError: with all that is wrong.
    """

    title: ClassVar[str] = "Options"

    def __init_subclass__(cls, title: str | None = None) -> None:
        if title is not None:
            cls.title = title

    def __post_init__(self) -> None:
        for field in fields_of(type(self)):
            value = getattr(self, field.name)
            if field.several and isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        if wrong := problems(self):
            raise UsageError("; ".join(wrong))

    def conflicts(self) -> Iterable[str]:
        """One line for each contradiction between settings; asked only where each is fine alone."""
        return ()

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form, for the history."""
        return {
            field.name: list(value) if isinstance(value := getattr(self, field.name), tuple) else value
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
        }


def problems(config: Config) -> list[str]:
    """One line for each thing that is wrong with a config's values, or with their going together."""
    fields = fields_of(type(config))
    wrong = [
        f"{field.label}: {problem}"
        for field in fields
        if (problem := field.problem(getattr(config, field.name))) is not None
    ]
    return wrong or list(config.conflicts())


def fields_of(config: Any) -> tuple[Field, ...]:
    """The fields of a config that are settings, in order; others are no options."""
    return _fields_of(config)


@cache
def _fields_of(config: Any) -> tuple[Field, ...]:
    hints = get_type_hints(config, include_extras=True)
    fields = (
        field_of(field.name, hints[field.name], field.default, config.title)
        for field in dataclasses.fields(config)
    )
    return tuple(field for field in fields if field is not None)


def field_of(name: str, annotation: Any, initial: Any, title: str = Config.title) -> Field | None:
    """The field that an annotation declares, or None if it has no setting."""
    if get_origin(annotation) is not Annotated:
        return None
    hint, *notes = get_args(annotation)
    setting = next((note for note in notes if isinstance(note, Setting)), None)
    if setting is None:
        return None
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    own_kinds = [kind for kind in kinds if kind is not type(None)]
    own: Any = Union[tuple(own_kinds)]  # noqa: UP007
    return Field(name, own, len(own_kinds) < len(kinds), initial, setting, setting.title or title)
