"""Run settings of a method, next to its Program and its config, and its result."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from modelopt_cli.artifact import TensorStream
from modelopt_cli.artifact.coding import PLAIN_CODE, Code
from modelopt_cli.data import Data
from modelopt_cli.measure.layer_status import Coverage
from modelopt_cli.program import Encoding, Program
from modelopt_cli.tasks import CLASSIFY, TaskSpec
from modelopt_cli.training.interfaces import Training

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Context:
    """Run settings of a method.

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
        task: what the network is for.
    """

    data: Data | None = None
    seed: int = 0
    batch_size: int = 32
    workers: int = 0
    progress: Progress | None = None
    origin: dict[str, Any] = field(default_factory=dict)
    training: Training | None = None
    device: str = "cpu"
    code: Code = PLAIN_CODE
    task: TaskSpec = CLASSIFY


@dataclass(frozen=True)
class Reached:
    """Target and the value that was reached.

    Attributes:
        metric: its name, e.g. ``flops``.
        wanted: the fraction asked for.
        reached: the fraction measured on the result.
        unit: of both, where they are no fractions.
    """

    metric: str
    wanted: float
    reached: float
    unit: str = ""


@dataclass(frozen=True)
class MethodResult:
    """Result of a method on a Program.

    Attributes:
        program: the new Program; the one given is untouched.
        skipped: the reason for every layer that was left as it was, by name.
        target: for a method that was given one.
        notes: one line for each thing the user should know.
        record: what the history says besides the config: choices that were made, and why.
        floats: the network that was rounded, for training; its layers have the names of those in ``program``.
    """

    program: Program
    skipped: dict[str, str]
    target: Reached | None = None
    notes: tuple[str, ...] = ()
    record: Mapping[str, Any] = field(default_factory=dict)
    floats: Program | None = None


@dataclass(frozen=True)
class Tensors:
    """Tensors without a graph, as a method gets them.

    Attributes:
        state: by name; they may stay in their file until their turn.
        encodings: how they were stored so far.
        network: that they belong to and that cannot be traced; None of bare tensors.
        about: what the file will say besides, as ``artifact.write_tensors`` takes it.
    """

    state: Mapping[str, Tensor]
    encodings: Mapping[str, Encoding]
    network: nn.Module | None
    about: Mapping[str, Any]


@dataclass(frozen=True)
class StreamResult:
    """Result of a method that works tensor by tensor, while the file is written.

    Attributes:
        stream: the tensors and how each is stored.
        coverage: the outcome for every weight.
        skipped: the reason for every weight that is left as it is.
        notes: one line for each thing the user should know.
        widths: bits of weight and activations of the layers whose widths are not those of the config.
    """

    stream: TensorStream
    coverage: Coverage
    skipped: dict[str, str]
    notes: tuple[str, ...] = ()
    widths: Mapping[str, list[int | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorsResult:
    """Result of a method on tensors without a graph.

    Attributes:
        tensors: by name, or a stream of them that makes each when its turn comes.
        coverage: what became of every weight.
        entry: for the history.
        encodings: how tensors are stored; those of a stream come with it.
        target: for a method that was given one.
        notes: one line for each thing the user should know.
    """

    tensors: TensorStream | Mapping[str, Tensor]
    coverage: Coverage
    entry: dict[str, Any]
    encodings: Mapping[str, Encoding] = field(default_factory=dict)
    target: Reached | None = None
    notes: tuple[str, ...] = ()
