"""Inert stand-ins for the objects that a pickle holds next to tensors, so that its weights can be read.

Training scripts save an ``argparse.Namespace`` or numpy scalars next to the weights, or the network itself.
torch's ``weights_only`` unpickler refuses a name it does not know; here each such name is mapped to a class
here that keeps its arguments and does nothing. No name in a file is looked up, imported or called.
"""

import _compat_pickle as renamed
import io
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch._weights_only_unpickler import _get_allowed_globals

Use = Literal["object", "mapping", "list"]
Global = tuple[Callable[..., Any], str]
"""A function or class, and the name under which the unpickler finds it."""

MODULE_CLASS = "modelopt_cli.module_class"
_MOST = 256  # names; the unpickler goes through all of them at every step
_RUNS_CODE = re.compile(
    r"^(os|posix|nt|sys|subprocess|socket|shutil|builtins|__builtin__|runpy|pty|importlib|ctypes|pickle"
    r"|operator|functools|webbrowser|commands|code|timeit|bdb|pdb|cProfile|asyncio|multiprocessing)(\.|$)"
)
# Honest checkpoints name these, in default dicts, partial functions and bound methods.
_HARMLESS = re.compile(
    r"^((builtins|__builtin__)\.(object|type|int|float|str|bool|bytes|bytearray|complex|list|tuple|dict|set"
    r"|frozenset|slice|range|getattr|print|len|min|max|sum|abs|sorted|unicode|long)"
    r"|functools\.partial|operator\.(itemgetter|attrgetter))$"
)


class StandIn:
    """Takes the place of an object that is no tensor: keeps its state, and does nothing.

    Attributes:
        origin: the name in the file.
        state: what the pickle would have restored the object from; None where it gave nothing.
    """

    origin: ClassVar[str] = "object"
    state: Any = None

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        """Ignores what the object would have been made from."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Mapping(StandIn):
    """The same for a subclass of dict, whose items torch adds to plain dicts only."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Any:
        return OrderedDict()


class _List(StandIn):
    def __new__(cls, *_args: Any, **_kwargs: Any) -> Any:
        return []


_BASES: dict[Use, type] = {"object": StandIn, "mapping": _Mapping, "list": _List}


@dataclass
class Survey:
    """Uses that a pickle makes of the names in it, found without loading it.

    Attributes:
        uses: what is made of each name.
        modules: where the class of a network is wrapped together with its source, as old files do: the
            positions of the first and of the last instruction.
    """

    uses: dict[str, Use] = field(default_factory=dict)
    modules: list[tuple[int, int]] = field(default_factory=list)

    def stand_ins(self, known: Iterable[str]) -> list[Global]:
        """Stand-ins for the names that are neither ``known`` nor used to run code; none if too many."""
        skip = {*_get_allowed_globals(), *known}
        names = [name for name in self.uses if name not in skip and not runs_code(name)]
        if len(names) > _MOST:
            return []
        made: list[Global] = []
        for name in names:
            stand_in = type("StandIn", (_BASES[self.uses[name]],), {"origin": name})
            made += [(stand_in, spelling) for spelling in {name, _modern(name)}]
        return [*made, (module_class, MODULE_CLASS)] if self.modules else made


def runs_code(name: str) -> bool:
    """True if a pickle can have a name for one reason alone: to run code when it is loaded."""
    return bool(_RUNS_CODE.match(name)) and not _HARMLESS.match(name)


def module_class(_kind: str, network: type, _file: str, _source: str) -> type:
    """The stand-in for a network's class, out of what old files wrap it in."""
    return network


def survey(stream: io.BytesIO) -> Survey:
    """Walk through the next pickle of a stream; a damaged one is surveyed up to the damage."""
    machine = _Machine()
    with suppress(Exception):  # whatever is wrong with it, loading it will say
        for opcode, argument, position in pickletools.genops(stream):
            machine.step(opcode, argument, position or 0)
    return machine.survey


@dataclass(frozen=True)
class _Name:
    """A name that was looked up, or what was made of it."""

    text: str


class _Machine:
    """The stack of an unpickler, with what little of the objects has to be known."""

    def __init__(self) -> None:
        self.survey = Survey()
        self._stack: list[Any] = []
        self._below: list[tuple[int, list[Any]]] = []  # at each mark, its position and what was on the stack
        self._memo: dict[int, Any] = {}

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any, position: int) -> None:
        """Follow one instruction."""
        taken, mark = self._take(opcode)
        match opcode.name:
            case "MARK":
                self._below.append((position, self._stack))
                self._stack = []
            case "GLOBAL":
                name = _Name(str(argument).replace(" ", "."))
                self.survey.uses.setdefault(name.text, "object")
                self._stack.append(name)
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = self._stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                self._stack.append(self._memo[argument])
            case "REDUCE" | "NEWOBJ" | "BUILD":
                self._stack.append(taken[0])
            case "SETITEM" | "SETITEMS":
                self._stack.append(self._used(taken[0], "mapping"))
            case "APPEND" | "APPENDS":
                self._stack.append(self._used(taken[0], "list"))
            case "TUPLE":
                self._stack.append((mark, *taken))
            case "BINPERSID":
                self._stack.append(self._persistent(taken[0], position))
            case _:
                self._stack += [argument if isinstance(argument, str) else None] * len(opcode.stack_after)

    def _take(self, opcode: pickletools.OpcodeInfo) -> tuple[list[Any], int]:
        """Take off the stack what an instruction consumes, and where the last mark stood."""
        before, items, mark = len(opcode.stack_before), [], 0
        if pickletools.markobject in opcode.stack_before:
            before, items = opcode.stack_before.index(pickletools.markobject), self._stack
            mark, self._stack = self._below.pop()
        cut = len(self._stack) - before
        taken = self._stack[cut:] + items
        del self._stack[cut:]
        return taken, mark

    def _used(self, item: Any, use: Use) -> Any:
        if isinstance(item, _Name):
            self.survey.uses[item.text] = use
        return item

    def _persistent(self, item: Any, position: int) -> Any:
        if isinstance(item, tuple) and len(item) == 5 and item[1] == "module":
            self.survey.modules.append((item[0], position))
            return item[2]
        return None


def unwrapped_classes(content: bytes, modules: list[tuple[int, int]]) -> bytes:
    """A pickle in which ``module_class`` is called where it refers to a network's class and its source."""
    pieces, done = [], 0
    for first, last in modules:
        call = f"c{MODULE_CLASS.replace('.', chr(10))}\n".encode()
        pieces += [content[done:first], call, content[first:last], b"R"]
        done = last + 1
    return b"".join([*pieces, content[done:]])


def _modern(name: str) -> str:
    """The name under which the unpickler looks for a name of Python 2."""
    module, _, attribute = name.rpartition(".")
    if (module, attribute) in renamed.NAME_MAPPING:
        return ".".join(renamed.NAME_MAPPING[module, attribute])
    return f"{renamed.IMPORT_MAPPING.get(module, module)}.{attribute}"
