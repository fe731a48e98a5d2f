"""``--arch``: from a spec to something that builds the network and knows what it takes.

Where networks come from is one literal table, ``SOURCES``.
"""

import copy
import dataclasses
from typing import Any
from urllib.parse import parse_qsl

from torch import nn
from torch.nn.parameter import is_lazy

from modelopt_cli.checkpoint.arch import Architecture, ArchitectureSource, ArchSpec, Value
from modelopt_cli.checkpoint.builtin import BUILTIN
from modelopt_cli.checkpoint.huggingface_networks import HUGGINGFACE
from modelopt_cli.checkpoint.timm_networks import TIMM
from modelopt_cli.checkpoint.torchvision_networks import TORCHVISION
from modelopt_cli.errors import ArchitectureError, a_or_an
from modelopt_cli.program.input_spec import InputSpec
from modelopt_cli.settings import option
from modelopt_cli.text import short
from modelopt_cli.user_code import call, load_callable


def _user(spec: ArchSpec) -> Architecture:
    """A network of the user's own code, or a copy of one that it holds ready; nothing says what it takes."""
    target = load_callable(spec.place, spec.name, ArchitectureError)

    def build() -> nn.Module:
        make = (lambda **_: copy.deepcopy(target)) if isinstance(target, nn.Module) else target
        built = call(make, spec.options, spec.text, ArchitectureError, "building it failed")
        _require_module(built, spec)
        return built  # type: ignore[no-any-return]

    return Architecture(spec.text, build, None)


def _require_module(built: Any, spec: ArchSpec) -> None:
    if not isinstance(built, nn.Module):
        raise ArchitectureError(
            f"{spec.name} returned {a_or_an(type(built).__name__)}, not a torch.nn.Module",
            where=short(spec.text),
        )
    for name, tensor in (*built.named_parameters(), *built.named_buffers()):
        if is_lazy(tensor):
            raise ArchitectureError(
                f"{spec.name} returned a network whose {short(name)} has no shape yet",
                where=short(spec.text),
                hint="run it once on a sample before returning it, or use layers that are not lazy",
            )


SOURCES: dict[str, ArchitectureSource] = {
    "torchvision": TORCHVISION,
    "timm": TIMM,
    "builtin": BUILTIN,
    "hf": HUGGINGFACE,
    "file": ArchitectureSource("FILE.py:CALLABLE", _user, code=True),
    "module": ArchitectureSource("package.module:CALLABLE", _user, code=True),
}
"""Name of a source, which a spec starts with unless it names the user's code, to its row."""

*_OTHERS, _LAST = (source.form for source in SOURCES.values())
FORMS = f"{', '.join(_OTHERS)} or {_LAST}"

# What a spec found in a file may set: numbers and switches of a network's shape, by any library's name,
# and strings from a literal list. Anything else (``checkpoint_path``, ``weights``) could read files.
_FOUND_NUMBERS = frozenset(
    {
        "num_classes", "in_channels", "in_chans", "width", "width_mult", "image_size", "img_size",
        "output_stride", "dropout", "attention_dropout", "stochastic_depth_prob", "drop_rate",
        "drop_path_rate", "aux_logits", "aux_loss", "transform_input", "init_weights",
    }
)  # fmt: skip
_FOUND_STRINGS = {"global_pool": frozenset({"", "avg", "max", "avgmax", "catavgmax", "fast", "token", "map"})}
_FOUND_LARGEST = 4096

_LITERALS: dict[str, Value] = {"true": True, "false": False, "none": None}


def resolve(spec: str, input_spec: InputSpec | None = None) -> Architecture:
    """The architecture a spec names.

    Args:
        spec: ``torchvision:NAME``, ``timm:NAME``, ``builtin:NAME``, ``hf:FOLDER``, ``FILE.py:CALLABLE`` or
            ``package.module:CALLABLE``, with ``?name=value&name=value`` for its arguments.
        input_spec: what the user says a sample looks like; wins over what the architecture implies.

    Raises:
        ArchitectureError: unknown, malformed, or the user's code failed.
        EnvironmentFailure: timm or transformers is asked for and not installed.
    """
    parsed = parse_spec(spec)
    architecture = SOURCES[parsed.source].resolve(parsed)
    return architecture if input_spec is None else dataclasses.replace(architecture, input=input_spec)


def parse_spec(text: str) -> ArchSpec:
    """Split a spec into source, place, name and options.

    Raises:
        ArchitectureError: it has none of the forms.
    """
    target, mark, query = text.partition("?")
    place, colon, name = target.partition(":")
    if place not in SOURCES or SOURCES[place].code:  # the path of a file may have a colon, too
        place, colon, name = target.rpartition(":")
    if not colon and target.endswith(".py"):
        place, name = target, ""
    elif not colon or not place or not name:
        problem = f"{option('arch')} '{short(text)}' is none of {FORMS}"
        raise ArchitectureError(problem, hint=_library_hint(target, text))
    options = _options(query, text) if mark else {}
    if place in SOURCES and not SOURCES[place].code:
        return ArchSpec(text, place, "", name, options)
    return ArchSpec(text, "file" if place.endswith(".py") else "module", place, name, options)


def _library_hint(name: str, text: str) -> str | None:
    found = next((place for place, source in SOURCES.items() if name in source.names()), None)
    return f"did you mean {found}:{short(text)}?" if found else None


def names_library(text: str | None) -> bool:
    """True if a spec names a network of a library's or ours, rather than the user's own code or folder."""
    try:
        source = None if text is None else SOURCES[parse_spec(text).source]
        return source is not None and not source.code and not source.local
    except ArchitectureError:
        return False


def folder_of(text: str) -> str | None:
    """The folder on this machine that a spec names as its network; None where it names none."""
    try:
        spec = parse_spec(text)
    except ArchitectureError:
        return None
    return spec.name if SOURCES[spec.source].local else None


def published_top1(text: str) -> float | None:
    """The lowest top-1 on ImageNet, in percent, that is published for an architecture; None if none is."""
    spec = parse_spec(text)
    return SOURCES[spec.source].published_top1(spec)


def check_found_spec(text: str, largest: int, where: str) -> None:
    """Refuse a spec that was found in a file unless all it can do is to build a network of bounded size.

    Args:
        text: the spec.
        largest: the longest side of the file's tensors, which bounds what a number may ask for.
        where: the file, for the message.

    Raises:
        ArchitectureError: it names the user's code, or an option that is not on the list of those whose
            values are plain numbers, switches and known words.
    """
    spec = parse_spec(text)
    hint = f"if you trust it, name '{short(text)}' yourself"
    if SOURCES[spec.source].code:
        raise ArchitectureError("names code as its architecture, which was not run", where=where, hint=hint)
    if SOURCES[spec.source].local:
        raise ArchitectureError("names a folder as its architecture, not followed", where=where, hint=hint)
    for name, value in spec.options.items():
        if not _may_be_found(name, value, max(largest, _FOUND_LARGEST)):
            problem = f"its architecture sets '{short(name)}', which is not taken from a file"
            raise ArchitectureError(problem, where=where, hint=hint)


def _may_be_found(name: str, value: Value, largest: int) -> bool:
    if isinstance(value, str):
        return value in _FOUND_STRINGS.get(name, ())
    return name in {*_FOUND_NUMBERS, *_FOUND_STRINGS} and (value is None or 0 <= value <= largest)


def _options(query: str, text: str) -> dict[str, Value]:
    try:
        if not query:
            raise ValueError("nothing after the question mark")
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True, max_num_fields=64)
    except ValueError as error:
        raise ArchitectureError(
            f"{option('arch')} '{short(text)}': the part after '?' is not name=value&name=value"
        ) from error
    options: dict[str, Value] = {}
    for key, value in pairs:
        if not key.isidentifier() or key in options:
            why = "is given twice" if key in options else "is not a name"
            raise ArchitectureError(f"{option('arch')} '{short(text)}': option '{short(key)}' {why}")
        options[key] = _literal(value)
    return options


def _literal(value: str) -> Value:
    if value.lower() in _LITERALS:
        return _LITERALS[value.lower()]
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
