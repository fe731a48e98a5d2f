"""Settings of measuring, and limits on what was measured."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from modelopt_cli.settings import Config, Setting, fields_of, fraction, option, parse_device

_RUNNING = "Running"
GATES = "Gates (exit code 1 if not met)"


@dataclass(frozen=True)
class EvalOptions(Config, title="Measuring"):
    """How to run and what to measure.

    Attributes:
        baseline: index of the reference among the models.
        memory: measure peak memory and the time to load next to latency, which starts one process for each
            model.
    """

    baseline: int = 0
    batch_size: Annotated[
        int,
        Setting(
            "Samples in one pass when latency is measured.",
            least=1,
            flags=("--latency-batch-size",),
            older=("--batch-size",),
        ),
    ] = 1
    warmup: Annotated[
        int,
        Setting(
            "Passes before those that are timed.",
            least=0,
            flags=("--latency-warmup",),
            older=("--warmup",),
            advanced=True,
        ),
    ] = 5
    runs: Annotated[
        int,
        Setting(
            "Timed passes (0: measure no latency, memory and loading).",
            least=0,
            flags=("--latency-runs",),
            older=("--runs",),
        ),
    ] = 30
    threads: Annotated[
        int | None,
        Setting("CPU threads.", least=1, default="torch's own choice", title=_RUNNING, shared=True),
    ] = None
    data_batch_size: Annotated[
        int, Setting("Samples in one pass when accuracy is measured.", least=1, advanced=True)
    ] = 64
    limit: Annotated[int | None, Setting("Evaluate on at most this many samples of --data.", least=1)] = None
    workers: Annotated[
        int,
        Setting(
            "Processes that load data besides this one.", least=0, title=_RUNNING, shared=True, advanced=True
        ),
    ] = 0
    seed: Annotated[
        int, Setting("Seed of everything random.", least=0, most=2**32 - 1, title=_RUNNING, shared=True)
    ] = 0
    device: Annotated[
        str,
        Setting(
            "Device to run on.", metavar="cpu|cuda|cuda:N", parse=parse_device, title=_RUNNING, shared=True
        ),
    ] = "cpu"
    memory: bool = True


@dataclass(frozen=True)
class Gates(Config, title=GATES):
    """Limits on the result, compared with the baseline; None sets no limit.

    Attributes:
        judged: index of the one model to hold against the limits; None holds all but the baseline.
    """

    max_drop: Annotated[
        float | None, Setting("Largest loss of top-1 accuracy, in percentage points.", metavar="PP")
    ] = None
    min_ratio: Annotated[
        float | None, Setting("Smallest ratio of the baseline's file size to the result's.", least=0)
    ] = None
    min_speedup: Annotated[
        float | None,
        Setting("Smallest speedup, at the lower end of its 95 % interval.", least=0),
    ] = None
    min_coverage: Annotated[
        float | None,
        Setting(
            "Smallest fraction of the layers that is compressed.",
            metavar="F",
            parse=fraction,
            least=0,
            most=1,
        ),
    ] = None
    confident: Annotated[
        bool, Setting("Judge --max-drop by the upper end of its 95 % interval.", advanced=True)
    ] = False
    judged: int | None = None

    def conflicts(self) -> Iterator[str]:
        """An interval of no limit."""
        if self.confident and self.max_drop is None:
            yield f"{option('confident')}: needs {option('max_drop')}"

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) is not None for field in fields_of(Gates) if field.optional)
