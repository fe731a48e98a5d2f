"""What every method is given beside its Program and its config, and what it gives back."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modelopt_cli.artifact.coding import Code
from modelopt_cli.data import Data
from modelopt_cli.program import Program
from modelopt_cli.training.interfaces import Training

if TYPE_CHECKING:
    from modelopt_cli.methods.distill.cache import CacheRequest
    from modelopt_cli.methods.distill.teacher import Member

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Context:
    """The surroundings of one run of a method.

    Attributes:
        data: samples to calibrate on, or None.
        seed: of everything random.
        batch_size: samples at a time.
        workers: loader processes.
        progress: called with samples done and their total.
        origin: what the history should say of the source, e.g. its SHA-256.
        training: what to fine-tune with, or None for no fine-tuning.
        device: where to compute; the result comes back on the CPU.
        code: how the file will be written, for targets that count its bytes.
        teachers: whom to learn from.
        cache: where to keep their answers, or None.
        on_note: called with one line for each thing the user should know meanwhile.
    """

    data: Data | None = None
    seed: int = 0
    batch_size: int = 32
    workers: int = 0
    progress: Progress | None = None
    origin: dict[str, Any] = field(default_factory=dict)
    training: Training | None = None
    device: str = "cpu"
    code: Code = "plain"
    teachers: "tuple[Member, ...]" = ()
    cache: "CacheRequest | None" = None
    on_note: Callable[[str], None] | None = None


@dataclass(frozen=True)
class Reached:
    """A target and what became of it.

    Attributes:
        metric: its name, e.g. ``flops``.
        wanted: the fraction asked for.
        reached: the fraction measured on the result.
    """

    metric: str
    wanted: float
    reached: float


@dataclass(frozen=True)
class Result:
    """What a method made of a Program.

    Attributes:
        program: the new Program; the one given is untouched.
        skipped: the reason for every layer that was left as it was, by name.
        target: for a method that was given one.
        notes: one line for each thing the user should know.
    """

    program: Program
    skipped: dict[str, str]
    target: Reached | None = None
    notes: tuple[str, ...] = ()
