"""A recipe as it is written: YAML of one shape, whose every value is the text of an option.

The YAML is only taken apart, never constructed: no tag means anything, and a value stays as it was written,
so that ``2:4`` is not the number 124 and ``on`` not a truth.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from modelopt_cli.cli.values import Reader
from modelopt_cli.errors import UsageError
from modelopt_cli.regular import read_regular
from modelopt_cli.settings import did_you_mean

Value = str | tuple[str, ...]
Options = dict[str, Value]
"""Values by the long name of the option, with dashes."""

_LIMIT = 1 << 16  # bytes
_SCALAR = yaml.resolver.BaseResolver.DEFAULT_SCALAR_TAG
_SETTING = re.compile(r"(?:(?P<step>[^.=]+)\.)?(?P<key>[^.=]+)=(?P<value>.+)", re.DOTALL)


@dataclass(frozen=True)
class Step:
    """One step: a command, and the options it is given."""

    verb: str
    options: Options


@dataclass(frozen=True)
class Recipe:
    """A recipe.

    Attributes:
        steps: in order.
        options: what stands next to the steps.
    """

    steps: tuple[Step, ...]
    options: Options

    def override(self, reader: Reader, settings: Sequence[str]) -> "Recipe":
        """The recipe with ``[STEP.]KEY=VALUE`` in place of what was written.

        STEP is a number or a verb; what comes twice has two values.
        """
        shared: Options = {}
        own: list[Options] = [{} for _ in self.steps]
        for setting in settings:
            if (match := _SETTING.fullmatch(setting)) is None:
                reader.check(False, "--set", f"'{setting}' is not [STEP.]KEY=VALUE")
                continue
            key, value = match["key"].replace("_", "-"), match["value"]
            if match["step"] is None:
                _add(shared, key, value)
                continue
            matching = [i for i, step in enumerate(self.steps) if match["step"] in (str(i + 1), step.verb)]
            problem = f"{'no step' if not matching else 'more than one step'} is called '{match['step']}'"
            near = None if matching else did_you_mean(match["step"], [step.verb for step in self.steps])
            hint = near or f"give its number, 1 to {len(self.steps)}"
            reader.check(len(matching) == 1, "--set", f"{problem}; {hint}")
            if len(matching) == 1:
                _add(own[matching[0]], key, value)
        steps = (Step(step.verb, step.options | more) for step, more in zip(self.steps, own, strict=True))
        return Recipe(tuple(steps), self.options | shared)


def _add(options: Options, key: str, value: str) -> None:
    """Set an option, or give one that is set another value."""
    before = options.get(key, ())
    several = (before,) if isinstance(before, str) else before
    options[key] = (*several, value) if several else value


def read_recipe(reader: Reader, path: Path) -> Recipe:
    """Read a recipe; what is wrong with its parts is left with ``reader``.

    Raises:
        UsageError: it cannot be read, or is not a mapping with steps.
    """
    root = _parse(path)
    if not isinstance(root, yaml.MappingNode):
        raise UsageError("is not a recipe", where=str(path), hint="write 'steps:' and a list")
    entries = dict(_entries(reader, root))
    steps = entries.pop("steps", None)
    if not isinstance(steps, yaml.SequenceNode) or not steps.value:
        near = (f"'{key}': {hint}" for key in entries if (hint := did_you_mean(key, ["steps"])))
        raise UsageError("has no steps", where=str(path), hint=next(near, "write 'steps:' and a list"))
    return Recipe(
        tuple(step for node in steps.value if (step := _step(reader, node)) is not None),
        dict(_options(reader, entries)),
    )


def _parse(path: Path) -> yaml.Node | None:
    data = read_regular(path, UsageError, _LIMIT + 1)
    if len(data) > _LIMIT:
        raise UsageError(f"has more than {_LIMIT:,} bytes", where=str(path), hint="name a recipe")
    try:
        return yaml.compose(data.decode(), Loader=yaml.BaseLoader)
    except UnicodeDecodeError:
        raise UsageError("is not UTF-8 text", where=str(path)) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UsageError(f"{line}{problem}", where=str(path), hint="this is no valid YAML") from None
    except RecursionError:
        raise UsageError("is nested too deeply", where=str(path)) from None


def _entries(reader: Reader, node: yaml.MappingNode) -> Iterator[tuple[str, yaml.Node]]:
    """Keys, written with dashes, and values; a key that comes twice is refused."""
    seen = set()
    for key, value in node.value:
        name = str(key.value).replace("_", "-")
        reader.check(isinstance(key, yaml.ScalarNode), _line(key), "a key must be a word")
        reader.check(name not in seen, _line(key), f"'{name}' is given twice")
        seen.add(name)
        yield name, value


def _step(reader: Reader, node: yaml.Node) -> Step | None:
    """``verb`` alone, or ``verb: {options}``."""
    if isinstance(node, yaml.ScalarNode):
        return Step(node.value, {})
    if not isinstance(node, yaml.MappingNode) or len(node.value) != 1:
        reader.check(False, _line(node), "a step is one verb with its options, such as '- quantize: {}'")
        return None
    ((verb, options),) = node.value
    if isinstance(options, yaml.MappingNode):
        return Step(str(verb.value), dict(_options(reader, dict(_entries(reader, options)))))
    reader.check(options.value == "", _line(options), f"the options of '{verb.value}' are not 'name: value'")
    return Step(str(verb.value), {})


def _options(reader: Reader, entries: Mapping[str, yaml.Node]) -> Iterator[tuple[str, Value]]:
    for name, node in entries.items():
        if _is_text(node):
            yield name, node.value
        elif isinstance(node, yaml.SequenceNode) and all(map(_is_text, node.value)):
            yield name, tuple(item.value for item in node.value)
        else:
            reader.check(False, _line(node), f"'{name}' is neither a plain value nor a list of such")


def _is_text(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == _SCALAR


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"
