"""What every method is given beside its Program and its config, and what it gives back."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from modelopt_cli.data import Data
from modelopt_cli.program import Program

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Context:
    """The surroundings of one run of a method.

    Attributes:
        data: samples to calibrate or train on, or None.
        seed: of everything random.
        batch_size: samples at a time.
        workers: loader processes.
        progress: called with samples done and their total.
        origin: what the history should say of the source, e.g. its SHA-256.
    """

    data: Data | None = None
    seed: int = 0
    batch_size: int = 32
    workers: int = 0
    progress: Progress | None = None
    origin: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What a method made of a Program.

    Attributes:
        program: the new Program; the one given is untouched.
        skipped: the reason for every layer that was left as it was, by name.
    """

    program: Program
    skipped: dict[str, str]
