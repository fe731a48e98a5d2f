"""An architecture that can be built, and what a source of architectures says of itself."""

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from modelopt_cli.checkpoint.tensor_names import Difference, Shape
from modelopt_cli.errors import ArchitectureError
from modelopt_cli.program.input_spec import InputSpec
from modelopt_cli.text import first_line, short

Value = int | float | bool | str | None


@dataclass(frozen=True)
class ArchSpec:
    """A parsed ``--arch``.

    Attributes:
        text: as it was given.
        source: key of ``sources.SOURCES``: where the network comes from.
        place: the file or package; empty for the named sources.
        name: the network's or callable's name.
        options: keyword arguments for it.
    """

    text: str
    source: str
    place: str
    name: str
    options: dict[str, Value]


@dataclass(frozen=True)
class Architecture:
    """A network that can be built.

    Attributes:
        spec: the ``--arch`` value that names it.
        build: makes it with fresh random weights.
        input: shape and preprocessing of a sample, or None where nothing says so.
        own: the code is ours or a library's; the user's own code may initialise as it likes.
        num_classes: number of logits where the spec implies it.
        published: ``input`` is that of published weights; a file may have been trained with another.
        published_classes: number of logits of its published weights, if there are any.
        class_names: gives the names of its classes where the spec implies them; not stored, since they
            may come from a library whose import takes a second.
        assumed: one line for each option that its published weights need and the spec does not say.
        task: what it is for, as ``--task`` says it, where the spec implies that.
        rename: brings a file's tensors under the network's names as its library does where those of older
            files are others; what is missing or of another shape, where they do not fit. None where no
            names are others.
        notes: one line for each thing that the owner of its folder may want to know.
        bounded: a file says its sizes, so that it is built only as far as the weights could fill it.
    """

    spec: str
    build: Callable[[], nn.Module]
    input: InputSpec | None
    own: bool = False
    num_classes: int | None = None
    published: bool = False
    published_classes: int | None = None
    class_names: Callable[[], tuple[str, ...] | None] | None = None
    assumed: tuple[str, ...] = ()
    task: str | None = None
    rename: Callable[[Mapping[str, Tensor]], dict[str, Tensor] | Difference] | None = None
    notes: tuple[str, ...] = ()
    bounded: bool = False

    @property
    def source_of_input(self) -> str:
        """The source of its input's description, for messages."""
        return f"published for {self.spec}, assumed" if self.published else f"set by {self.spec}"

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The names of its classes where the spec implies them."""
        return self.class_names() if self.class_names else None


@dataclass(frozen=True)
class ArchitectureSource:
    """A place that architectures come from.

    Attributes:
        form: how ``--arch`` names one of them.
        resolve: the architecture of a parsed spec.
        code: what is named is the user's own Python, which runs only because they named it.
        local: what is named lies on this machine, so that a spec found in a file is not followed.
        names: of its networks, as far as they are known without its library.
        recognise: specs of its networks that have exactly these names and shapes, of batch norm without
            counters; None where it knows none by those.
        channels_option: option of its specs that sets how many channels a sample has.
        published_top1: the lowest top-1 on ImageNet, in percent, that it states for an architecture.
    """

    form: str
    resolve: Callable[[ArchSpec], Architecture]
    code: bool = False
    local: bool = False
    names: Callable[[], Collection[str]] = tuple
    recognise: Callable[[Mapping[str, Shape]], list[str]] | None = None
    channels_option: str | None = None
    published_top1: Callable[[ArchSpec], float | None] = lambda spec: None


def class_count(spec: ArchSpec, default: int | None) -> int | None:
    """The number of classes that a spec sets, or else ``default``."""
    value = spec.options.get("num_classes", default)
    return value if isinstance(value, int) else None


def require_known(spec: ArchSpec, names: Collection[str]) -> None:
    """Refuse a network that a source does not have.

    Raises:
        ArchitectureError: it is not among ``names``; the hint has the nearest.
    """
    if spec.name in names:
        return
    near = difflib.get_close_matches(spec.name, names, 1, 0.5)
    raise ArchitectureError(
        f"{spec.source} has no network '{short(spec.name)}'",
        hint=f"did you mean {spec.source}:{near[0]}?" if near else f"for example {spec.source}:{min(names)}",
    )


def construct(spec: ArchSpec, make: Callable[[], Any]) -> nn.Module:
    """Call a library's constructor; what it says about its arguments becomes ours.

    Raises:
        ArchitectureError: the constructor failed.
    """
    try:
        module = make()
    except ArchitectureError:
        raise
    except Exception as error:  # any library code, any arguments
        raise ArchitectureError(f"cannot be built: {first_line(error)}", where=short(spec.text)) from error
    assert isinstance(module, nn.Module)
    return module


def join_options(base: str, options: Mapping[str, float]) -> str:
    """A spec with these options."""
    query = "&".join(
        f"{key}={value:g}" if value == int(value) else f"{key}={value}" for key, value in options.items()
    )
    return base + ("&" if "?" in base else "?") + query if query else base
